"""Latents in the files of other programs, located without reading them.

    safetensors  FOLDER/*.safetensors with latents (n,C,H,W), labels (n,) and, mostly, latents_flip (LightningDiT)
    mean-std     FOLDER or .zip with dataset.json and .npy files (2C,H,W): means, standard deviations (edm2, REPA)
    moments      FOLDER/CLASS/*.npz with moments (2C,H,W): means, log variances; and moments_flip (MAR)

Sources: extract_features.py and img_latent_dataset.py of LightningDiT, dataset_tool.py of edm2, dataset_tools.py of
REPA, engine_mar.py and util/loader.py of MAR.
"""

from __future__ import annotations

import functools
import io
import json
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors import safe_open

from svgpipe.manifests.cache_manifest import Distribution
from svgpipe.manifests.errors import ArtifactError, UsageError

from ..images.folder import visible_files

Layout = Literal["safetensors", "mean-std", "moments"]
LABELS_FILE = "dataset.json"
# Limits of a log variance in the official code, distributions.py of latent-diffusion.
LOG_VARIANCE_RANGE = (-30.0, 20.0)
EXPECTED = (
    "expected a folder of .safetensors files with latents and labels (LightningDiT), a folder or .zip of .npy files "
    f"with {LABELS_FILE} (edm2, REPA), or class folders of .npz files with moments (MAR)"
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
    pieces: tuple[Piece, ...]  # in row order
    labels: NDArray[np.int64]  # (n,)
    class_names: list[str] | None  # None: the files have numbers only
    listing: list[list[object]]  # name, size and modification time of every file

    @property
    def distribution(self) -> Distribution:
        """Whether the files hold points or posteriors."""
        return "point" if self.layout == "safetensors" else "gaussian"

    @functools.cached_property
    def _starts(self) -> NDArray[np.int64]:
        return np.cumsum([0, *(piece.stop - piece.start for piece in self.pieces)])

    def pieces_of(self, rows: range) -> list[Piece]:
        """Return the pieces that hold some rows."""
        starts = self._starts
        first = int(np.searchsorted(starts, rows.start, side="right")) - 1
        found = []
        for number in range(first, len(self.pieces)):
            low, high = max(rows.start, int(starts[number])), min(rows.stop, int(starts[number + 1]))
            if low >= high:
                break
            piece, offset = self.pieces[number], int(starts[number])
            begin = piece.start - offset
            found.append(Piece(piece.path, piece.member, low + begin, high + begin))
        return found


def find_latents(source: Path) -> LatentFiles:
    """List the latents at `source` and read their labels.

    Returns:
        Files, labels and layout.

    Raises:
        UsageError: nothing is there, or no known layout.
        ArtifactError: a file is damaged, or an image has no label.
    """
    if not source.exists():
        raise UsageError(f"{source}: {EXPECTED}, found nothing there.")
    if source.is_file():
        return _mean_std_zip(source)
    if (source / LABELS_FILE).exists():
        files = {path.relative_to(source).as_posix(): path for path in _files(source, ".npy")}
        labels = _labels_of_json((source / LABELS_FILE).read_bytes(), source / LABELS_FILE)
        pieces = {name: Piece(str(path), None, 0, 1) for name, path in files.items()}
        return _mean_std(source, pieces, labels, [_listed(path, source) for path in files.values()])
    if shards := sorted(source.glob("*.safetensors")):
        return _safetensors(source, shards)
    return _moments(source)


def _files(folder: Path, suffix: str) -> Iterator[Path]:
    return (Path(entry.path) for entry in visible_files(folder) if entry.name.endswith(suffix))


def _listed(path: Path, source: Path) -> list[object]:
    stat = path.stat()
    return [path.relative_to(source).as_posix(), stat.st_size, stat.st_mtime_ns]


def _safetensors(source: Path, shards: Sequence[Path]) -> LatentFiles:
    pieces, labels = [], []
    for path in shards:
        try:
            with safe_open(path, framework="np") as file:
                missing = {"latents", "labels"} - set(file.keys())
                if missing:
                    raise ArtifactError(f"{path}: expected latents and labels, found no {' and no '.join(missing)}.")
                own = file.get_tensor("labels").ravel()
                count = file.get_slice("latents").get_shape()[0]
        except (safetensors.SafetensorError, OSError) as error:
            raise ArtifactError(f"{path}: cannot be read: {error}") from error
        if len(own) != count:
            raise ArtifactError(f"{path}: expected one label per latent, found {len(own)} for {count}.")
        pieces.append(Piece(str(path), None, 0, count))
        labels.append(own.astype(np.int64))
    listing = [_listed(path, source) for path in shards]
    return LatentFiles("safetensors", tuple(pieces), np.concatenate(labels), None, listing)


def _mean_std_zip(source: Path) -> LatentFiles:
    try:
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if name.endswith(".npy")]
            where = f"{source}/{LABELS_FILE}"
            if LABELS_FILE not in archive.namelist():
                raise UsageError(f"{source}: {EXPECTED}, found a .zip without {LABELS_FILE}.")
            labels = _labels_of_json(archive.read(LABELS_FILE), where)
    except (zipfile.BadZipFile, OSError) as error:
        raise UsageError(f"{source}: {EXPECTED}, found another file ({error}).") from error
    pieces = {name: Piece(str(source), name, 0, 1) for name in names}
    return _mean_std(source, pieces, labels, [_listed(source, source.parent)])


