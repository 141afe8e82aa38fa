"""A small pipeline from image files to latents: shard, train, extract, train, resume, sample. Without Ray."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.networks.diffusion import open_diffusion
from svgpipe.stages.networks.sampling import SamplerSettings, keep_as_computed, sample_latents
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.shard.scan import ImageSources
from svgpipe.stages.train_autoencoder.stage import train_autoencoder
from svgpipe.stages.train_diffusion.stage import train_diffusion

from .checks import Check, Setup, relative_error

CLASSES, PER_CLASS = 3, 16
OVERRIDES = [
    "shard.holdout=0.2",
    "shard.images_per_shard=16",
    "autoencoder.image_size=64",
    "autoencoder.backbone.name=vit_tiny_patch16_224",
    "autoencoder.backbone.weights=random",
    "autoencoder.residual={channels: 4, depth: 1, width: 32, heads: 2}",
    "autoencoder.decoder={ch: 32, ch_mult: [1, 1, 1, 1, 1], num_res_blocks: 1}",
    "autoencoder.perceptual={kind: backbone, levels: [0, 1]}",
    "autoencoder.batch_size=8",
    "autoencoder.steps=6",
    "autoencoder.eval_images=4",
    "autoencoder.calibration_images=16",
    "extract={unit_rows: 16, batch_size: 8, calibration_images: 16}",
    "diffusion.model={width: 64, depth: 2, heads: 2}",
    "diffusion.batch_size=8",
    "diffusion.steps=20",
    "diffusion.checkpoint_every=4",
    "diffusion.ema_decays=[0.9]",
    "diffusion.quality_samples=0",
]


def write_images(folder: Path, per_class: int = PER_CLASS) -> Path:
    """Write smooth random pictures, one folder per class."""
    rng = np.random.default_rng(0)
    for label in range(CLASSES):
        (folder / f"class{label}").mkdir(parents=True)
        for i in range(per_class):
            small = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(small).resize((96, 80), Image.Resampling.BICUBIC).save(
                folder / f"class{label}" / f"{i}.jpg"
            )
    return folder


def end_to_end(setup: Setup) -> Iterator[Check]:
    """Run the stages on the default device. Training is interrupted, and resumes to the same weights."""
    compiled = str(setup.device.type == "cuda").lower()
    recipe = load_recipe(None, [*OVERRIDES, f"diffusion.compile={compiled}"])
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shard(ImageSources(write_images(root / "images")), root / "shards", recipe.shard, processes=1)
        shards = ShardSet.open(root / "shards")
        trained = train_autoencoder(shards, root / "autoencoder", recipe.autoencoder)
        yield Check("held-out PSNR of a few steps", trained.heldout_psnr or float("nan"), "dB", at_least=1)
        extract(shards, root / "autoencoder", root / "cache", recipe.extract)
        cache = FeatureCache(root / "cache")
        stored = cache.read(cache.training_rows).astype(np.float32)
        yield Check("extraction: mean of normalised features", float(abs(stored.mean())), at_most=0.1)
        yield Check("extraction: std of normalised features", float(stored.std()), at_least=0.8, at_most=1.2)
        yield from _training(cache, root, recipe, setup)


def _training(cache: FeatureCache, root: Path, recipe: Recipe, setup: Setup) -> Iterator[Check]:
    whole = train_diffusion(cache, root / "whole", recipe.diffusion)
    half = recipe.diffusion.model_copy(update={"steps": 10})
    train_diffusion(cache, root / "resumed", half)
    train_diffusion(cache, root / "resumed", recipe.diffusion)
    one, two = (load_file(root / name / "raw.safetensors") for name in ("whole", "resumed"))
    worst = max(relative_error(two[name], one[name]) for name in one if one[name].norm() > 0)
    # On a CPU the bits are equal; on a GPU some kernels sum in another order each time.
    yield Check(
        "resumed training against an uninterrupted one", worst, at_most=0.0 if setup.device.type == "cpu" else 1e-2
    )
    loss = whole.heldout_loss or float("nan")
    yield Check("held-out loss after 20 steps", loss, at_most=2.2)
    settings = SamplerSettings(8, 1.5, "euler", "constant", 0.4, 0, "bfloat16", "ema")
    latents = {}
    for name in ("eager", "compiled"):
        model = open_diffusion(root / "whole").load().to(setup.device)
        keep_as_computed(model, "bfloat16")
        if name == "compiled" and setup.device.type == "cuda":
            model.compile()
        latents[name] = sample_latents(model, range(6), settings, setup.device)
        again = sample_latents(model, range(3, 6), settings, setup.device)
        error = relative_error(again, latents[name][3:])
        yield Check(f"samples do not depend on the batch, {name}", error, at_most=5e-2)
    yield Check(
        "compiled samples against eager ones", relative_error(latents["compiled"], latents["eager"]), at_most=5e-2
    )
    yield Check("samples are finite", float(torch.isfinite(latents["eager"]).all()), at_least=1)
