"""Value of the cache in training: steps from it against steps from memory, and against encoding at every step.

    .venv/bin/python -m tests.benchmarks.train [--turns 8]

DiT-S on 16x16x392, batch 8; the encoder is DINOv3 ViT-S/16+ at 256 pixels with both branches (random weights, which do
not change the speed); on the GPU if there is one. In turns, within one run, a step of the same trainer:

- memory: the batch is a tensor in memory, the limit;
- cache: read ahead from the feature cache by a thread, as in `train-diffusion`;
- online: eight JPEGs are decoded and encoded first, as in the official loop;
- official: that loop in float32, as in the official code;
- aligned: representation alignment with a second cache of the frozen features (384 channels, block 8), read beside the
  first;
- aligned online: the same features are computed by the vision model at every step, as REPA's code does;
- compiled: `memory` with torch.compile (compiling is not timed);
- limit: the matrix products and the attention of `memory` alone, forward and backward, on prepared tensors, and the
  updates by the optimizer and of the averages.

All but `official` are in the precision of `auto` on this machine. Medians. `step_over_products` is `memory` over
`limit`. Data wait is the time that a step from the cache waits for its batch. Peak memory is that of one step of 32
samples in its own process, with and without activation checkpointing, and of one step of the autoencoder. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.diffusion_section import AlignSection, DiffusionSection
from svgpipe.manifests.precision import Precision, fastest_precision
from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.stages.extract.encoder_actor import EncoderOptions, EncodeUnits
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.images.decode import RGBArray
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.networks.autoencoder import build_autoencoder
from svgpipe.stages.networks.perceptual import load_perceptual
from svgpipe.stages.runtime.device import peak_memory, pick_device
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.shard.scan import ImageSources
from svgpipe.stages.train_autoencoder.stage import train_autoencoder
from svgpipe.stages.train_autoencoder.trainer import AutoencoderTrainer
from svgpipe.stages.train_diffusion.alignment_target import AlignmentTarget
from svgpipe.stages.train_diffusion.data import CacheBatch, CacheBatches
from svgpipe.stages.train_diffusion.trainer import FlowTrainer
from svgpipe.stages.training.distributed import ProcessGroup

from .extract import UNTRAINED, write_images
from .products import step_of_products

Step = Callable[..., object]
"""Runs one step, given its number and a batch."""

BATCH, IMAGES, PEAK_BATCH, PEAK_IMAGES = 8, 64, 32, 4
# Nothing is downloaded: the perceptual loss uses the backbone.
FROZEN_ONLY = ["autoencoder.backbone.weights=random", "autoencoder.perceptual={kind: backbone, levels: [0, 1]}"]
PEAKS = {
    "held": f"diffusion, {PEAK_BATCH} samples",
    "checkpointed": f"diffusion, {PEAK_BATCH} samples, activation checkpointing",
    "autoencoder": f"autoencoder, {PEAK_IMAGES} images",
}
OVERRIDES = [
    "extract.unit_rows=32",
    "extract.batch_size=32",
    "extract.views=[original]",
    *(f"{section}.precision=auto" for section in ("autoencoder", "extract", "diffusion")),
    f"diffusion.batch_size={BATCH}",
]


def trainer_of(config: DiffusionSection, target: AlignmentTarget | None = None) -> FlowTrainer:
    return FlowTrainer(
        config,
        ProcessGroup(pick_device()),
        grid=(16, 16),
        channels=392,
        num_classes=4,
        scale=None,
        last_good=lambda: None,
        target=target,
    )


def finished() -> None:
    """Wait for the device: on a GPU, a step ends later than its call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def print_peak(device: torch.device) -> None:
    """Print the peak memory of this process."""
    finished()
    print(peak_memory(device))


def peak_of_one_step(recompute: bool) -> None:
    """Run one step of diffusion training in this process."""
    config = DiffusionSection(batch_size=PEAK_BATCH, activation_checkpointing=recompute, precision=fastest_precision())
    device = pick_device()
    trainer = trainer_of(config)
    trainer(0, torch.randn(PEAK_BATCH, 256, 392).half(), torch.zeros(PEAK_BATCH, dtype=torch.int64))
    print_peak(device)


def peak_of_the_autoencoder() -> None:
    """Run one step of the autoencoder on a few images, with the discriminator."""
    config = load_recipe(None, [*FROZEN_ONLY, *OVERRIDES, f"autoencoder.batch_size={PEAK_IMAGES}"]).autoencoder
    group, model = ProcessGroup(pick_device()), build_autoencoder(config)
    assert isinstance(model, SVGAutoencoder)
    perceptual = load_perceptual(config.perceptual, model.backbone)
    trainer = AutoencoderTrainer(model, config, group, model.backbone, perceptual, lambda: None)
    trainer(config.discriminator.start_step, torch.zeros(PEAK_IMAGES, 3, 256, 256, dtype=torch.uint8))
    print_peak(group.device)


def peaks() -> dict[str, float]:
    """Return GB of each kind of step."""
    found = {}
    for name in PEAKS:
        command = [sys.executable, "-m", "tests.benchmarks.train", "--peak", name]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[name] = int(done.stdout.splitlines()[-1]) / 1e9
    return found


