"""Fashion-MNIST as class folders of PNG files, for `svgpipe study small`.

    sudo apt-get install dataset-fashion-mnist
    .venv/bin/python -m tests.benchmarks.fashion_mnist runs/fashion-mnist [--per-class N]

Debian's package holds 60,000 training and 10,000 test images of 28x28 pixels (MIT licence). They are padded to 32x32
with the black of their background, and written to FOLDER/train/CLASS and FOLDER/test/CLASS.
"""

from __future__ import annotations

import argparse
import gzip
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

DATA = Path("/usr/share/datasets/fashion-mnist")
CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
SPLITS = {"train": "train", "test": "t10k"}
PADDING = 2


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Return the array of an IDX file of bytes."""
    data = gzip.decompress(path.read_bytes())
    axes = data[3]
    shape = np.frombuffer(data, ">i4", axes, 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def write(folder: Path, per_class: int | None = None) -> None:
    """Write the images; `per_class`: only the first ones of every class."""
    for split, prefix in SPLITS.items():
        images, labels = (read_idx(DATA / f"{prefix}-{kind}-ubyte.gz") for kind in ("images-idx3", "labels-idx1"))
        for label, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for number in np.flatnonzero(labels == label)[:per_class]:
                padded = np.pad(images[number], PADDING)
                Image.fromarray(padded).save(folder / split / name / f"{number:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int)
    arguments = parser.parse_args()
    if not DATA.exists():
        parser.error(f"{DATA} is missing: install Debian's package dataset-fashion-mnist")
    write(arguments.folder, arguments.per_class)


if __name__ == "__main__":
    main()
