"""Decodes images; crops and other operations on 8-bit RGB images. All stages use it."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.index import ImageRef

RGBArray = NDArray[np.uint8]
# Pillow warns about odd metadata and about images that are rejected anyway. Ignored permanently, because
# `catch_warnings` changes the filters of all threads, and several threads decode at a time.
IGNORED_WARNINGS = r"PIL\.|svgpipe\.stages\.images\.decode$"
warnings.filterwarnings("ignore", module=IGNORED_WARNINGS)
# Colour profiles and texts of PNG files may be large. Pillow's limits, 1 MB and 64 MB, would reject good pixels.
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 1 << 26, 1 << 28
FORMATS = ("JPEG", "PNG", "WEBP")  # Pillow opens MPO, two pictures in one JPEG, as JPEG
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
MAX_ASPECT_RATIO = 100  # longer side / shorter side
ORIENTATION = 0x0112
# EXIF 2.32, table 5: how to turn the stored picture upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = {TURNS[5], TURNS[6], TURNS[7], TURNS[8]}
EXTENSIONS = {".jpg": "jpg", ".jpeg": "jpg", ".png": "png", ".webp": "webp"}


class RejectedImageError(ArtifactError):
    """An image that cannot be used. The message is the reason in the records."""


class DamagedImageError(RejectedImageError):
    """A JPEG that can be decoded, but not completely: a part of its pixels may be grey or wrong."""


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS, damaged: bool = False) -> Image.Image:
    """Decode to an upright 8-bit RGB image.

    EXIF orientation is applied. Transparency is composed over white. 16-bit grey is scaled, not clipped. CMYK, palette
    and grey are converted.

    Args:
        data: content of a JPEG, PNG or WebP file.
        max_pixels: larger images are rejected.
        damaged: decode what can be decoded of a damaged JPEG.

    Returns:
        The image.

    Raises:
        DamagedImageError: a JPEG is truncated or corrupt.
        RejectedImageError: empty, unreadable, truncated, animated, or larger than `max_pixels`.
    """
    with _rejecting():
        opened = _open(data, max_pixels)
        image = _decode_jpeg(data, opened, damaged) if opened.format in ("JPEG", "MPO") else opened
        image.load()
        image = _to_rgb(image)
        turn = _turn(opened)  # after `load`: for a PNG it would load the pixels itself, and hide that they are damaged
        return image if turn is None else image.transpose(turn)


def decode_or_keep(data: bytes, *, keep_damaged: bool, max_pixels: int = MAX_PIXELS) -> tuple[Image.Image, bool]:
    """Return the decoded image, and whether it is a damaged JPEG that was kept.

    Raises:
        DamagedImageError: a JPEG is damaged, and `keep_damaged` is not set.
        RejectedImageError: see `decode_image`.
    """
    try:
        return decode_image(data, max_pixels=max_pixels), False
    except DamagedImageError:
        if not keep_damaged:
            raise
    return decode_image(data, max_pixels=max_pixels, damaged=True), True


def _decode_jpeg(data: bytes, image: Image.Image, damaged: bool) -> Image.Image:
    """Decode with libjpeg-turbo. Pillow decodes corrupt data without an error if there is an end marker.

    Returns:
        The image as it is stored, not turned.

    Raises:
        DamagedImageError: libjpeg warns about the data.
    """
    cmyk = image.mode == "CMYK"  # converted by Pillow, which knows Adobe's inverted form
    try:
        pixels = simplejpeg.decode_jpeg(data, "CMYK" if cmyk else "RGB", strict=not damaged)
    except ValueError as error:
        if str(error).startswith("tjDecompressHeader"):  # unusual chroma subsampling, which only Pillow decodes
            return image
        raise DamagedImageError(f"damaged: {error}") from error
    return image if cmyk else Image.fromarray(pixels)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return how to turn an image upright by its EXIF orientation; None if unknown. Unreadable metadata is ignored.

    Pillow's exif_transpose is not used: it rewrites the metadata and fails if another entry is damaged.
    """
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged block can raise any error in its parser
        return None


