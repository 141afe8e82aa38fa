"""References in .npz files, as ADM publishes them: statistics of all real images, and some of the images.

mu (D,), sigma (D,D)        of pooled features
mu_s (D',), sigma_s (D',D') of spatial features, for sFID
arr_0 (n,H,W,3) uint8       images, for precision and recall
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.index import ImageRef, read_index, refs_of_table
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.shard_writer import TarImage, write_tar
from svgpipe.manifests.shards import shard_name
from svgpipe.models.feature_distances import FrechetTarget

from ..images.decode import RGBArray, encode_png
from ..runtime.device import pick_device
from ..runtime.progress import Progress

MEAN, COVARIANCE, EXTRACTOR, IMAGES = "mu", "sigma", "extractor", "arr_0"
SPATIAL = "_s"  # ending of the names of spatial statistics
PER_TAR = 500
ENCODERS = 8
UNREADABLE = (OSError, EOFError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D,D) of reference features, float64, read from a file."""

    mean: Tensor
    covariance: Tensor

    def target(self) -> FrechetTarget:
        """Return the Gaussian that sets are compared with, on the GPU if there is one."""
        device = pick_device()
        return FrechetTarget(self.mean.to(device), self.covariance.to(device))


@dataclass(frozen=True)
class StatisticsFile:
    """What an .npz holds. `extractor` names the network; files published by ADM do not, and are for Inception."""

    pooled: Statistics | None
    spatial: Statistics | None
    extractor: str | None
    num_images: int


def read_npz(path: Path) -> StatisticsFile:
    """Return everything but the images, whose shape is checked.

    Raises:
        ArtifactError: no such file, not readable, without statistics and images, or with impossible values.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: expected an .npz with {MEAN} and {COVARIANCE}, found no such file.")
    try:
        with np.load(path, allow_pickle=False) as archive:
            held = set(archive.files)
            names = [f"{name}{end}" for end in ("", SPATIAL) for name in (MEAN, COVARIANCE)]
            arrays = {name: _real(archive[name]) for name in names if name in held}
            extractor = str(archive[EXTRACTOR].item()) if EXTRACTOR in held else None
    except UNREADABLE as error:
        raise ArtifactError(f"{path}: not a readable .npz file: {error}") from error
    pooled, spatial = (_statistics(path, arrays, end) for end in ("", SPATIAL))
    count = _count(path) if IMAGES in held else 0
    if pooled is None and not count:
        found = ", ".join(sorted(held)) or "none"
        raise ArtifactError(f"{path}: expected arrays {MEAN} and {COVARIANCE}, or images in {IMAGES}, found {found}.")
    return StatisticsFile(pooled, spatial, extractor, count)


def _real(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise TypeError(f"expected real numbers, found {array.dtype}")
    return array.astype(np.float64)


def _statistics(path: Path, arrays: dict[str, np.ndarray], end: str) -> Statistics | None:
    """Return the statistics whose names end in `end`; None if there are none.

    Raises:
        ArtifactError: one of two is missing, or they are not a mean and a covariance.
    """
    mean, covariance = arrays.get(MEAN + end), arrays.get(COVARIANCE + end)
    if mean is None and covariance is None:
        return None
    names = f"{MEAN}{end}", f"{COVARIANCE}{end}"
    if mean is None or covariance is None:
        raise ArtifactError(f"{path}: expected arrays {' and '.join(names)}, found {', '.join(arrays)}.")
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)) or not len(mean):
        raise ArtifactError(
            f"{path}: expected {names[0]} (D,) and {names[1]} (D,D), found {mean.shape} and {covariance.shape}."
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ArtifactError(f"{path}: expected finite numbers, found others in {names[0]} or {names[1]}.")
    if not np.allclose(covariance, covariance.T, atol=1e-6 * np.abs(covariance).max()):
        raise ArtifactError(f"{path}: expected a covariance in {names[1]}, found a matrix that is not symmetric.")
    eigenvalues = np.linalg.eigvalsh(covariance)
    if eigenvalues[0] < -1e-3 * max(eigenvalues[-1], 0.0) or eigenvalues[-1] <= 0:
        raise ArtifactError(
            f"{path}: expected a covariance in {names[1]}, found a matrix with the eigenvalue {eigenvalues[0]:g}."
        )
    return Statistics(torch.from_numpy(mean), torch.from_numpy(covariance))


def _count(path: Path) -> int:
    """Return the number of images.

    Raises:
        ArtifactError: they are not (n,H,W,3) uint8.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
            shape, dtype = _header(file)
    except UNREADABLE as error:
        raise ArtifactError(f"{path}: not a readable .npz file: {error}") from error
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3:
        raise ArtifactError(f"{path}: expected images (n,H,W,3) uint8 in {IMAGES}, found {shape} {dtype}.")
    return shape[0]


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(file)
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, fortran, dtype = read(file)
    if fortran:
        raise ValueError(f"expected {IMAGES} in C order")
    return shape, dtype


def unpack_images(path: Path, sha256: str, kept: Location, progress: Progress | None = None) -> list[ImageRef]:
    """Write the images of an .npz as PNG into tars, once, so that they are read one by one like others.

    Args:
        path: a file that `read_npz` accepts.
        sha256: of the file.
        kept: directory for tars of several files.
        progress: receives the progress.

    Returns:
        The images, in order, with label 0.

    Raises:
        ArtifactError: the file is cut off or damaged.
    """
    out, count = kept / f"npz-{sha256[:16]}", _count(path)
    journal, units = Journal(out), range(-(-count // PER_TAR))
    missing = set(journal.missing(units))
    if progress is not None and missing:
        progress.begin("unpack reference", len(units), "tars", len(units) - len(missing))
    try:
        images = _images(path)
        for unit in units if missing else ():
            part = list(islice(images, PER_TAR))
            if unit in missing:
                _write(out, journal, unit, part)
                if progress is not None:
                    progress.advance()
    except UNREADABLE as error:
        raise ArtifactError(f"{path}: not a readable .npz file: {error}") from error
    tars = [out / shard_name(unit) for unit in units]
    return [ref for tar in tars for ref in refs_of_table(read_index(tar.with_suffix(".parquet"), None), tar)]


def _images(path: Path) -> Iterator[RGBArray]:
    """Return the images one after the other: an .npz of ADM has 2 GB.

    Yields:
        (H,W,3) uint8.

    Raises:
        EOFError: the array ends early.
    """
    with zipfile.ZipFile(path) as archive, archive.open(f"{IMAGES}.npy") as file:
        (count, *shape), _ = _header(file)
        size = int(np.prod(shape))
        for _ in range(count):
            data = file.read(size)
            if len(data) < size:
                raise EOFError(f"{IMAGES} is cut off")
            yield np.frombuffer(data, np.uint8).reshape(shape)


def _write(out: Location, journal: Journal, unit: int, images: list[RGBArray]) -> None:
    with ThreadPoolExecutor(ENCODERS) as encoders:
        encoded = encoders.map(encode_png, images)
        members = (TarImage(f"{unit * PER_TAR + i:08d}", data, "png", 0) for i, data in enumerate(encoded))
        shard = write_tar(out, shard_name(unit), members, "train")
    journal.record(unit, {"images": len(images)}, dict(shard.files))
