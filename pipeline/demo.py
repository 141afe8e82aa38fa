"""The images of the demo: crops of colour photographs in the wheel of scikit-image."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

PHOTOGRAPHS = {
    "astronaut": "astronaut.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "galaxies": "hubble_deep_field.jpg",
    "motorcycle": "motorcycle_left.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "tissue": "ihc.png",
}
CROPS_PER_PHOTOGRAPH = 200
CROP_SIZE = 128
# Crops are near the centre of the photograph, slightly shifted and scaled. Eight photographs and some minutes of
# training give recognisable samples.
MIN_CROP = 0.8  # of the short side
MAX_SHIFT = 0.1  # of the short side, in each direction


def write_photographs(folder: Path) -> Path:
    """Write `folder`/CLASS/NUMBER.png, the same pixels every time. An existing folder is kept.

    Returns:
        The folder.
    """
    if folder.exists():
        return folder
    source = Path(skimage.__file__).parent / "data"
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, (name, file) in enumerate(PHOTOGRAPHS.items()):
        (partial / name).mkdir(parents=True)
        with Image.open(source / file) as photograph:
            image = photograph.convert("RGB")
        rng = np.random.default_rng(number)
        for i, box in enumerate(_crop_boxes(image.size, rng)):
            crop = image.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
            crop.save(partial / name / f"{i:04d}.png")
    partial.rename(folder)
    return folder


def _crop_boxes(size: tuple[int, int], rng: np.random.Generator) -> list[tuple[int, int, int, int]]:
    """Return different boxes, so that no held-out crop is also a training crop."""
    boxes: dict[tuple[int, int, int, int], None] = {}
    while len(boxes) < CROPS_PER_PHOTOGRAPH:
        boxes[_crop_box(size, rng)] = None
    return list(boxes)


def _crop_box(size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a square crop inside an image of `size`."""
    short = min(size)
    side = int(short * rng.uniform(MIN_CROP, 1.0))
    shifts = rng.uniform(-MAX_SHIFT, MAX_SHIFT, 2) * short
    left, top = (
        int(np.clip((full - side) / 2 + shift, 0, full - side)) for full, shift in zip(size, shifts, strict=True)
    )
    return left, top, left + side, top + side
