"""Exports the images of a finished evaluation for other evaluators.

npz/SETTING.npz             arr_0 (n,H,W,3) uint8 and arr_1 (n,) int64 labels, for the ADM evaluator
png/SETTING/00000000.png    one file per image, named by its number
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator

import numpy as np

from svgpipe.manifests.evaluation import EvaluationManifest
from svgpipe.manifests.filesystem import (
    ABANDONED_S,
    Location,
    file_size,
    make_directory,
    remove_partials,
    staged,
    write_atomic,
)

from ..images.decode import RGBArray
from ..images.image_set import ImageSet
from ..runtime.progress import Progress
from .decode_latents import decoded_images


def export_npz(evaluation: Location, progress: Progress) -> list[Location]:
    """Write an .npz of the samples of every setting. Complete files are kept.

    Returns:
        Paths of the files.
    """
    return [
        _write_npz(evaluation / "npz" / f"{name}.npz", images, progress) for name, images in _samples_of(evaluation)
    ]


def export_png(evaluation: Location, progress: Progress) -> list[Location]:
    """Write a folder of .png files of every setting, with the bytes in the tars. Complete files are kept.

    Returns:
        Paths of the folders.
    """
    folders: list[Location] = []
    for name, images in _samples_of(evaluation):
        folder = evaluation / "png" / name
        make_directory(folder)
        remove_partials(folder, idle_s=ABANDONED_S)
        progress.begin(f"png {name}", len(images), "images")
        for number, ref in enumerate(images.refs):
            path = folder / f"{number:08d}.png"
            if file_size(path) != ref.size:
                write_atomic(path, ref.read())
            progress.advance()
        folders.append(folder)
    return folders


def _samples_of(evaluation: Location) -> Iterator[tuple[str, ImageSet]]:
    for name in EvaluationManifest.read(evaluation).settings:
        yield name, decoded_images(evaluation, name)


def _is_whole(path: Location) -> bool:
    """Return whether the archive has its end, which a truncated one lacks."""
    if not path.exists():
        return False
    with path.open("rb") as file:
        return zipfile.is_zipfile(file)


def _write_npz(path: Location, images: ImageSet, progress: Progress) -> Location:
    """Write one image at a time: 50,000 of them are 9.8 GB.

    Returns:
        The path.
    """
    progress.begin(f"npz {path.stem}", len(images), "images")
    if _is_whole(path):
        progress.advance(len(images))
        return path
    make_directory(path.parent)
    remove_partials(path.parent, idle_s=ABANDONED_S)
    shape = (len(images), images.size, images.size, 3)
    with staged(path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for i in range(len(images)):
                pixels: RGBArray = images.pixels(i)
                file.write(pixels.tobytes())
                progress.advance()
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, images.labels)
    return path
