"""`svgpipe import-latents`: latents that other programs computed, as a feature cache.

A unit is one outer shard of the cache. A killed import resumes. A row that cannot be read is rejected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.cache_creation import CALIBRATION_ROWS, UNIT_ROWS, UNKNOWN, publish_created, store_spec
from svgpipe.manifests.cache_manifest import CacheManifest
from svgpipe.manifests.cache_writer import write_unit
from svgpipe.manifests.calibration import CALIBRATION, Calibration, normalised
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location, absolute, file_sha256
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import InputRef, Json, digest
from svgpipe.manifests.rejects import Reject
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..extract.rejects import MAX_REJECTS, RejectTally
from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import cpu_count
from .files import LatentFiles, Layout, Piece, find_latents
from .reader import read_latents
from .rows import Rows, calibrate

STATISTICS_NAME = "latents_stats.pt"  # LightningDiT's mean and standard deviation, beside the latents
NAMED_REJECTS = 20
ADVICE = "Mend the files and import them into a new directory, or continue with"


@dataclass(frozen=True)
class Import:
    """What to import.

    Attributes:
        source: folder or .zip, see files.py.
        heldout: other files of the same layout, shape and classes, for rows that are kept out of training.
        class_names: in label order; None: those of the files, or the numbers.
        factor: normalised = factor * latent, as 0.18215 for SD-VAE; None: `latents_stats.pt` of the source if it is
            there, else mean and standard deviation measured on 4,096 training rows.
        encoder: what made the latents, for pages.
        config: of a finished cache whose units are imported again.
    """

    source: Path
    heldout: Path | None = None
    class_names: Sequence[str] | None = None
    factor: float | None = None
    encoder: str = UNKNOWN
    config: Json | None = None

    def __post_init__(self) -> None:
        if self.factor is not None and not (math.isfinite(self.factor) and self.factor > 0):
            raise UsageError(f"--factor {self.factor}: expected a positive number.")

    @classmethod
    def of_cache(cls, manifest: CacheManifest, cache: Location) -> Import:
        """Return what a finished cache was imported from.

        Raises:
            ArtifactError: it was not imported.
        """
        places = {name: Path(str(manifest.input(name).place(cache))) for name in manifest.inputs}
        own = manifest.config
        return cls(places["latents"], places.get("heldout"), own["class_names"], own["factor"], manifest.backbone, own)

    @property
    def statistics(self) -> Path | None:
        """The file of statistics beside the latents, if it is to be used."""
        path = self.source / STATISTICS_NAME
        return path if self.factor is None and path.is_file() else None

    def files(self) -> dict[str, LatentFiles]:
        """Return the files by the name of the input. Raises the errors of `find_latents`."""
        places = {"latents": self.source, "heldout": self.heldout}
        return {name: find_latents(place) for name, place in places.items() if place is not None}

    def spec(self, files: dict[str, LatentFiles], out: Location) -> StageSpec[CacheManifest]:
        """Return what `import_latents` is asked to make."""
        statistics, places = self.statistics, {"latents": self.source, "heldout": self.heldout}
        config = self.config or {
            "created_from": files["latents"].layout,
            "class_names": None if self.class_names is None else list(self.class_names),
            "factor": self.factor,
            "statistics": None if statistics is None else file_sha256(statistics),
            "calibration_images": CALIBRATION_ROWS if self.factor is None and statistics is None else None,
            "encoder": self.encoder,
            "unit_rows": UNIT_ROWS,
            "store_dtype": "float16",
        }
        inputs = {
            name: InputRef(
                kind="latents",
                fingerprint=digest(part.listing),
                path=str(places[name]),
                config={"layout": part.layout, "rows": len(part.labels)},
            )
            for name, part in files.items()
        }
        return StageSpec(out, CacheManifest, config, inputs)


def import_latents(
    wanted: Import,
    out: Location,
    *,
    max_rejects: float = MAX_REJECTS,
    processes: int | None = None,
    progress: Progress | None = None,
) -> CacheManifest:
    """Write the latents of `wanted` as a feature cache at `out`; run again to resume.

    Args:
        wanted: files and their normalisation.
        out: directory to create or resume.
        max_rejects: maximum fraction of rejected rows.
        processes: number of processes; None: one per core.
        progress: receives the progress.

    Returns:
        The manifest of the cache.

    Raises:
        UsageError: no known layout, or labels without a class.
        MismatchError: `out` was begun from other files or options, or held-out latents have other classes.
        TooManyRejectsError: more than `max_rejects`, or far more at the start.
        ArtifactError: a damaged list of files, or hardly a row that can be read.
    """
    if progress is not None:
        progress.say(f"listing {wanted.source}")
    files = wanted.files()
    rows = Rows.of(files, wanted.class_names)
    with WorkDir(wanted.spec(files, out)) as work:
        if work.finished is not None:
            return work.finished
        rows.require_others()
        progress = Recorded(progress, out)
        shape = rows.shape()
        if shape[0] == 1 and not all(part.flips for part in rows.parts):
            progress.say("warning: some files have no flips; the cache holds the original view alone")
        calibration = _calibration(wanted, rows, shape[-1], Journal(out), progress)
        spec = store_spec(shape, len(rows.labels), rows.class_names, UNIT_ROWS)
        store = FeatureStore.create(out, spec, calibration.mean, calibration.std)
        _write_units(store, rows, calibration, max_rejects, processes or cpu_count(), progress, work)
        return publish_created(work, store, rows.labels, rows.heldout, rows.parts[0].distribution, wanted.encoder)


def _calibration(wanted: Import, rows: Rows, channels: int, journal: Journal, progress: Progress) -> Calibration:
    """Return the recorded normalisation, or the one that is asked for, which is recorded."""
    if journal.has(CALIBRATION):
        return Calibration.read(journal)
    calibration = calibrate(rows, channels, wanted.factor, wanted.statistics, progress)
    calibration.record(journal)
    return calibration


def _write_units(
    store: FeatureStore,
    rows: Rows,
    calibration: Calibration,
    max_rejects: float,
    processes: int,
    progress: Progress,
    work: WorkDir[CacheManifest],
) -> None:
    """Write the missing units. Units with rejected rows are read again: their files may be readable by now."""
    spec, tally = store.spec, RejectTally(store.spec.num_samples, max_rejects, "rows", ADVICE)
    whole = Journal(store.path).whole(range(spec.num_units))
    finished = {unit for unit, record in whole.items() if not record.entry["rejects"]}
    for unit in finished:
        tally.add(len(spec.rows_of(unit)), [])
    progress.begin("import", spec.num_samples, "rows", tally.seen)
    jobs = [(unit, rows.pieces(spec.rows_of(unit))) for unit in range(spec.num_units) if unit not in finished]
    write, named = _WriteUnit(rows.layout, FeatureStore(absolute(store.path), spec), calibration), 0
    for (unit, _), rejects in zip(jobs, map_in_processes(write, jobs, processes), strict=True):
        work.check_lock()
        progress.advance(len(spec.rows_of(unit)))
        for reject in rejects[: NAMED_REJECTS - named]:
            progress.say(f"rejected: {reject.tar}{reject.key and '/' + reject.key}: {reject.reason}")
        named = min(NAMED_REJECTS, named + len(rejects))
        tally.add(len(spec.rows_of(unit)), [reject.reason for reject in rejects])


def require_readable(wanted: Import, rows: Iterable[int]) -> None:
    """Check that some rows of a cache can still be read, before they are imported again.

    Raises:
        ArtifactError: one cannot be read; or the errors of `Import.files`.
    """
    listed = Rows.of(wanted.files(), wanted.class_names)
    for row in rows:
        listed.read(row)


@dataclass(frozen=True)
class _WriteUnit:
    """Reads the latents of one unit, and writes its outer shard and its journal record."""

    layout: Layout
    store: FeatureStore
    calibration: Calibration

    def __call__(self, job: tuple[int, list[Piece]]) -> list[Reject]:
        """Return the rejected rows."""
        unit, pieces = job
        values = np.zeros(self.store.spec.shape_of(unit), np.float16)
        rejects: list[Reject] = []
        row = 0
        for piece in pieces:
            end = row + piece.stop - piece.start
            try:
                values[row:end], fits = normalised(self._read(piece, values.shape[1:]), self.calibration)
                bad, reason = (row + np.flatnonzero(~fits)).tolist(), "a value is not finite, or too large for float16"
            except ArtifactError as error:
                bad, reason = list(range(row, end)), str(error).removeprefix(f"{piece}: ")
            values[bad] = 0
            rejects += [Reject(i, piece.path, piece.start + i - row, piece.member or "", reason) for i in bad]
            row = end
        assert row == len(values), f"unit {unit}: {row} of {len(values)} rows are listed"
        write_unit(self.store, Journal(self.store.path), unit, values, rejects)
        return rejects

    def _read(self, piece: Piece, shape: tuple[int, ...]) -> NDArray[np.float32]:
        values = read_latents(self.layout, piece)[:, : shape[0]]
        if values.shape[1:] != shape:
            raise ArtifactError(
                f"{piece}: expected {shape} (views, rows, columns, channels), found {values.shape[1:]}."
            )
        return np.ascontiguousarray(values)
