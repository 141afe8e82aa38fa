"""Writes sampled images: a sheet with captions, single files, or an archive."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location, children, make_directory, write_atomic

from ..images.decode import RGBArray, encode_png, tile

Form = Literal["sheet", "archive", "files"]
# Pixels: images on a sheet are enlarged to at least this side, with a strip of this height above for the caption.
MIN_SIDE, STRIP, MARGIN = 96, 18, 2
COLUMNS = 8
OTHER_FILES = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".zip", ".tar", ".html", ".pdf"}
FRAME_MS, LAST_MS = 120, 1500  # milliseconds of an animation


def form_of(out: Location) -> Form:
    """Return what is written at `out`: `.png` a sheet, `.npz` an archive, other names a folder of images.

    Raises:
        UsageError: the suffix of another kind of file.
    """
    suffix = out.suffix.lower()
    if suffix in OTHER_FILES:
        raise UsageError(f"--out {out}: expected NAME.png (a sheet), NAME.npz, or a folder for single images.")
    if suffix == ".png":
        return "sheet"
    return "archive" if suffix == ".npz" else "files"


def require_new(*targets: Location) -> None:
    """Check that nothing would be overwritten, and create the folder of the targets. An empty folder is no target yet.

    Raises:
        UsageError: something is there, or the folder cannot be made.
    """
    for target in targets:
        if target.exists() and not (target.is_dir() and not target.suffix and not children(target)):
            raise UsageError(f"--out: {target} is already there. Choose another name, or remove it.")
    try:
        make_directory(targets[0].parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise UsageError(f"--out {targets[0]}: {error.filename} is not a folder.") from error


def write_images(out: Location, images: RGBArray, labels: Sequence[int], names: Sequence[str]) -> None:
    """Write images (N,H,W,3) as `form_of` says; `labels` are N class numbers, `names` those of all classes.

    An archive has arr_0, the images, and arr_1, the labels (int64), as the ADM evaluator reads it.
    """
    form = form_of(out)
    if form == "files":
        make_directory(out)
        for number, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            name = re.sub(r"[^\w.-]+", "-", names[label])
            write_atomic(out / f"{number:05d}_{name}.png", encode_png(pixels))
        return
    if form == "sheet":
        write_atomic(out, encode_png(sheet(images, [names[label] for label in labels])))
        return
    buffer = io.BytesIO()
    np.savez(buffer, arr_0=images, arr_1=np.asarray(labels, np.int64))
    write_atomic(out, buffer.getvalue())


def sheet(images: RGBArray, captions: Sequence[str], columns: int = COLUMNS) -> RGBArray:
    """Return images (N,H,W,3) side by side, each with its caption above, as one picture (H',W',3)."""
    factor = -(-MIN_SIDE // images.shape[1])
    large = images.repeat(factor, axis=1).repeat(factor, axis=2)
    cells = [_with_caption(pixels, caption) for pixels, caption in zip(large, captions, strict=True)]
    return tile(np.stack(cells), min(columns, len(cells)))


def write_frames(out: Location, frames: Sequence[RGBArray]) -> None:
    """Write pictures (H,W,3) of one size as an animated WebP that loops, and rests at its last picture."""
    pictures = [Image.fromarray(frame) for frame in frames]
    durations = [FRAME_MS] * (len(frames) - 1) + [LAST_MS]
    buffer = io.BytesIO()
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:], duration=durations, loop=0, quality=90)
    write_atomic(out, buffer.getvalue())


def _with_caption(pixels: RGBArray, caption: str) -> RGBArray:
    height, width, _ = pixels.shape
    cell = Image.new("RGB", (width + 2 * MARGIN, height + STRIP + MARGIN), "white")
    draw, font = ImageDraw.Draw(cell), ImageFont.load_default(12)
    while draw.textlength(caption, font) > width and len(caption) > 1:
        caption = caption.removesuffix("…")[:-1] + "…"
    draw.text((MARGIN, 2), caption, fill="black", font=font)
    cell.paste(Image.fromarray(pixels), (MARGIN, STRIP))
    array: NDArray[np.uint8] = np.asarray(cell)
    return array