def _labels_of_json(content: bytes, where: object) -> dict[str, int]:
    """Return the labels by file name; 0 for all, under the name '', if the file says that there are none.

    Raises:
        ArtifactError: it holds something else.
    """
    try:
        labels: Any = json.loads(content)["labels"]
        if labels is None:
            return {"": 0}
        found = {str(name): label for name, label in labels}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f'{where}: expected {{"labels": [[NAME, NUMBER], …]}}, found something else.') from error
    for name, label in found.items():
        if isinstance(label, bool) or not isinstance(label, int):
            raise ArtifactError(f"{where}: expected a class number for {name}, found {repr(label)[:40]}.")
    return found


def _mean_std(
    source: Path, pieces: dict[str, Piece], labels: dict[str, int], listing: list[list[object]]
) -> LatentFiles:
    names = sorted(pieces)
    if not names:
        raise UsageError(f"{source}: {EXPECTED}, found {LABELS_FILE} and no .npy file.")
    if labels != {"": 0}:
        without = [name for name in names if name not in labels]
        absent = [name for name in labels if name not in pieces]
        if without or absent:
            what = f"no label of {without[0]}" if without else f"a label of {absent[0]}, which is not there"
            raise ArtifactError(f"{source}: expected one label per file, found {what} ({len(without + absent)} such).")
    numbers = np.asarray([labels.get(name, 0) for name in names], np.int64)
    listing = [*listing, list(labels.items())]
    return LatentFiles("mean-std", tuple(pieces[name] for name in names), numbers, None, listing)


def _moments(source: Path) -> LatentFiles:
    files = sorted(_files(source, ".npz"))
    classes = sorted({path.relative_to(source).parts[0] for path in files if path.parent != source})
    loose = [path for path in files if path.parent == source]
    if loose or not files:
        found = f"{loose[0].name} outside class folders" if loose else "none of these"
        raise UsageError(f"{source}: {EXPECTED}, found {found}.")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = np.asarray([numbers[path.relative_to(source).parts[0]] for path in files], np.int64)
    pieces = tuple(Piece(str(path), None, 0, 1) for path in files)
    return LatentFiles("moments", pieces, labels, classes, [_listed(path, source) for path in files])


def read_latents(layout: Layout, piece: Piece) -> NDArray[np.float32]:
    """Return the latents of a piece, (n, views, row, column, channel) float32; of posteriors, means and deviations.

    Raises:
        ArtifactError: the file is damaged or holds something else.
    """
    try:
        views = list(_views(layout, piece))
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ArtifactError(f"{piece}: cannot be read: {error}") from error
    values = np.stack(views, axis=1)
    if values.ndim != 5 or (layout != "safetensors" and values.shape[2] % 2):
        raise ArtifactError(f"{piece}: expected latents (n,C,H,W), found {values.shape[:1] + values.shape[2:]}.")
    if layout == "moments":
        half = values.shape[2] // 2
        values[:, :, half:] = np.exp(0.5 * np.clip(values[:, :, half:], *LOG_VARIANCE_RANGE))
    return np.ascontiguousarray(np.moveaxis(values, 2, -1))


@functools.lru_cache(maxsize=1)
def _opened_zip(path: str, modified_ns: int) -> zipfile.ZipFile:
    del modified_ns  # a replaced file is opened again
    return zipfile.ZipFile(path)


def _views(layout: Layout, piece: Piece) -> Iterator[NDArray[np.float32]]:
    """Yield the original and, if there is one, the flipped view, (n,C,H,W)."""
    if layout == "safetensors":
        with safe_open(piece.path, framework="pt") as file:  # NumPy has no bfloat16
            for name in [name for name in ("latents", "latents_flip") if name in set(file.keys())]:
                yield file.get_slice(name)[piece.start : piece.stop].float().numpy()
        return
    content: Any = piece.path
    if piece.member is not None:
        archive = _opened_zip(piece.path, Path(piece.path).stat().st_mtime_ns)
        content = io.BytesIO(archive.read(piece.member))
    loaded = np.load(content, allow_pickle=False)
    if layout == "mean-std":
        yield loaded[None].astype(np.float32)
        return
    with loaded:
        for name in ("moments", "moments_flip"):
            if name in loaded:
                yield loaded[name][None].astype(np.float32)
