"""Whether a feature cache is complete and every number in it is the one that was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from svgpipe.manifests.cache import CacheManifest
from svgpipe.manifests.calibration import CALIBRATION_NAME, Calibration
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location, file_sha256, file_size
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import MANIFEST_NAME

from ..extract.moments import Moments
from ..extract.unit_writer import REJECTS_NAME, reject_lines
from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress
from ..runtime.resources import cpu_count

Found = tuple[str, str, int | None]
# Relative difference between a mean computed again and the recorded one: float64 rounding, in another order.
MEAN_TOLERANCE = 1e-9
# Less is read sooner than another process starts.
BYTES_PER_PROCESS = 512 << 20


def verify_cache(
    path: Location, manifest: CacheManifest | None, *, deep: bool, progress: Progress, processes: int | None = None
) -> Iterator[Found]:
    """Problems of the cache at `path` as (where, what, unit that must be extracted again).

    Args:
        manifest: None for a cache that is not finished; then only what is there is checked.
        processes: that read units side by side where `deep`; None: one per core.
    """
    try:
        store = FeatureStore.open(path)
    except ArtifactError as error:
        yield str(path), str(error), None
        # The manifest still tells what to look for.
        if manifest is None:
            return
        store = FeatureStore(path, manifest.spec)
    if manifest is not None and store.spec != manifest.spec:
        yield str(path / "features"), f"expected {manifest.spec}, found {store.spec}", None
        store = FeatureStore(path, manifest.spec)
    journal = Journal(path / "journal")
    missing = journal.missing(store.spec.num_units)
    if manifest is None:
        done = store.spec.num_units - len(missing)
        yield str(path), f"unfinished: {done} of {store.spec.num_units} units; `svgpipe extract` resumes", None
    else:
        yield from ((str(journal.directory), f"unit {unit}: has no record", unit) for unit in missing)
    units = sorted(set(range(store.spec.num_units)) - set(missing))
    damaged = set(missing)
    for found in _verify_units(_UnitCheck(store, journal, deep), units, progress, processes):
        damaged.add(found[2] if found[2] is not None else -1)
        yield found
    if manifest is not None:
        yield from _verify_arrays(path, manifest, store, journal, recorded=not damaged)


def _verify_units(check: _UnitCheck, units: list[int], progress: Progress, processes: int | None) -> Iterator[Found]:
    progress.begin("verify", len(units))
    num_bytes = len(units) * np.prod(check.store.spec.shape_of(0)) * (2 if check.store.spec.dtype == "float16" else 1)
    workers = min(processes or cpu_count(), int(num_bytes // BYTES_PER_PROCESS) + 1) if check.deep else 1
    for found in map_in_processes(check, units, workers):
        yield from found
        progress.advance()


@dataclass(frozen=True)
class _UnitCheck:
    """One outer shard against its journal record."""

    store: FeatureStore
    journal: Journal
    deep: bool

    def __call__(self, unit: int) -> list[Found]:
        file = self.store.unit_file(unit)

        def wrong(problem: object) -> Found:
            return str(file), f"unit {unit}: {problem}", unit

        try:
            record = self.journal.read(unit)
            rejects = [int(reject["row"]) for reject in record["rejects"]]
            moments = Moments.from_json(record.get("moments"), self.store.spec.channels)
            sha256, num_bytes = record["sha256"], record["num_bytes"]
        except (ArtifactError, KeyError, TypeError, ValueError) as error:
            return [wrong(f"its record is damaged: {error}")]
        size = file_size(file)
        if size != num_bytes:
            return [wrong(f"expected {num_bytes} bytes, found {'no file' if size is None else size}")]
        rows = self.store.spec.rows_of(unit)
        if any(not 0 <= row < len(rows) for row in rejects):
            return [wrong(f"its record rejects rows {rejects} of {len(rows)}")]
        if not self.deep:
            return []
        problems: list[Found] = []
        try:
            if (found := file_sha256(file)) != sha256:
                problems.append(wrong(f"expected sha256 {sha256[:12]}, found {found[:12]}"))
            problems += [wrong(problem) for problem in self._values(unit, rejects, moments)]
        except (ArtifactError, OSError) as error:  # a bad sector is damage too
            problems.append(wrong(error))
        return problems

    def _values(self, unit: int, rejects: list[int], moments: Moments) -> Iterator[str]:
        stored: Any = self.store.read_unit(unit)  # verifies every chunk's crc32c
        if stored.dtype == np.float16 and not np.isfinite(stored).all():
            yield "a feature is not finite"
        valid = np.ones(len(stored), bool)
        valid[rejects] = False
        if stored[~valid].any():
            yield "a rejected row is not zero"
        flat = stored[valid].reshape(-1, stored.shape[-1]).astype(np.float64)
        if (scale := self.store.feature_scale) is not None:
            flat = flat * scale
        if len(flat) != moments.count:
            yield f"expected statistics of {len(flat)} vectors, found {moments.count}"
        elif len(flat) and not np.allclose(flat.mean(axis=0), moments.mean, rtol=MEAN_TOLERANCE, atol=MEAN_TOLERANCE):
            yield "its recorded mean is not that of its features"


def _verify_arrays(
    path: Location, manifest: CacheManifest, store: FeatureStore, journal: Journal, *, recorded: bool
) -> Iterator[Found]:
    """The small arrays, the calibration, and the digest over everything where every unit has a record."""
    arrays: dict[str, Any] = {}
    for name in manifest.array_names:
        try:
            arrays[name] = store.array(name)
        except ArtifactError as error:
            yield str(path / name), str(error), None
    yield from _verify_calibration(path / CALIBRATION_NAME, arrays)
    yield from _verify_rejects(path / REJECTS_NAME, journal, store, recorded=recorded)
    if len(arrays) < len(manifest.array_names):
        return
    bad = [name for name, values in arrays.items() if values.dtype.kind == "f" and not np.isfinite(values).all()]
    yield from ((str(path / name), "a value is not finite", None) for name in bad)
    labels, valid = arrays["label"], arrays["valid"]
    if len(labels) != manifest.num_samples or len(valid) != manifest.num_samples:
        yield str(path / "label"), f"expected {manifest.num_samples} values, found {len(labels)}", None
        return
    wrong = np.flatnonzero(valid & ((labels < 0) | (labels >= len(manifest.class_names))))
    if wrong.size:
        row, classes = int(wrong[0]), len(manifest.class_names)
        yield str(path / "label"), f"row {row}: expected 0..{classes - 1}, found {labels[row]}", None
    if int(valid.sum()) != manifest.num_valid:
        yield str(path / "valid"), f"expected {manifest.num_valid} valid rows, found {int(valid.sum())}", None
    if recorded:
        hashes = [journal.read(unit)["sha256"] for unit in range(store.spec.num_units)]
        content = CacheManifest.content_of(store, hashes)
        if content != manifest.content:
            problem = f"expected the content {manifest.content[:12]}, found {content[:12]}"
            yield str(path / MANIFEST_NAME), problem, None


def _verify_rejects(path: Location, journal: Journal, store: FeatureStore, *, recorded: bool) -> Iterator[Found]:
    try:
        found = path.read_bytes()
    except OSError as error:
        yield str(path), f"cannot be read: {error}", None
        return
    if recorded and found != reject_lines([journal.read(unit) for unit in range(store.spec.num_units)], store.spec):
        yield str(path), "is not what the units' records say", None


def _verify_calibration(path: Location, arrays: dict[str, Any]) -> Iterator[Found]:
    try:
        calibration = Calibration.read(path)
    except ArtifactError as error:
        yield str(path), str(error), None
        return
    expected: dict[str, Any] = {
        "channel_mean": calibration.mean,
        "channel_std": calibration.std,
        "feature_scale": calibration.scale,
    }
    if any(name in arrays and not np.array_equal(arrays[name], values) for name, values in expected.items()):
        yield str(path), "is not what the store was normalised with", None
