"""Latents in the files of other programs, located without reading them.

    safetensors  FOLDER/*.safetensors with latents (n,C,H,W), labels (n,) and, mostly, latents_flip (LightningDiT)
    mean-std     FOLDER or .zip with dataset.json and .npy files (2C,H,W): means, standard deviations (edm2, REPA)
    moments      FOLDER/CLASS/*.npz with moments (2C,H,W): means, log variances; and moments_flip (MAR)

Sources: extract_features.py and img_latent_dataset.py of LightningDiT, dataset_tool.py of edm2, dataset_tools.py of
REPA, engine_mar.py and util/loader.py of MAR.
"""

from __future__ import annotations

import functools
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors import safe_open

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.store_spec import Distribution

from ..images.folder import visible_files, visible_folders

Layout = Literal["safetensors", "mean-std", "moments"]
LABELS_FILE = "dataset.json"
MAX_LABEL = 10_000_000  # a larger number is taken for a mistake
EXPECTED = (
    "expected a folder of .safetensors files with latents and labels (LightningDiT), a folder or .zip of .npy files "
    f"with {LABELS_FILE} (edm2, REPA), or a folder of class folders of .npz files with moments (MAR)"
)


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of one file."""

    path: str  # of the file or of the .zip
    member: str | None  # of the .zip
    start: int
    stop: int

    def __str__(self) -> str:
        return self.path if self.member is None else f"{self.path}/{self.member}"


@dataclass(frozen=True)
class LatentFiles:
    """All latents of a source."""

    layout: Layout
    pieces: tuple[Piece, ...]  # in row order, none empty
    labels: NDArray[np.int64]  # (n,)
    class_names: list[str] | None  # None: the files have numbers only
    listing: list[object]  # name, size and modification time of every file, and labels beside them
    flips: bool = True  # False if a .safetensors file has none; other files are not opened here

    @property
    def distribution(self) -> Distribution:
        """Whether the files hold points or posteriors."""
        return "point" if self.layout == "safetensors" else "gaussian"

    @functools.cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(piece.stop - piece.start for piece in self.pieces)])

    def pieces_of(self, rows: range) -> list[Piece]:
        """Return the pieces that hold some rows."""
        first = int(np.searchsorted(self._starts, rows.start, side="right")) - 1
        found = []
        for number in range(first, len(self.pieces)):
            begin, end = int(self._starts[number]), int(self._starts[number + 1])
            if begin >= rows.stop:
                break
            piece, low, high = self.pieces[number], max(rows.start, begin), min(rows.stop, end)
            found.append(Piece(piece.path, piece.member, piece.start + low - begin, piece.start + high - begin))
        return found


def find_latents(source: Path) -> LatentFiles:
    """List the latents at `source` and read their labels. Hidden files are skipped.

    Returns:
        Files, labels and layout.

    Raises:
        UsageError: nothing is there, or no known layout.
        ArtifactError: a file of labels or a header is damaged, or an image has no label.
    """
    if not source.exists():
        raise UsageError(f"{source}: {EXPECTED}, found nothing there.")
    if source.is_file():
        return _mean_std_zip(source)
    if (source / LABELS_FILE).is_file():
        files = {path.relative_to(source).as_posix(): path for path in _files(source, ".npy")}
        labels = _labels_of_json((source / LABELS_FILE).read_bytes(), source / LABELS_FILE)
        pieces = {name: Piece(str(path), None, 0, 1) for name, path in files.items()}
        return _mean_std(source, pieces, labels, [_listed(path, source) for path in files.values()])
    if shards := sorted(path for path in _files(source, ".safetensors") if path.parent == source):
        return _safetensors(source, shards)
    return _moments(source)


def _files(folder: Path, suffix: str) -> list[Path]:
    return [Path(entry.path) for entry in visible_files(folder) if entry.name.endswith(suffix)]


def _listed(path: Path, source: Path) -> list[object]:
    name = path.relative_to(source).as_posix()
    try:
        status = path.stat()
    except OSError:  # a link that leads to nothing; it becomes a rejected row
        return [name, None, None]
    return [name, status.st_size, status.st_mtime_ns]


def _safetensors(source: Path, shards: Sequence[Path]) -> LatentFiles:
    pieces, labels, flips = [], [np.zeros(0, np.int64)], True
    for path in shards:
        own, has_flips = _labels_of_shard(path)
        flips = flips and has_flips
        if len(own):
            pieces.append(Piece(str(path), None, 0, len(own)))
            labels.append(own)
    listing: list[object] = [_listed(path, source) for path in shards]
    return LatentFiles("safetensors", tuple(pieces), np.concatenate(labels), None, listing, flips)


def _labels_of_shard(path: Path) -> tuple[NDArray[np.int64], bool]:
    """Return the labels (n,) of one file, which holds as many latents, and whether it holds flips.

    Raises:
        ArtifactError: it holds something else.
    """
    try:
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            missing = {"latents", "labels"} - names
            shape = [] if missing else file.get_slice("latents").get_shape()
            own = np.zeros(0) if missing else file.get_tensor("labels").ravel()
    except (safetensors.SafetensorError, OSError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path}: cannot be read: {error}") from error
    if missing:
        raise ArtifactError(f"{path}: expected latents and labels, found no {' and no '.join(sorted(missing))}.")
    if len(shape) != 4 or len(own) != shape[0]:
        raise ArtifactError(f"{path}: expected latents (n,C,H,W) and n labels, found {shape} and {len(own)}.")
    if not np.issubdtype(own.dtype, np.integer):
        raise ArtifactError(f"{path}: expected labels that are whole numbers, found {own.dtype}.")
    return own.astype(np.int64), "latents_flip" in names


def _mean_std_zip(source: Path) -> LatentFiles:
    try:
        with zipfile.ZipFile(source) as archive:
            members = archive.namelist()
            content = archive.read(LABELS_FILE) if LABELS_FILE in members else None
    except (zipfile.BadZipFile, OSError) as error:
        raise UsageError(f"{source}: {EXPECTED}, found a file that is not a whole .zip ({error}).") from error
    if content is None:
        inside = [name for name in members if name.endswith(f"/{LABELS_FILE}")]
        found = f"one with {inside[0]} inside; {LABELS_FILE} must not be in a folder" if inside else "one without it"
        raise UsageError(f"{source}: expected a .zip with {LABELS_FILE}, found {found}.")
    names = [name for name in members if name.endswith(".npy") and not _is_hidden(name)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ArtifactError(f"{source}: expected every member once, found {twice[0]} twice.")
    pieces = {name: Piece(str(source), name, 0, 1) for name in names}
    return _mean_std(
        source, pieces, _labels_of_json(content, f"{source}/{LABELS_FILE}"), [_listed(source, source.parent)]
    )


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _labels_of_json(content: bytes, where: object) -> dict[str, int] | None:
    """Return the labels by file name; None if the file says that there are none.

    Raises:
        ArtifactError: it holds something else.
    """
    try:
        labels: Any = json.loads(content)["labels"]
        pairs = None if labels is None else [(str(name), label) for name, label in labels]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ArtifactError(f'{where}: expected {{"labels": [[NAME, NUMBER], …]}}, found something else.') from error
    if pairs is None:
        return None
    found: dict[str, int] = {}
    for name, label in pairs:
        if isinstance(label, bool) or not isinstance(label, int) or not 0 <= label <= MAX_LABEL:
            raise ArtifactError(
                f"{where}: expected a class number from 0 to {MAX_LABEL} for {name}, found {repr(label)[:40]}."
            )
        if found.setdefault(name, label) != label:
            raise ArtifactError(f"{where}: gives {name} two labels, {found[name]} and {label}.")
    return found


def _mean_std(
    source: Path, pieces: dict[str, Piece], labels: dict[str, int] | None, listing: Sequence[object]
) -> LatentFiles:
    names = sorted(pieces)
    if not names:
        raise UsageError(f"{source}: {EXPECTED}, found {LABELS_FILE} and no .npy file.")
    if labels is not None:
        without = [name for name in names if name not in labels]
        absent = [name for name in labels if name not in pieces]
        if without or absent:
            what = f"no label of {without[0]}" if without else f"a label of {absent[0]}, which is not there"
            counts = f"{len(names)} files and {len(labels)} labels"
            raise ArtifactError(f"{source}: expected one label per file, found {what} ({counts}).")
    numbers = np.asarray([0 if labels is None else labels[name] for name in names], np.int64)
    listing = [*listing, None if labels is None else sorted(labels.items())]
    return LatentFiles("mean-std", tuple(pieces[name] for name in names), numbers, None, listing)


def _moments(source: Path) -> LatentFiles:
    files = sorted(_files(source, ".npz"))
    misplaced = [path for path in files if path.parent.parent != source]
    if misplaced or not files:
        found = f"{misplaced[0].relative_to(source)}, which is not in a class folder" if misplaced else "none of these"
        raise UsageError(f"{source}: {EXPECTED}, found {found}.")
    classes = sorted({path.parent.name for path in files})
    if empty := sorted(set(visible_folders(source)) - set(classes)):
        raise UsageError(f"{source}: expected .npz files in every class folder, found none in {empty[0]}.")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.asarray([numbers[path.parent.name] for path in files], np.int64)
    pieces = tuple(Piece(str(path), None, 0, 1) for path in files)
    return LatentFiles("moments", pieces, labels, classes, [_listed(path, source) for path in files])
