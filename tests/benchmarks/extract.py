"""How close an extraction comes to its encoder: end-to-end images/s against the bare encoder's.

    .venv/bin/python -m tests.benchmarks.extract [--images 256]

DINOv3 ViT-S/16+ at 256 pixels with both branches, random weights (speed does not depend on them), bfloat16, both
views, CPU or whatever GPU is there. The limit is the same encoder on the same images, decoded and in memory
beforehand, measured before and after the extraction in the same run. The extraction's rate counts from the first
unit encoded to the last one written, so that the start of Ray and of the workers is left out. Prints the bottleneck
table and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage
import torch
from PIL import Image

from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.recipe_files import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.pipeline.cluster import connected
from svgpipe.pipeline.tables import show_timings
from svgpipe.stages.extract.encoder_actor import EncodeUnits
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.runtime.runner import Resources
from svgpipe.stages.shard.from_folder import shard
from svgpipe.stages.train_autoencoder.stage import train_autoencoder

UNIT = 32
# An autoencoder of random weights, and a short calibration: speed does not depend on either.
UNTRAINED = [
    "autoencoder.backbone.weights=random",
    "autoencoder.perceptual.weight=0",
    "autoencoder.discriminator.enabled=false",
    "autoencoder.steps=0",
    "autoencoder.calibration_images=8",
    "autoencoder.eval_images=1",
    "extract.calibration_images=32",
    "extract.precision=bfloat16",
]
PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")


def write_images(folder: Path, count: int) -> Path:
    """JPEGs of about ImageNet's size, so that reading and decoding cost what they would."""
    rng = np.random.default_rng(0)
    data = Path(skimage.__file__).parent / "data"
    for name in PHOTOGRAPHS:
        (folder / Path(name).stem).mkdir(parents=True)
    for i in range(count):
        name = PHOTOGRAPHS[i % len(PHOTOGRAPHS)]
        with Image.open(data / name) as photograph:
            image = photograph.convert("RGB")
        left, top = (int(rng.integers(0, side // 4)) for side in image.size)
        crop = image.resize((500, 375), box=(left, top, left + image.width // 2, top + image.height // 2))
        crop.save(folder / Path(name).stem / f"{i:05d}.jpg", quality=90)
    return folder


def bare_rate(autoencoder: Path, recipe: Recipe, pixels: np.ndarray, resources: Resources) -> float:
    """Images/s of the encoder alone, over whole units as the extraction has them."""
    encoder = EncodeUnits(
        autoencoder,
        recipe.extract.batch_size,
        recipe.extract.precision,
        False,
        resources.threads,
        np.zeros(392, np.float32),
        np.ones(392, np.float32),
        recipe.extract.views,
    )
    encoder.encode(pixels[:UNIT])
    started = time.perf_counter()
    for start in range(0, len(pixels), UNIT):
        encoder.encode(pixels[start : start + UNIT])
    return len(pixels) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=256)
    count = parser.parse_args().images
    more = [f"extract.unit_rows={UNIT}", f"extract.batch_size={UNIT}"]
    recipe = load_recipe(None, [*UNTRAINED, *more])
    resources = Resources(gpus_per_worker=float(torch.cuda.is_available()))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shard(write_images(root / "images", count), root / "shards", recipe.shard)
        shards = ShardSet.open(root / "shards")
        train_autoencoder(shards, root / "autoencoder", recipe.autoencoder)
        half = range(0, len(shards), 2)
        pixels = load_images(shards, half, 256)
        before = bare_rate(root / "autoencoder", recipe, pixels, resources)
        with connected():
            manifest = extract(shards, root / "autoencoder", root / "cache", recipe.extract, resources=resources)
        after = bare_rate(root / "autoencoder", recipe, pixels, resources)
    show_timings(manifest.timings)
    steady, bare = manifest.timings["steady_images_per_s"], (before + after) / 2
    print(f"{'bare encoder, before':32}{before:8.2f} images/s")
    print(f"{'extraction, once under way':32}{steady:8.2f} images/s")
    print(f"{'bare encoder, after':32}{after:8.2f} images/s")
    print(json.dumps({"pipeline_over_encoder": round(steady / bare, 3)}))


if __name__ == "__main__":
    main()