def decode_member(ref: ImageRef) -> Image.Image:
    """Return a decoded image of an evaluation.

    Raises:
        ArtifactError: it cannot be decoded.
    """
    try:
        return decode_image(ref.read(), damaged=ref.damaged)
    except RejectedImageError as error:
        raise ArtifactError(
            f"{ref.tar}: {ref.key}: cannot be evaluated: {error}. Index with --decode, or remove the image."
        ) from error


def check_header(data: bytes, *, max_pixels: int = MAX_PIXELS) -> None:
    """Check everything that can be checked without decoding.

    Raises:
        RejectedImageError: see `decode_image`; damaged pixels are not found.
    """
    with _rejecting():
        _open(data, max_pixels)


def upright_size(data: bytes) -> tuple[int, int]:
    """Return (width, height) as `decode_image` would, without decoding.

    Raises:
        RejectedImageError: see `check_header`.
    """
    with _rejecting():
        image = _open(data, MAX_PIXELS)
        width, height = image.size
        return (height, width) if _turn(image) in SIDEWAYS else (width, height)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise RejectedImageError("empty file (0 bytes)")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > max_pixels:
        raise RejectedImageError(f"too large: {width}x{height} exceeds {max_pixels} pixels")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise RejectedImageError(
            f"too thin: {width}x{height} is over {MAX_ASPECT_RATIO}:1 and would explode when cropped"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # a phone's JPEG with a second picture: the first one is the photograph
        raise RejectedImageError(f"animated: {frames} frames")
    return image


@contextmanager
def _rejecting() -> Iterator[None]:
    """Convert Pillow's many errors to one.

    Yields:
        Nothing.

    Raises:
        RejectedImageError: Pillow raised an error.
    """
    try:
        yield
    except UnidentifiedImageError as error:
        raise RejectedImageError("not a JPEG, PNG or WebP image") from error
    except Image.DecompressionBombError as error:
        raise RejectedImageError(f"too large: {error}") from error
    except RejectedImageError:
        raise
    except Exception as error:  # a damaged header can raise any error in its parser
        raise RejectedImageError(f"undecodable: {error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        values = np.asarray(image).astype(np.float64)
        eight_bit = np.clip(values / 257.0 + 0.5, 0, 255).astype(np.uint8)
        eight_bit[values == image.info.get("transparency")] = 255
        return Image.fromarray(eight_bit, "L").convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def shrink_to(image: Image.Image, size: int) -> Image.Image:
    """Resize so that the short side is `size`: halve with BOX while it is at least 2*size, then one BICUBIC.

    Source: ADM's center_crop_arr, as used by the official code.

    Returns:
        The resized image.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)


CROP = "adm-centre-crop-1"  # part of the key of cached features: must change whenever a crop gives other pixels


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """Return the ADM centre crop: `shrink_to`, then the centre square (floor of half the surplus)."""
    image = shrink_to(image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(image: Image.Image, size: int, rng: np.random.Generator) -> Image.Image:
    """Return a random crop: `shrink_to`, then a square at a uniformly random position."""
    image = shrink_to(image, size)
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    return image.crop((left, top, left + size, top + size))


def to_array(image: Image.Image) -> RGBArray:
    """Return (H,W,3) uint8."""
    return np.array(image, dtype=np.uint8)


def encode_png(pixels: RGBArray) -> bytes:
    """Return (H,W,3) uint8 as PNG, always the same bytes for the same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def tile(pixels: RGBArray, columns: int) -> RGBArray:
    """Return (N,H,W,3) uint8 as one (rows*H, columns*W, 3) picture, row by row; missing cells are white."""
    n, height, width, _ = pixels.shape
    rows = -(-n // columns)
    sheet = np.full((rows * height, columns * width, 3), 255, np.uint8)
    for i, picture in enumerate(pixels):
        row, column = divmod(i, columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = picture
    return sheet


def psnr(expected: RGBArray, found: RGBArray) -> NDArray[np.float64]:
    """Return (N,) dB of 8-bit images: 10 log10(255² / MSE); infinite if equal."""
    error = (expected.astype(np.float64) - found.astype(np.float64)) ** 2
    with np.errstate(divide="ignore"):
        values: NDArray[np.float64] = 10 * np.log10(255.0**2 / error.mean(axis=(1, 2, 3)))
    return values
