"""Label maps in tars: KEY.seg.png and KEY.depth.npy beside the image of KEY."""

from __future__ import annotations

import functools
import io
import tarfile
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from svgpipe.manifests.dense_section import MapsSection
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import Location, read_range
from svgpipe.manifests.label_maps import DEPTH, SEGMENTATION, UNLABELLED

from ..images.decode import MAX_PIXELS
from ..images.tar_names import DEPTH_EXTENSION, SEGMENTATION_EXTENSION, printable, split_name

EXTENSIONS = {SEGMENTATION: SEGMENTATION_EXTENSION, DEPTH: DEPTH_EXTENSION}


class RejectedMapError(ArtifactError):
    """A map that cannot be used. The message is the reason in the records."""


@dataclass(frozen=True)
class MapMember:
    """Place of one map in its tar."""

    offset: int
    size: int


@functools.lru_cache(4)  # neighbouring units lie in the same tars
def members_of(tar: Location) -> dict[tuple[str, str], MapMember]:
    """Return the maps of a tar by key and name of the array.

    Raises:
        ArtifactError: the tar cannot be read.
    """
    names = {extension: name for name, extension in EXTENSIONS.items()}
    found: dict[tuple[str, str], MapMember] = {}
    try:
        with tar.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                key, extension = split_name(member.name)
                if member.isfile() and not member.issparse() and extension in names:
                    found[printable(key), names[extension]] = MapMember(member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ArtifactError(f"{tar}: cannot be read: {error}") from error
    return found


def read_map(tar: Location, member: MapMember, name: str, config: MapsSection) -> NDArray[np.generic]:
    """Return the whole map (H,W): uint16 class indexes, or float32 metres; see `LabelMaps`.

    Raises:
        RejectedMapError: it is not such a map.
    """
    data = read_range(tar, member.offset, member.size)
    if len(data) < member.size:
        raise RejectedMapError("truncated: its tar ends early")
    return _mask(data, config) if name == SEGMENTATION else _depth(data, config)


def _mask(data: bytes, config: MapsSection) -> NDArray[np.uint16]:
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.width * image.height > MAX_PIXELS:
            raise RejectedMapError(f"too large: {image.width}x{image.height} exceeds {MAX_PIXELS} pixels")
        numbers = np.asarray(image).astype(np.int64) // _scale(data)
    except UnidentifiedImageError as error:
        raise RejectedMapError("not a PNG image") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise RejectedMapError(f"not a readable PNG: {error}") from error
    if numbers.ndim != 2:
        raise RejectedMapError(f"expected a PNG of class numbers (grey or palette), found {image.mode}")
    unlabelled = (numbers < config.first_class) | np.isin(numbers, config.unlabelled)
    last = config.first_class + len(config.classes) - 1
    if (unknown := numbers[~unlabelled & (numbers > last)]).size:
        raise RejectedMapError(
            f"unknown class {unknown[0]}: expected {config.first_class} to {last}, or one of maps.unlabelled"
        )
    return np.where(unlabelled, UNLABELLED, numbers - config.first_class).astype(np.uint16)


def _scale(data: bytes) -> int:
    """Return what Pillow multiplies the numbers of a grey PNG of 2 or 4 bits by, so that white is 255; else 1."""
    bits, colour_type = data[24], data[25]  # of the IHDR block, which is the first
    return {2: 85, 4: 17}.get(bits, 1) if colour_type == 0 else 1


def _depth(data: bytes, config: MapsSection) -> NDArray[np.float32]:
    try:
        values = np.load(io.BytesIO(data), allow_pickle=False)
    except Exception as error:  # a damaged header can raise any error in its parser, or claim any size
        raise RejectedMapError(f"not a readable .npy file: {error}") from error
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind not in "fiu" or not values.size:
        raise RejectedMapError("expected an array of numbers (H,W)")
    assert config.depth_unit is not None
    metres = values.astype(np.float64) * config.depth_unit
    with np.errstate(invalid="ignore"):
        known = np.isfinite(metres) & (metres >= config.min_depth) & (metres <= config.max_depth)
    return np.where(known, metres, np.nan).astype(np.float32)


def centre_labels(labels: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    """Return (size,size) labels of the centred square of (H,W) labels: at the centres of equal cells.

    Labels are not averaged. Images are cropped to the same square (`centre_crop`), up to half a pixel.
    """
    height, width = labels.shape
    side = min(height, width)
    steps = ((np.arange(size) + 0.5) * side / size).astype(np.int64)
    return labels[np.ix_(steps + (height - side) // 2, steps + (width - side) // 2)]


def require_labels(labels: NDArray[np.generic], name: str, config: MapsSection) -> None:
    """Check that a map has a label in the centre crop.

    Raises:
        RejectedMapError: it has none.
    """
    if name == SEGMENTATION and (labels == UNLABELLED).all():
        raise RejectedMapError("no pixel of the centre crop has a class")
    if name == DEPTH and np.isnan(labels.astype(np.float64)).all():
        raise RejectedMapError(
            f"no depth of the centre crop is between {config.min_depth:g} and {config.max_depth:g} m with "
            f"maps.depth_unit {config.depth_unit:g}"
        )


def require_same_shape(labels: NDArray[np.generic], image_size: tuple[int, int]) -> None:
    """Check that a map shows the same field as its image of (width, height).

    Raises:
        RejectedMapError: its sides have another ratio, by more than rounding to whole pixels explains.
    """
    (height, width), (image_width, image_height) = labels.shape, image_size
    if 2 * abs(width * image_height - height * image_width) > max(image_width, image_height):
        raise RejectedMapError(f"its shape {width}x{height} is not that of its image, {image_width}x{image_height}")
