"""The demo's data: crops of the colour photographs that scikit-image ships in its wheel."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from svgpipe.manifests.errors import ArtifactError

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
SMALLEST_CROP = 0.6  # of the short side: large enough that a crop still shows what is photographed


def write_photographs(folder: Path) -> Path:
    """Write `folder`/CLASS/NUMBER.png, the same pixels every time; a finished folder is left alone.

    Raises:
        ArtifactError: scikit-image is not installed.
    """
    if folder.exists():
        return folder
    try:
        import skimage
    except ImportError as error:
        raise ArtifactError(
            "the demo's photographs come with scikit-image, which is not installed. "
            'Install it with `pip install "svgpipe[demo]"`.'
        ) from error
    source = Path(skimage.__file__).parent / "data"
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for number, (name, file) in enumerate(PHOTOGRAPHS.items()):
        (partial / name).mkdir(parents=True)
        with Image.open(source / file) as photograph:
            image = photograph.convert("RGB")
        rng = np.random.default_rng(number)
        for i in range(CROPS_PER_PHOTOGRAPH):
            side = int(min(image.size) * rng.uniform(SMALLEST_CROP, 1.0))
            left = int(rng.integers(image.width - side + 1))
            top = int(rng.integers(image.height - side + 1))
            box = (left, top, left + side, top + side)
            crop = image.resize((CROP_SIZE, CROP_SIZE), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
            crop.save(partial / name / f"{i:04d}.png")
    partial.rename(folder)
    return folder
