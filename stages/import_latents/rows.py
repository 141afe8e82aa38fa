"""All rows of an import, and their normalisation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.cache_creation import CALIBRATION_ROWS, classes_of_numbers
from svgpipe.manifests.calibration import Calibration, given_calibration, measured_calibration, usable
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError, first_line
from svgpipe.manifests.moments import Moments
from svgpipe.manifests.selection import choose_evenly

from ..runtime.progress import Progress
from .files import LatentFiles, Layout, Piece
from .reader import read_latents

# Rows that are read to find the shape of the latents.
LOOKED_AT = 64


def _named(files: LatentFiles, names: Sequence[str] | None) -> tuple[LatentFiles, Sequence[str] | None]:
    """Return the files with labels that are positions in `names`, and the names in label order.

    A class folder has the whole name or its first word, a synset. Numbers are positions already.

    Raises:
        UsageError: a class folder is none of the names.
    """
    if files.class_names is None or names is None:
        return files, names or files.class_names
    places = {form: number for number, name in enumerate(names) for form in (name.partition(" ")[0], name)}
    if unknown := [name for name in files.class_names if name not in places]:
        raise UsageError(
            f"class names: expected the name of every class folder, found none for {unknown[0]}. A line may be "
            f"`{unknown[0]} ANOTHER NAME`. Without --class-names, the folders' names are the classes."
        )
    numbers = np.asarray([places[name] for name in files.class_names], np.int64)
    return replace(files, labels=numbers[files.labels]), names


@dataclass(frozen=True)
class Rows:
    """Training rows, then held-out rows."""

    parts: tuple[LatentFiles, ...]
    labels: NDArray[np.int32]
    heldout: NDArray[np.bool_]
    class_names: list[str]

    @classmethod
    def of(cls, files: dict[str, LatentFiles], class_names: Sequence[str] | None) -> Rows:
        """Combine `latents` and, if there are any, `heldout` files.

        Returns:
            All rows.

        Raises:
            UsageError: a label has no class, or both are the same files.
            MismatchError: held-out files of another layout or class.
        """
        train, held = files["latents"], files.get("heldout")
        train, names = _named(train, class_names)
        labels, names = classes_of_numbers(train.labels, names)
        if held is None:
            return cls((train,), labels, np.zeros(len(labels), bool), names)
        if held.listing == train.listing:
            raise UsageError("--heldout: expected other latents than those for training, found the same files.")
        if held.layout != train.layout:
            raise MismatchError(f"--heldout: expected the layout {train.layout}, found {held.layout}.")
        if unknown := sorted(set(held.class_names or ()) - set(train.class_names or held.class_names or ())):
            raise MismatchError(f"--heldout: expected the class folders of the training latents, found {unknown[0]}.")
        held, _ = _named(held, names)
        held_labels, _ = classes_of_numbers(held.labels, names)
        heldout = np.repeat([False, True], [len(labels), len(held_labels)])
        return cls((train, held), np.concatenate([labels, held_labels]), heldout, names)

    @property
    def layout(self) -> Layout:
        """Layout of the files."""
        return self.parts[0].layout

    def pieces(self, rows: range) -> list[Piece]:
        """Return the pieces that hold some rows of the cache."""
        first = len(self.parts[0].labels)
        found = self.parts[0].pieces_of(range(rows.start, min(rows.stop, first))) if rows.start < first else []
        if rows.stop > first:
            found += self.parts[1].pieces_of(range(max(rows.start - first, 0), rows.stop - first))
        return found

    def read(self, row: int) -> NDArray[np.float32]:
        """Return one row, (1, views, row, column, channel). Raises the error of `read_latents`."""
        return read_latents(self.layout, self.pieces(range(row, row + 1))[0])

    def require_others(self) -> None:
        """Check that the held-out latents are no copy of those for training, by rows at equal positions.

        Raises:
            UsageError: they are.
        """
        first = int((~self.heldout).sum())
        count = len(self.labels) - first
        places = [place for place in choose_evenly(range(count), LOOKED_AT) if place < first]
        if places and all(self._equal(place, first + place) for place in places):
            raise UsageError("--heldout: expected other latents than those for training, found a copy of them.")

    def _equal(self, one: int, two: int) -> bool:
        try:
            return np.array_equal(self.read(one), self.read(two), equal_nan=True)
        except ArtifactError:  # counted as a reject later
            return False

    def shape(self) -> tuple[int, int, int, int]:
        """Return views, rows, columns and channels: the most frequent shape, and the views that all have.

        Raises:
            ArtifactError: no row that is looked at can be read.
        """
        problem, shapes = "", []
        for row in choose_evenly(range(len(self.labels)), LOOKED_AT):
            try:
                shapes.append(self.read(row).shape[1:])
            except ArtifactError as error:
                problem = problem or str(error)
        if not shapes:
            raise ArtifactError(f"none of {min(len(self.labels), LOOKED_AT)} rows can be read. {problem}")
        high, wide, channels = Counter(shape[1:] for shape in shapes).most_common(1)[0][0]
        views = min(shape[0] for shape in shapes) if all(part.flips for part in self.parts) else 1
        return views, high, wide, channels


def calibrate(
    rows: Rows, channels: int, factor: float | None, statistics: Path | None, progress: Progress
) -> Calibration:
    """Return the normalisation of rows with (…, channels): by a factor, by the statistics in a file, or measured.

    Raises:
        UsageError: the factor is out of range.
        ArtifactError: the file holds something else, or no row can be read.
    """
    distribution = rows.parts[0].distribution
    latent_channels = channels // 2 if distribution == "gaussian" else channels
    if factor is not None:
        try:
            return given_calibration(0.0, 1 / factor, latent_channels, distribution)
        except UsageError as error:
            raise UsageError(f"--factor {factor}: too small or too large.") from error
    if statistics is None:
        return measured_calibration(_measure(rows, channels, progress), distribution)
    progress.say(f"normalising with {statistics}")
    try:
        return given_calibration(*_read_statistics(statistics), latent_channels, distribution)
    except UsageError as error:
        raise ArtifactError(f"{statistics}: {error}") from error


def _read_statistics(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and standard deviation of LightningDiT's file, (C,) each.

    Raises:
        ArtifactError: it holds something else.
    """
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        mean, std = (tensors[name].float().flatten().numpy() for name in ("mean", "std"))
    except Exception as error:  # torch raises many types
        raise ArtifactError(
            f"{path}: expected tensors mean and std, found something else ({first_line(error)})."
        ) from error
    return mean, std


def _measure(rows: Rows, channels: int, progress: Progress) -> Moments:
    """Return the moments of evenly spread training rows, original view. Rows that will be rejected do not count.

    Raises:
        ArtifactError: fewer than half of the rows can be read.
    """
    chosen = choose_evenly(np.flatnonzero(~rows.heldout).tolist(), CALIBRATION_ROWS)
    progress.begin("calibrate", len(chosen), "rows")
    total, bad, problem = Moments.empty(channels), 0, "another shape, or values that are not finite"
    for row in chosen:
        try:
            values = rows.read(row)[:, 0]
            if values.shape[-1] != channels or not usable(values).all():
                bad += 1
            else:
                total = total.merge(Moments.of(values))
        except ArtifactError as error:
            bad, problem = bad + 1, str(error)
        progress.advance()
    if 2 * bad > len(chosen):
        raise ArtifactError(f"{bad} of {len(chosen)} calibration rows cannot be used ({problem}).")
    if bad:
        progress.say(f"warning: {bad} of {len(chosen)} calibration rows cannot be used ({problem})")
    return total
