"""Fine-tuning a decoder from cached latents against training it with the encoder at every step.

    .venv/bin/python -m tests.benchmarks.decoder [--turns 3]

Two images per step, in turns, within one run, at the precision of `auto`; on the GPU if there is one; random weights,
which do not change the speed; L1 loss alone, because perceptual and adversarial losses cost the same in both:

- encoded: a step of `train-autoencoder`, on images in memory;
- cached: a step of `train-autoencoder --decoder-only`, with latents of a cache, on the same images.

A setting is a vision model and a decoder. Medians. The last line is JSON: how many times as many steps per second.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.networks.autoencoder import build_autoencoder, load_decoder
from svgpipe.stages.runtime.device import pick_device
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.shard.scan import ImageSources
from svgpipe.stages.train_autoencoder.decoder_source import DecoderSource
from svgpipe.stages.train_autoencoder.forward import CachedForward
from svgpipe.stages.train_autoencoder.stage import train_autoencoder
from svgpipe.stages.train_autoencoder.trainer import AutoencoderTrainer
from svgpipe.stages.training.distributed import ProcessGroup

from .extract import UNTRAINED, write_images

BATCH = 2
SETTINGS = {
    "svg, ViT-S/16+, decoder of SVG": [],
    "vision, ViT-L/16, decoder of SVG": [
        "autoencoder.kind=vision",
        "autoencoder.backbone.name=vit_large_patch16_dinov3.lvd1689m",
    ],
    "vision, ViT-L/16, decoder of 32 channels": [
        "autoencoder.kind=vision",
        "autoencoder.backbone.name=vit_large_patch16_dinov3.lvd1689m",
        "autoencoder.decoder.ch=32",
    ],
}


def trainers(root: Path, recipe: Recipe) -> tuple[AutoencoderTrainer, AutoencoderTrainer, DecoderSource, ShardSet]:
    """Return the trainers of both ways, after an extraction."""
    shard(ImageSources(write_images(root / "images", 8)), root / "shards", recipe.shard)
    shards = ShardSet.open(root / "shards")
    train_autoencoder(shards, root / "autoencoder", recipe.autoencoder)
    extract(shards, root / "autoencoder", root / "cache", recipe.extract)
    source = DecoderSource.open(root / "autoencoder", FeatureCache(root / "cache"), shards)
    config, group = recipe.autoencoder, ProcessGroup(pick_device())
    whole = AutoencoderTrainer(build_autoencoder(config), config, group, None, None, lambda: None)
    forward = CachedForward(
        load_decoder(source.path)[0].train(), source.stored_shape, source.scaling(), config.decoder_noise, group.sum
    )
    return whole, AutoencoderTrainer(forward.model, config, group, None, None, lambda: None, forward), source, shards


def measure(overrides: list[str], turns: int) -> dict[str, float]:
    """Return the median seconds per step of both ways."""
    more = ["extract.unit_rows=4", "extract.views=[original]", f"autoencoder.batch_size={BATCH}"]
    precision = [f"{section}.precision=auto" for section in ("autoencoder", "extract")]
    recipe = load_recipe(None, [*UNTRAINED, *more, *precision, *overrides])
    with tempfile.TemporaryDirectory() as folder:
        encoded, cached, source, shards = trainers(Path(folder), recipe)
        rows = np.arange(BATCH)
        pixels = torch.from_numpy(load_images(shards, rows.tolist(), 256)).permute(0, 3, 1, 2).contiguous()
        seconds: dict[str, list[float]] = {"encoded": [], "cached": []}
        for turn in range(turns + 1):
            for name in ("encoded", "cached") if turn % 2 else ("cached", "encoded"):
                started = time.perf_counter()
                if name == "encoded":
                    encoded(turn, pixels)
                else:
                    cached(turn, pixels, source.stored(rows, np.zeros(BATCH, bool)))
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if turn:
                    seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    ratios = {}
    for name, overrides in SETTINGS.items():
        medians = measure(overrides, turns)
        ratios[name] = round(medians["encoded"] / medians["cached"], 3)
        print(f"{name:44}" + "".join(f"{way}{value:8.3f} s per step   " for way, value in medians.items()))
    print(json.dumps({f"cached_over_encoded, {name}": ratio for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
