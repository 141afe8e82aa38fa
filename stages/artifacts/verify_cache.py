"""Checks that a feature cache is complete and unaltered."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from svgpipe.manifests.cache_manifest import CacheManifest
from svgpipe.manifests.calibration import Calibration
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import MANIFEST_NAME
from svgpipe.manifests.moments import Moments
from svgpipe.manifests.rejects import REJECTS_NAME, reject_lines, rejects_of

from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress
from ..runtime.resources import cpu_count

# Relative difference between a recomputed and a recorded mean: float64 rounding in another order.
MEAN_TOLERANCE = 1e-9
# Smaller caches are read faster than another process starts.
BYTES_PER_PROCESS = 512 << 20


@dataclass(frozen=True)
class Finding:
    """A problem. `unit` is the outer shard of a cache that must be extracted again."""

    where: str
    problem: str
    unit: int | None = None


def finding(where: object, problem: object, unit: int | None = None) -> Finding:
    """Return a finding. The message of an error begins with the place, which is not repeated."""
    return Finding(str(where), str(problem).removeprefix(f"{where}: "), unit)


def found_by(error: ArtifactError) -> Finding:
    """Return the finding for an error whose message begins with the place."""
    where, _, problem = str(error).partition(": ")
    return Finding(where, problem)


def verify_cache(
    path: Location, manifest: CacheManifest | None, *, deep: bool, progress: Progress, processes: int | None = None
) -> Iterator[Finding]:
    """Yield all problems of the cache at `path`.

    Args:
        path: finished or unfinished cache.
        manifest: None for an unfinished cache: only existing units are checked.
        deep: read every byte.
        processes: number of processes for `deep`; None: one per core.
        progress: receives the progress.
    """
    try:
        store = FeatureStore.open(path)
    except ArtifactError as error:
        yield Finding(str(path), str(error))
        # The manifest still lists what must exist.
        if manifest is None:
            return
        store = FeatureStore(path, manifest.spec)
    if manifest is not None and store.spec != manifest.spec:
        yield finding(path / "features", f"expected {manifest.spec}, found {store.spec}")
        store = FeatureStore(path, manifest.spec)
    journal, total = Journal(path), store.spec.num_units
    units = [unit for unit in journal.numbers() if unit < total]
    missing = sorted({*range(total)} - {*units})
    if manifest is None:
        yield finding(path, f"unfinished: {len(units)} of {total} units; the command that makes it resumes")
    else:
        yield from (finding(journal.directory, f"unit {unit}: has no record", unit) for unit in missing)
    damaged = set(missing)
    for problem in _verify_units(_UnitCheck(store, journal, deep), units, progress, processes):
        damaged.add(problem.unit if problem.unit is not None else -1)
        yield problem
    if manifest is not None:
        yield from _verify_arrays(path, manifest, store, journal)
        yield from _verify_rest(path, manifest, store, None if damaged else journal)


def _verify_units(check: _UnitCheck, units: list[int], progress: Progress, processes: int | None) -> Iterator[Finding]:
    progress.begin("verify", len(units), "units")
    num_bytes = len(units) * np.prod(check.store.spec.shape_of(0)) * (2 if check.store.spec.dtype == "float16" else 1)
    workers = min(processes or cpu_count(), int(num_bytes // BYTES_PER_PROCESS) + 1) if check.deep else 1
    for findings in map_in_processes(check, units, workers):
        yield from findings
        progress.advance()


@dataclass(frozen=True)
class _UnitCheck:
    """Checks one outer shard against its journal record."""

    store: FeatureStore
    journal: Journal
    deep: bool

    def __call__(self, unit: int) -> list[Finding]:
        return [
            finding(self.store.unit_file(unit), f"unit {unit}: {problem}", unit) for problem in self._problems(unit)
        ]

    def _problems(self, unit: int) -> Iterator[object]:
        file = self.store.unit_file(unit)
        try:
            record = self.journal.check(unit).entry
            rejects = [int(reject["row"]) for reject in record["rejects"]]
            moments = Moments.from_json(record.get("moments"), self.store.spec.channels)
        except (ArtifactError, KeyError, TypeError, ValueError) as error:
            yield str(error).removeprefix(f"{file}: ")
            return
        rows = len(self.store.spec.rows_of(unit))
        if any(not 0 <= row < rows for row in rejects):
            yield f"its record rejects rows {rejects} of {rows}"
        elif self.deep:
            for look in (
                partial(self.journal.check, unit, deep=True),
                partial(self._check_values, unit, rejects, moments),
            ):
                try:
                    look()
                except (ArtifactError, OSError) as error:  # a bad sector is also damage
                    yield str(error).removeprefix(f"{file}: ")

    def _check_values(self, unit: int, rejects: list[int], moments: Moments) -> None:
        stored: Any = self.store.read_unit(unit)  # verifies every chunk's crc32c
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            raise ArtifactError("a feature is not finite")
        valid = np.ones(len(stored), bool)
        valid[rejects] = False
        if stored[~valid].any():
            raise ArtifactError("a rejected row is not zero")
        flat = stored[valid].reshape(-1, stored.shape[-1]).astype(np.float64)
        if (scale := self.store.feature_scale) is not None:
            flat = flat * scale
        if len(flat) != moments.count:
            raise ArtifactError(f"expected statistics of {len(flat)} vectors, found {moments.count}")
        if len(flat) and not np.allclose(flat.mean(axis=0), moments.mean, rtol=MEAN_TOLERANCE, atol=MEAN_TOLERANCE):
            raise ArtifactError("its recorded mean is not that of its features")


def _verify_arrays(path: Location, manifest: CacheManifest, store: FeatureStore, journal: Journal) -> Iterator[Finding]:
    """Yield problems of the small arrays and of the calibration, which holds some of the same numbers."""
    arrays: dict[str, Any] = {}
    for name in manifest.array_names:
        try:
            arrays[name] = store.array(name)
            if arrays[name].dtype.kind == "f" and not np.isfinite(arrays[name]).all():
                yield finding(path / name, "a value is not finite")
        except ArtifactError as error:
            yield finding(path / name, error)
    try:
        calibration = Calibration.read(journal)
        expected = {
            "channel_mean": calibration.mean,
            "channel_std": calibration.std,
            "feature_scale": calibration.scale,
        }
        pairs = [(arrays[name], values) for name, values in expected.items() if name in arrays and values is not None]
        if not all(np.array_equal(stored, recorded) for stored, recorded in pairs):
            yield finding(journal.directory, "its calibration differs from the normalisation of the store")
    except ArtifactError as error:
        yield found_by(error)
    if len(arrays) < len(manifest.array_names):
        return
    labels, valid = arrays["label"], arrays["valid"]
    if len(labels) != manifest.num_samples or len(valid) != manifest.num_samples:
        yield finding(path / "label", f"expected {manifest.num_samples} values, found {len(labels)}")
        return
    wrong = np.flatnonzero(valid & ((labels < 0) | (labels >= len(manifest.class_names))))
    if wrong.size:
        row, classes = int(wrong[0]), len(manifest.class_names)
        yield finding(path / "label", f"row {row}: expected 0..{classes - 1}, found {labels[row]}")
    if int(valid.sum()) != manifest.num_valid:
        yield finding(path / "valid", f"expected {manifest.num_valid} valid rows, found {int(valid.sum())}")


def _verify_rest(
    path: Location, manifest: CacheManifest, store: FeatureStore, whole: Journal | None
) -> Iterator[Finding]:
    """Yield problems of rejected.jsonl and of the digest of the content.

    Args:
        path: cache.
        manifest: its manifest.
        store: its store.
        whole: the journal, if every unit is intact.
    """
    records = [] if whole is None else list(whole.whole(range(store.spec.num_units)).values())
    try:
        lines = (path / REJECTS_NAME).read_bytes()
        if whole and lines != reject_lines(rejects_of([record.entry for record in records], store.spec)):
            yield finding(path / REJECTS_NAME, "differs from the records of the units")
    except OSError as error:
        yield finding(path / REJECTS_NAME, f"cannot be read: {error}")
    with suppress(ArtifactError):  # a small array is damaged, which is already reported
        if whole:
            content = CacheManifest.content_of(store, [file.sha256 for record in records for file in record.files])
            if content != manifest.content:
                problem = f"expected the content {manifest.content[:12]}, found {content[:12]}"
                yield finding(path / MANIFEST_NAME, problem)
