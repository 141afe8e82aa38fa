"""`svgpipe import-latents`: latents that other programs computed, as a feature cache.

A unit is one outer shard of the cache. A killed import resumes. A file that cannot be read becomes a rejected row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from svgpipe.manifests.cache_creation import (
    CALIBRATION_ROWS,
    UNIT_ROWS,
    UNKNOWN,
    classes_of_numbers,
    publish_created,
    store_spec,
)
from svgpipe.manifests.cache_manifest import CacheManifest
from svgpipe.manifests.cache_writer import write_unit
from svgpipe.manifests.calibration import (
    CALIBRATION,
    Calibration,
    given_calibration,
    measured_calibration,
    normalised,
)
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import InputRef, digest
from svgpipe.manifests.moments import Moments
from svgpipe.manifests.rejects import Reject
from svgpipe.manifests.selection import choose_evenly
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..extract.rejects import MAX_REJECTS, RejectTally
from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import cpu_count
from .latent_files import LatentFiles, Layout, Piece, find_latents, read_latents

STATISTICS_NAME = "latents_stats.pt"  # LightningDiT's mean and standard deviation, beside the latents


@dataclass(frozen=True)
class Import:
    """What to import.

    Attributes:
        source: folder or .zip, see latent_files.py.
        heldout: the same for rows that are kept out of training.
        class_names: in label order; None: those of the files, or the numbers.
        factor: normalised = factor * latent, as 0.18215 for SD-VAE; None: `latents_stats.pt` of the source if it is
            there, else mean and standard deviation measured on 4,096 training rows.
        encoder: what made the latents, for pages.
    """

    source: Path
    heldout: Path | None = None
    class_names: Sequence[str] | None = None
    factor: float | None = None
    encoder: str = UNKNOWN

    @classmethod
    def of_cache(cls, manifest: CacheManifest, cache: Location) -> Import:
        """Return what a finished cache was imported from.

        Raises:
            ArtifactError: it was not imported.
        """
        heldout = manifest.inputs.get("heldout")
        return cls(
            Path(str(manifest.input("latents").place(cache))),
            None if heldout is None else Path(str(heldout.place(cache))),
            manifest.config["class_names"],
            manifest.config["factor"],
            manifest.backbone,
        )

    def files(self) -> dict[str, LatentFiles]:
        """Return the files by the name of the input. Raises the errors of `find_latents`."""
        places = {"latents": self.source, "heldout": self.heldout}
        return {name: find_latents(place) for name, place in places.items() if place is not None}

    def inputs(self, files: dict[str, LatentFiles]) -> dict[str, InputRef]:
        """Return the references to the files."""
        places = {"latents": self.source, "heldout": self.heldout}
        return {
            name: InputRef(
                kind="latents",
                fingerprint=digest(part.listing),
                path=str(places[name]),
                config={"layout": part.layout, "rows": len(part.labels)},
            )
            for name, part in files.items()
        }

    def __post_init__(self) -> None:
        if self.factor is not None and not (math.isfinite(self.factor) and self.factor > 0):
            raise UsageError(f"--factor {self.factor}: expected a positive number.")


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
        MismatchError: `out` was begun from other files or options, or held-out latents have another shape.
        TooManyRejectsError: more than `max_rejects`, or far more at the start.
        ArtifactError: a damaged file in the list of files, or no row that can be read.
    """
    parts = wanted.files()
    rows = _Rows.of(parts, wanted)
    with WorkDir(_spec(wanted, parts, out)) as work:
        if work.finished is not None:
            return work.finished
        progress, journal = Recorded(progress, out), Journal(out)
        shape = rows.shape()
        calibration = _calibration(wanted, rows, journal, progress)
        spec = store_spec(shape, len(rows.labels), rows.class_names, UNIT_ROWS)
        store = FeatureStore.create(out, spec, calibration.mean, calibration.std)
        finished, tally = journal.whole(range(spec.num_units)), RejectTally(spec.num_samples, max_rejects)
        for unit, record in finished.items():
            tally.add(len(spec.rows_of(unit)), [reject["reason"] for reject in record.entry["rejects"]])
        progress.begin("import", spec.num_samples, "rows", tally.seen)
        jobs = [(unit, rows.pieces(spec.rows_of(unit))) for unit in range(spec.num_units) if unit not in finished]
        write = _WriteUnit(rows.layout, FeatureStore(absolute(out), spec), calibration)
        for (unit, _), reasons in zip(jobs, map_in_processes(write, jobs, processes or cpu_count()), strict=True):
            work.check_lock()
            tally.add(len(spec.rows_of(unit)), reasons)
            progress.advance(len(spec.rows_of(unit)))
            for reason in reasons:
                progress.say(f"rejected: {reason}")
        return publish_created(work, store, rows.labels, rows.heldout, parts["latents"].distribution, wanted.encoder)


def _spec(wanted: Import, parts: dict[str, LatentFiles], out: Location) -> StageSpec[CacheManifest]:
    statistics = _statistics_file(wanted)
    config = {
        "created_from": parts["latents"].layout,
        "class_names": None if wanted.class_names is None else list(wanted.class_names),
        "factor": wanted.factor,
        "calibration_images": CALIBRATION_ROWS if wanted.factor is None and statistics is None else None,
        "unit_rows": UNIT_ROWS,
        "store_dtype": "float16",
    }
    return StageSpec(out, CacheManifest, config, wanted.inputs(parts))


