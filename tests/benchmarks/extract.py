"""Rate of an extraction relative to its encoder: end-to-end images/s against images/s of the encoder alone.

    .venv/bin/python -m tests.benchmarks.extract [--images 128] [--turns 3]

DINOv3 ViT-S/16+ at 256 pixels with both branches, random weights (they do not change the speed), bfloat16, both views,
on the GPU if there is one. The limit is the same encoder on the same images, decoded in memory beforehand. It is
measured before and after each extraction. Each turn runs one extraction in this process (local) and one on Ray. The
rate counts from the first encoded unit to the last written one, without the start of Ray and of the workers. A ratio is
the median over the turns, each against the mean of the two measurements around it. Prints the bottleneck tables of the
last turn and, as the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import skimage
from PIL import Image

from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.pipeline.cluster import connected
from svgpipe.pipeline.tables import show_timings
from svgpipe.stages.extract.encoder_actor import EncoderOptions, EncodeUnits
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.runtime.device import pick_device
from svgpipe.stages.runtime.ray_runner import RayRunner
from svgpipe.stages.runtime.runner import LocalRunner
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.shard.scan import ImageSources
from svgpipe.stages.train_autoencoder.stage import train_autoencoder

UNIT = 32
# Random weights and a short calibration: neither changes the speed.
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
    """JPEGs of about the size of ImageNet's, so that reading and decoding cost as much."""
    rng = np.random.default_rng(0)
    data = Path(skimage.__file__).parent / "data"
    images = []
    for name in PHOTOGRAPHS:
        (folder / Path(name).stem).mkdir(parents=True)
        with Image.open(data / name) as photograph:
            images.append(photograph.convert("RGB"))
    for i in range(count):
        name, image = PHOTOGRAPHS[i % len(PHOTOGRAPHS)], images[i % len(PHOTOGRAPHS)]
        left, top = (int(rng.integers(0, side // 4)) for side in image.size)
        crop = image.resize((500, 375), box=(left, top, left + image.width // 2, top + image.height // 2))
        crop.save(folder / Path(name).stem / f"{i:05d}.jpg", quality=90)
    return folder


def bare_rate(autoencoder: Path, recipe: Recipe, pixels: np.ndarray) -> float:
    """Images/s of the encoder alone, on whole units as in the extraction."""
    options = EncoderOptions(
        autoencoder,
        recipe.extract.batch_size,
        recipe.extract.precision,
        mean=np.zeros(392, np.float32),
        std=np.ones(392, np.float32),
        views=recipe.extract.views,
    )
    encoder = EncodeUnits(pick_device(), options)
    encoder.encode(pixels[:UNIT])
    started = time.perf_counter()
    for start in range(0, len(pixels), UNIT):
        encoder.encode(pixels[start : start + UNIT])
    return len(pixels) / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--turns", type=int, default=3)
    arguments = parser.parse_args()
    more = [f"extract.unit_rows={UNIT}", f"extract.batch_size={UNIT}"]
    recipe = load_recipe(None, [*UNTRAINED, *more])
    rates: dict[str, list[float]] = {"local": [], "ray": []}
    ratios: dict[str, list[float]] = {"local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shard(ImageSources(write_images(root / "images", arguments.images)), root / "shards", recipe.shard)
        shards = ShardSet.open(root / "shards")
        train_autoencoder(shards, root / "autoencoder", recipe.autoencoder)
        pixels = load_images(shards, range(0, len(shards), 2), 256)
        bare = [bare_rate(root / "autoencoder", recipe, pixels)]
        for turn in range(arguments.turns):
            for name in rates:
                out = root / f"{name}-{turn}"
                with nullcontext() if name == "local" else connected():
                    runner = LocalRunner() if name == "local" else RayRunner()
                    manifest = extract(shards, root / "autoencoder", out, recipe.extract, runner=runner)
                bare.append(bare_rate(root / "autoencoder", recipe, pixels))
                rates[name].append(manifest.timings["steady_images_per_s"])
                ratios[name].append(rates[name][-1] / float(np.mean(bare[-2:])))
                if turn == arguments.turns - 1:
                    show_timings(manifest.timings)
    print(f"{'bare encoder':32}{', '.join(f'{rate:.2f}' for rate in bare)} images/s")
    for name in rates:
        values = ", ".join(f"{rate:.2f} ({ratio:.3f})" for rate, ratio in zip(rates[name], ratios[name], strict=True))
        print(f"{f'extraction, {name} runner':32}{values} images/s (of the encoder)")
    names = {"local_over_encoder": "local", "pipeline_over_encoder": "ray"}
    print(json.dumps({name: round(float(np.median(ratios[runner])), 3) for name, runner in names.items()}))


if __name__ == "__main__":
    main()
