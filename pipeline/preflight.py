"""Checks of `svgpipe run` before its first stage: what a later stage would refuse after days of training."""

from __future__ import annotations

import typer

from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import MANIFEST_NAME
from svgpipe.manifests.model_manifests import POWER, choose_weights
from svgpipe.manifests.recipe import Recipe
from svgpipe.models.backbone import Backbone
from svgpipe.stages.evaluate.features import load_extractor
from svgpipe.stages.networks.autoencoder import latent_grid
from svgpipe.stages.networks.backbone import build_backbone
from svgpipe.stages.networks.diffusion import open_diffusion, require_patches, width_warning
from svgpipe.stages.networks.guided_model import require_guided_channels, require_sampling
from svgpipe.stages.networks.perceptual import load_lpips
from svgpipe.stages.train_diffusion.alignment_target import require_depth
from svgpipe.stages.train_diffusion.stage import require_sample_steps
from svgpipe.stages.training.metrics_log import require_wandb

from .run import STAGES, RunOptions, require_demo
from .sources import source_folder


def _channels(section: AutoencoderSection, backbone: Backbone | None) -> int:
    """Return the channels of a latent."""
    if backbone is None or not section.encodes_with_backbone:
        return section.kl.channels
    return backbone.channels + (section.residual.channels if section.kind == "svg" else 0)


def check_before_run(recipe: Recipe, workdir: Location, options: RunOptions, *, weights: bool) -> None:
    """Check a run. `weights`: also load pretrained networks. Raises the errors of the functions below."""
    _check_settings(recipe, workdir, options)
    if weights:
        _check_weights(recipe, workdir)
        if options.disk is not None:
            options.disk.check_folder()


def _check_settings(recipe: Recipe, workdir: Location, options: RunOptions) -> None:
    """Check all that needs no weights.

    Raises:
        UsageError: no image folder, an unknown guidance mode, an average that is not trained, alignment without
            features, or a missing package.
        ArtifactError: `--guide` is not a diffusion model.
    """
    source_folder(recipe.source, workdir)
    require_demo(recipe.source, workdir)
    check_model_settings(recipe, guided=options.guide is not None)
    align = recipe.diffusion.align
    if align is not None and not recipe.autoencoder.encodes_with_backbone:
        raise UsageError(
            f"diffusion.align: latents of kind {recipe.autoencoder.kind} hold no features to align with, and `run` "
            "makes one cache. Run the stages one by one, and give the cache of a vision model to train-diffusion "
            "--align."
        )
    if align is not None and (recipe.diffusion.model.patch_size or 1) > 1:
        raise UsageError(
            "diffusion.align: a latent that is aligned with its own features has one feature per cell, so the tokens "
            f"must be single cells: expected model.patch_size null, found {recipe.diffusion.model.patch_size}."
        )
    if options.guide is not None:
        open_diffusion(options.guide).weights_name(recipe.evaluation.guide_weights)
    if options.wandb_project is not None:
        require_wandb()


def check_model_settings(recipe: Recipe, *, guided: bool = False) -> None:
    """Check what a recipe says about training and sampling, without weights.

    Raises:
        UsageError: solver, guidance, steps, average or block of alignment do not fit the model.
    """
    require_sampling(recipe.evaluation, recipe.diffusion, guided=guided)
    if recipe.evaluation.weights.startswith(POWER):
        raise UsageError(
            f"evaluation.weights: {recipe.evaluation.weights} does not exist until svgpipe ema makes it after the "
            "training. Sample with ema first, and give --ema to sample-and-eval later."
        )
    try:
        choose_weights(recipe.diffusion.ema_decays, recipe.evaluation.weights)
    except UsageError as error:
        raise UsageError(f"evaluation.weights: {error} (diffusion.ema_decays)") from error
    require_sample_steps(recipe.diffusion)
    require_depth(recipe.diffusion)


def _check_weights(recipe: Recipe, workdir: Location) -> None:
    """Load the pretrained networks that unfinished stages will load.

    Raises:
        ArtifactError: weights are missing, cannot be downloaded, or do not fit.
        UsageError: an unknown model, or patches that do not divide its grid.
    """
    _, encoder, _, _, evaluation = (workdir / name for name in STAGES)
    if (evaluation / MANIFEST_NAME).exists():
        return
    section = recipe.autoencoder
    trained = (encoder / MANIFEST_NAME).exists()
    backbone = None
    if section.trains_with_backbone:
        backbone = build_backbone(section.backbone, section.image_size, encoder if trained else None)
    grid = latent_grid(section, backbone if section.encodes_with_backbone else None)
    require_patches(recipe.diffusion.model, (grid, grid), f"the latents of kind {section.kind}")
    channels = _channels(section, backbone)
    require_guided_channels(recipe.evaluation, channels)
    if (narrow := width_warning(recipe.diffusion.model, channels)) is not None:
        typer.echo(narrow, err=True)
    if not trained and section.perceptual.kind == "lpips-vgg" and section.perceptual.weight > 0:
        load_lpips(section.perceptual, "autoencoder.perceptual")
    if recipe.evaluation.extractor.kind == "backbone" and not section.trains_with_backbone:
        raise UsageError(
            f"evaluation.extractor.kind: backbone is that of the autoencoder, but kind {section.kind} has none here. "
            "Choose inception, or timm with a name."
        )
    load_extractor(recipe.evaluation.extractor, backbone)