def prepare(root: Path, recipe: Recipe) -> tuple[FeatureCache, FeatureCache, ShardSet]:
    """Return a cache of SVG's latents, one of the frozen features alone, and their shards."""
    shard(ImageSources(write_images(root / "images", IMAGES)), root / "shards", recipe.shard)
    shards = ShardSet.open(root / "shards")
    caches = []
    for kind in ("svg", "vision"):
        config = recipe.autoencoder.model_copy(update={"kind": kind})
        train_autoencoder(shards, root / kind / "autoencoder", config)
        extract(shards, root / kind / "autoencoder", root / kind / "cache", recipe.extract)
        caches.append(FeatureCache(root / kind / "cache"))
    return caches[0], caches[1], shards


class Online:
    """Batches as in the official loop: images are decoded and encoded at every step."""

    def __init__(self, shards: ShardSet, cache: FeatureCache, precision: Precision) -> None:
        self.shards, self.labels = shards, torch.from_numpy(cache.labels.astype(np.int64))
        statistics, encoder = (cache.channel_mean, cache.channel_std), cache.path.parent / "autoencoder"
        options = EncoderOptions(encoder, BATCH, precision, False, *statistics)
        self.encoder = EncodeUnits(pick_device(), options)
        self.rng = np.random.default_rng(0)

    def __call__(self) -> tuple[Tensor, Tensor]:
        rows = self.rng.integers(0, len(self.shards), BATCH)
        pixels: RGBArray = load_images(self.shards, [int(row) for row in rows], 256)
        features = torch.from_numpy(self.encoder.encode(pixels)[:, 0])
        return features.flatten(1, 2), self.labels[rows]


def measure(root: Path, turns: int) -> tuple[dict[str, float], float]:
    """Return the median seconds per step of each variant, and the fraction that the cache's steps waited for data."""
    recipe = load_recipe(None, [*UNTRAINED, *OVERRIDES])
    cache, features, shards = prepare(root, recipe)
    config = recipe.diffusion
    half, full = trainer_of(config), trainer_of(config.model_copy(update={"precision": "float32"}))
    compiled = trainer_of(config.model_copy(update={"compile": True}))
    rows = np.flatnonzero(cache.valid)
    stream = iter(CacheBatches(cache, rows, config, 0, range(BATCH)))
    held = [next(stream) for _ in range(4)]
    online, official = (Online(shards, cache, name) for name in (config.precision, "float32"))
    target = AlignmentTarget(features, own=False)
    aligned = trainer_of(config.model_copy(update={"align": AlignSection()}), target)
    both, vision = (
        iter(CacheBatches(cache, rows, config, 0, range(BATCH), target=target)),
        Online(shards, features, config.precision),
    )
    waits: list[float] = []

    def from_cache() -> CacheBatch:
        started = time.perf_counter()
        batch = next(stream)
        waits.append(time.perf_counter() - started)
        return batch

    def from_memory() -> CacheBatch:
        return held[len(waits) % len(held)]

    ways: dict[str, tuple[Step, Callable[[], tuple[Tensor | None, ...]]]] = {
        "memory": (half, from_memory),
        "cache": (half, from_cache),
        "online": (half, online),
        "official": (full, official),
        "aligned": (aligned, lambda: next(both)),
        "aligned online": (aligned, lambda: (*held[0][:2], vision()[0])),
        "compiled": (compiled, from_memory),
        "limit": (step_of_products(half, BATCH), from_memory),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns + 1):
        # The two similar variants swap places, so that neither benefits from what ran before it.
        names = (*ways, "cache", "memory")
        for name in names if turn % 2 else names[::-1]:
            run, batch = ways[name]
            started = time.perf_counter()
            run(turn, *batch())
            finished()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    return medians, float(np.sum(waits[1:]) / np.sum(seconds["cache"]))


def compare(turns: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        medians, wait = measure(Path(folder), turns)
    for name, value in medians.items():
        print(f"{name:16}{value:8.3f} s per step of {BATCH}{BATCH / value:10.2f} samples/s")
    memory = peaks()
    for name, found in memory.items():
        print(f"one step of {PEAKS[name]}: {found:.2f} GB")
    ratios = {
        "cache_over_memory": medians["memory"] / medians["cache"],
        "cache_over_online": medians["online"] / medians["cache"],
        "cache_over_official": medians["official"] / medians["cache"],
        "align_cached_over_online": medians["aligned online"] / medians["aligned"],
        "step_over_products": medians["memory"] / medians["limit"],
        "step_over_products_compiled": medians["compiled"] / medians["limit"],
        "data_wait_share": wait,
        "checkpointed_over_held": memory["checkpointed"] / memory["held"],
    }
    print(json.dumps({name: round(value, 4) for name, value in ratios.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--peak", choices=PEAKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peak == "autoencoder":
        peak_of_the_autoencoder()
    elif arguments.peak:
        peak_of_one_step(arguments.peak == "checkpointed")
    else:
        compare(arguments.turns)


if __name__ == "__main__":
    main()
