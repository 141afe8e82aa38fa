"""Reads the latents of one file of another program, see files.py."""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from svgpipe.manifests.errors import ArtifactError, first_line

from .files import Layout, Piece

VIEWS = {"safetensors": ("latents", "latents_flip"), "moments": ("moments", "moments_flip")}
# Limits of a log variance in the official code, distributions.py of latent-diffusion.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


def read_latents(layout: Layout, piece: Piece) -> NDArray[np.float32]:
    """Return the latents of a piece, (n, views, row, column, channel) float32; of posteriors, means and deviations.

    Raises:
        ArtifactError: the file is damaged or holds something else.
    """
    try:
        values = np.stack(list(_views(layout, piece)), axis=1)
    except ArtifactError:
        raise
    except Exception as error:  # zip, npy and safetensors raise some fifteen types for damaged files
        raise ArtifactError(f"{piece}: cannot be read: {_without_advice(error)}") from error
    if values.ndim != 5 or 0 in values.shape or (layout != "safetensors" and values.shape[2] % 2):
        raise ArtifactError(f"{piece}: expected latents (C,H,W), found {values.shape[2:]}.")
    if layout != "safetensors":
        half = values.shape[2] // 2
        if layout == "moments":
            values[:, :, half:] = np.exp(0.5 * np.clip(values[:, :, half:], *LOG_VARIANCE_RANGE))
        if (values[:, :, half:] < 0).any():
            raise ArtifactError(f"{piece}: a standard deviation is negative.")
    return np.ascontiguousarray(np.moveaxis(values, 2, -1))


def _without_advice(error: Exception) -> str:
    """Return the first line of an error. NumPy advises to unpickle files that are no arrays."""
    return "it is not a plain array" if "pickle" in str(error) else first_line(error)


def _views(layout: Layout, piece: Piece) -> Iterator[NDArray[np.float32]]:
    """Yield the original and, if there is one, the flipped view, (n,C,H,W).

    Raises:
        ArtifactError: there are no moments.
    """
    if layout == "safetensors":
        yield from _views_of_shard(piece)
        return
    content: Any = piece.path
    if piece.member is not None:
        archive = _opened_zip(piece.path, Path(piece.path).stat().st_mtime_ns)
        content = io.BytesIO(archive.read(piece.member))
    loaded = np.load(content, allow_pickle=False)
    if layout == "mean-std":
        yield _real(loaded, piece)[None]
        return
    if not isinstance(loaded, np.lib.npyio.NpzFile) or VIEWS[layout][0] not in loaded:
        raise ArtifactError(f"{piece}: expected an .npz with moments, found no such array.")
    with loaded:
        yield from (_real(loaded[name], piece)[None] for name in VIEWS[layout] if name in loaded)


def _views_of_shard(piece: Piece) -> Iterator[NDArray[np.float32]]:
    with safe_open(piece.path, framework="np") as file:
        names = [name for name in VIEWS["safetensors"] if name in set(file.keys())]
        kinds = {str(file.get_slice(name).get_dtype()) for name in names}
    # NumPy has no bfloat16 and no float8. torch is only loaded for these.
    with safe_open(piece.path, framework="np" if kinds <= {"F16", "F32", "F64"} else "pt") as file:
        for name in names:
            part = file.get_slice(name)[piece.start : piece.stop]
            yield _real(part if isinstance(part, np.ndarray) else part.float().numpy(), piece)


def _real(values: NDArray[Any], piece: Piece) -> NDArray[np.float32]:
    if values.dtype.kind not in "fiu":
        raise ArtifactError(f"{piece}: expected real numbers, found {values.dtype}.")
    return values.astype(np.float32)


@functools.lru_cache(maxsize=1)
def _opened_zip(path: str, modified_ns: int) -> zipfile.ZipFile:
    del modified_ns  # a replaced file is opened again
    return zipfile.ZipFile(path)