@dataclass(frozen=True)
class _Rows:
    """All rows of an import: training rows, then held-out rows."""

    parts: tuple[LatentFiles, ...]
    labels: NDArray[np.int32]
    heldout: NDArray[np.bool_]
    class_names: list[str]

    @classmethod
    def of(cls, parts: dict[str, LatentFiles], wanted: Import) -> _Rows:
        train, held = parts["latents"], parts.get("heldout")
        names = train.class_names if wanted.class_names is None else wanted.class_names
        own_labels, class_names = classes_of_numbers(train.labels, names)
        if held is None:
            return cls((train,), own_labels, np.zeros(len(own_labels), bool), class_names)
        if held.layout != train.layout or (held.class_names or class_names) != class_names:
            raise MismatchError(
                f"{wanted.heldout}: expected the layout {train.layout} and the classes of {wanted.source}, found "
                f"{held.layout} and {'other' if held.layout == train.layout else 'perhaps other'} classes."
            )
        held_labels, _ = classes_of_numbers(held.labels, class_names)
        heldout = np.repeat([False, True], [len(own_labels), len(held_labels)])
        return cls((train, held), np.concatenate([own_labels, held_labels]), heldout, class_names)

    @property
    def layout(self) -> Layout:
        return self.parts[0].layout

    def pieces(self, rows: range) -> list[Piece]:
        """Return the pieces that hold some rows of the cache."""
        first = len(self.parts[0].labels)
        found = self.parts[0].pieces_of(range(rows.start, min(rows.stop, first))) if rows.start < first else []
        if rows.stop > first:
            found += self.parts[1].pieces_of(range(max(rows.start - first, 0), rows.stop - first))
        return found

    def shape(self) -> tuple[int, int, int, int]:
        """Return views, rows, columns and channels of the first row that can be read.

        Raises:
            ArtifactError: there is none among the first few.
        """
        problem = ""
        for row in range(min(len(self.labels), 16)):
            try:
                views, high, wide, channels = read_latents(self.layout, self.pieces(range(row, row + 1))[0]).shape[1:]
                return views, high, wide, channels
            except ArtifactError as error:
                problem = problem or str(error)
        raise ArtifactError(problem)


def _statistics_file(wanted: Import) -> Path | None:
    path = wanted.source / STATISTICS_NAME
    return path if wanted.factor is None and path.is_file() else None


def _calibration(wanted: Import, rows: _Rows, journal: Journal, progress: Progress) -> Calibration:
    """Return the recorded calibration, or the one that was asked for, which is recorded."""
    if journal.has(CALIBRATION):
        return Calibration.read(journal)
    distribution, channels = rows.parts[0].distribution, rows.shape()[-1]
    latent_channels = channels // 2 if distribution == "gaussian" else channels
    statistics = _statistics_file(wanted)
    if wanted.factor is not None:
        calibration = given_calibration(0.0, 1 / wanted.factor, latent_channels, distribution)
    elif statistics is not None:
        progress.say(f"normalising with {statistics}")
        calibration = given_calibration(*_read_statistics(statistics), latent_channels, distribution)
    else:
        calibration = measured_calibration(_measure(rows, channels, progress), distribution)
    calibration.record(journal)
    return calibration


def _read_statistics(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and standard deviation of LightningDiT's file, (C,) each.

    Raises:
        ArtifactError: it holds something else.
    """
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (tensors[name].float().flatten().numpy() for name in ("mean", "std"))
    except Exception as error:  # torch raises many types
        raise ArtifactError(f"{path}: expected tensors mean and std: {str(error).splitlines()[0]}") from error
    return mean, std


def _measure(rows: _Rows, channels: int, progress: Progress) -> Moments:
    """Return the moments of evenly spread training rows, original view."""
    training = np.flatnonzero(~rows.heldout)
    chosen = choose_evenly(training.tolist(), CALIBRATION_ROWS)
    progress.begin("calibrate", len(chosen), "rows")
    total = Moments.empty(channels)
    for row in chosen:
        try:
            values = read_latents(rows.layout, rows.pieces(range(row, row + 1))[0])[:, 0]
            if values.shape[-1] == channels and np.isfinite(values).all():
                total = total.merge(Moments.of(values))
        except ArtifactError:
            pass  # it becomes a reject
        progress.advance()
    return total


@dataclass(frozen=True)
class _WriteUnit:
    """Reads the latents of one unit, and writes its outer shard and its journal record."""

    layout: Layout
    store: FeatureStore
    calibration: Calibration

    def __call__(self, job: tuple[int, list[Piece]]) -> list[str]:
        """Return the reasons of the rejected rows."""
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
        write_unit(self.store, Journal(self.store.path), unit, values, rejects)
        return [f"{reject.tar}{reject.key and '/' + reject.key}: {reject.reason}" for reject in rejects]

    def _read(self, piece: Piece, shape: tuple[int, ...]) -> NDArray[np.float32]:
        values = read_latents(self.layout, piece)
        if values.shape[1:] != shape:
            raise ArtifactError(
                f"{piece}: expected {shape} (views, rows, columns, channels), found {values.shape[1:]}."
            )
        return values
