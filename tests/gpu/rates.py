"""Rates and peak memory, each against the physical limit or the official scheme in the same run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.diffusion_section import DiffusionSection, DiTSection
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.models.dit import DiT
from svgpipe.stages.extract.encoder_actor import EncoderOptions, EncodeUnits
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.runtime.device import peak_memory
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.shard.scan import ImageSources
from svgpipe.stages.train_autoencoder.stage import train_autoencoder
from svgpipe.stages.train_diffusion.data import CacheBatches
from svgpipe.stages.train_diffusion.trainer import FlowTrainer
from svgpipe.stages.training.distributed import ProcessGroup

from ..benchmarks.extract import UNTRAINED, write_images
from ..benchmarks.products import step_of_products
from ..benchmarks.sample import limit as products_of_sampling
from ..benchmarks.sample import official, ours
from .checks import Check, Setup, seconds_per_call
from .parity import SMALL

TOKENS, CHANNELS = 256, 392


def matrix_product_rate(setup: Setup) -> float:
    """Return the FLOP/s of a large bfloat16 matrix product: the limit of training and sampling."""
    n = 512 if setup.small else 8192
    a, b = (torch.randn(n, n, device=setup.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds_per_call(setup, lambda: a @ b, 20)


def flops_per_step(model: DiT, section: DiTSection, batch: int) -> float:
    """Return the FLOPs of forward and backward of the blocks: 6 per weight and token, and those of attention.

    The modulation runs once per sample and is not counted. Source: arXiv 2204.02311, appendix B.
    """
    layers = [(n, m) for n, m in model.blocks.named_modules() if isinstance(m, torch.nn.Linear) and "adaLN" not in n]
    weights = sum(layer.weight.numel() for _, layer in layers)
    return float(batch * TOKENS * (6 * weights + 12 * section.depth * section.width * TOKENS))


def _trainer(setup: Setup, section: DiTSection, batch: int, **changes: object) -> FlowTrainer:
    config = DiffusionSection(model=section, batch_size=batch, precision="bfloat16").model_copy(update=changes)
    return FlowTrainer(
        config,
        ProcessGroup(setup.device),
        grid=(16, 16),
        channels=CHANNELS,
        num_classes=1000,
        scale=None,
        last_good=lambda: None,
    )


def training(setup: Setup) -> Iterator[Check]:
    """Steps per second, share of the rate of matrix products, and peak memory of S, B, L and XL."""
    limit = matrix_product_rate(setup)
    yield Check("bfloat16 matrix product", limit / 1e12, "TFLOP/s")
    for size in ("s",) if setup.small else ("s", "b", "l", "xl"):
        torch.compiler.reset()
        yield from _training_of(setup, size, limit)


def _training_of(setup: Setup, size: str, limit: float) -> Iterator[Check]:
    section = SMALL if setup.small else load_recipe(f"imagenet256-svg-{size}").diffusion.model
    batch, calls = (4, 3) if setup.small else (64, 20)
    if setup.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    trainer = _trainer(setup, section, batch)
    tokens, labels = torch.randn(batch, TOKENS, CHANNELS).half(), torch.zeros(batch, dtype=torch.int64)
    steps = iter(range(10**6))
    taken = seconds_per_call(setup, lambda: trainer(next(steps), tokens, labels), calls, 3)
    name = f"training DiT-{'small' if setup.small else size.upper()}, batch {batch}"
    yield Check(name, batch / taken, "samples/s")
    if size == "s":  # a larger model and its copy may not fit
        products = seconds_per_call(setup, step_of_products(trainer, batch), calls, 3)
        at_least = None if setup.small else 0.8
        yield Check(f"{name}: time over products, optimizer and averages", taken / products, at_least=at_least)
    share = flops_per_step(trainer.model, section, batch) / taken / limit
    yield Check(f"{name}: share of the matrix product's FLOP/s", share, at_most=1.05)
    yield Check(f"{name}: peak memory", peak_memory(setup.device) / 1e9, "GB")


@contextlib.contextmanager
def small_cache(setup: Setup) -> Iterator[tuple[Path, ShardSet, FeatureCache]]:
    """Make shards, an untrained autoencoder and a cache of DINOv3 ViT-S/16+ features at 256 pixels.

    Yields:
        The directory, the shards and the cache.
    """
    recipe = load_recipe(
        None,
        [
            *UNTRAINED,
            f"extract.unit_rows={8 if setup.small else 128}",
            f"extract.batch_size={8 if setup.small else 128}",
            "extract.views=[original]",
            "extract.precision=bfloat16",
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = write_images(root / "images", 48 if setup.small else 2048)
        shard(ImageSources(images), root / "shards", recipe.shard, processes=1 if setup.small else None)
        shards = ShardSet.open(root / "shards")
        train_autoencoder(shards, root / "autoencoder", recipe.autoencoder)
        extract(shards, root / "autoencoder", root / "cache", recipe.extract)
        yield root, shards, FeatureCache(root / "cache")


def extraction(setup: Setup) -> Iterator[Check]:
    """Images per second of the bare encoder, and steps from the cache against memory and against the official loop."""
    with small_cache(setup) as (root, shards, cache):
        pixels = load_images(shards, range(32), 256)
        pixels = np.concatenate([pixels] * (1 if setup.small else 8))
        # As in an extraction: normalised, float16.
        mean, std = np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32)
        batch = 8 if setup.small else 128
        options = EncoderOptions(root / "autoencoder", batch, "bfloat16", mean=mean, std=std)
        encoder = EncodeUnits(setup.device, options)
        seconds = seconds_per_call(setup, lambda: encoder.encode(pixels), 2 if setup.small else 8)
        bare = len(pixels) / seconds
        yield Check("encoder DINOv3 ViT-S/16+ at 256 px", bare, "images/s")
        timings = cache.manifest.timings
        for worker in timings["workers"]:
            for phase, seconds in worker["seconds"].items():
                yield Check(f"extraction: {phase}, of one thread", 1e3 * seconds / worker["images"], "ms/image")
        if timings["steady_images_per_s"] is not None:
            share = timings["steady_images_per_s"] / bare
            yield Check("extraction over the bare encoder", share, at_least=0.3 if setup.small else 0.8)
        torch.compiler.reset()
        yield from _loops(setup, root, shards, cache)


def _loops(setup: Setup, root: Path, shards: ShardSet, cache: FeatureCache) -> Iterator[Check]:
    batch = 4 if setup.small else 32
    section = SMALL if setup.small else DiTSection()
    trainer = _trainer(setup, section, batch)
    stream = iter(CacheBatches(cache, cache.training_rows, trainer.config, 0, range(batch)))
    held = next(stream)
    steps, calls = iter(range(10**6)), 3 if setup.small else 30
    turns = [
        (
            seconds_per_call(setup, lambda: trainer(next(steps), *held), calls, 3),
            seconds_per_call(setup, lambda: trainer(next(steps), *next(stream)), calls),
        )
        for _ in range(1 if setup.small else 5)
    ]
    memory, cached = (float(np.median(seconds)) for seconds in zip(*turns, strict=True))
    yield Check("training from the cache over from memory", memory / cached, at_least=0.5 if setup.small else 0.9)
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        plain = _trainer(setup, section, batch, precision="float32", compile=False)
        encoder = EncodeUnits(setup.device, EncoderOptions(root / "autoencoder", batch, "float32"))
        pixels = load_images(shards, range(batch), 256)

        def official_step() -> None:
            features = torch.from_numpy(encoder.encode(pixels)[:, 0]).flatten(1, 2)
            plain(next(steps), features, held[1])

        online = seconds_per_call(setup, official_step, calls)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
    yield Check("training from the cache over the official loop (TF32)", online / cached, at_least=1)


def sampling(setup: Setup) -> Iterator[Check]:
    """Compiled bfloat16 sampling against the official scheme in float32 (TF32) with two calls per step."""
    from svgpipe.models.guidance import Guidance

    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        theirs = seconds_per_call(setup, official(), 1 if setup.small else 5, 1)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul
    mine = ours("bfloat16", Guidance(1.5), compiled=setup.device.type == "cuda")
    taken = seconds_per_call(setup, mine, 1 if setup.small else 5, 1)
    yield Check("sampling DiT-S over the official scheme", theirs / taken, at_least=0.2 if setup.small else 1)
    products = seconds_per_call(setup, products_of_sampling("bfloat16"), 1 if setup.small else 5, 1)
    at_least = None if setup.small else 0.8
    yield Check("sampling DiT-S: time over products and attention", taken / products, at_least=at_least)
