"""Checks of `svgpipe run` before its first stage: what a later stage would refuse after days of training."""

from __future__ import annotations

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import MANIFEST_NAME
from svgpipe.manifests.model_manifests import choose_weights
from svgpipe.manifests.recipe import Recipe
from svgpipe.stages.evaluate.features import load_extractor
from svgpipe.stages.evaluate.plan import require_sampling
from svgpipe.stages.networks.autoencoder import build_backbone
from svgpipe.stages.networks.diffusion import open_diffusion, require_patches
from svgpipe.stages.networks.perceptual import load_lpips
from svgpipe.stages.training.metrics_log import require_wandb

from .run import STAGES, RunOptions, require_demo
from .sources import source_folder


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
        UsageError: no image folder, an unknown guidance mode, an average that is not trained, or a missing package.
        ArtifactError: `--guide` is not a diffusion model.
    """
    source_folder(recipe.source, workdir)
    require_demo(recipe.source, workdir)
    require_sampling(recipe.evaluation, guided=options.guide is not None)
    try:
        choose_weights(recipe.diffusion.ema_decays, recipe.evaluation.weights)
    except UsageError as error:
        raise UsageError(f"evaluation.weights: {error} (diffusion.ema_decays)") from error
    if options.guide is not None:
        open_diffusion(options.guide).weights_name(recipe.evaluation.guide_weights)
    if options.wandb_project is not None:
        require_wandb()


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
    backbone = build_backbone(section.backbone, section.image_size, encoder if trained else None)
    require_patches(recipe.diffusion.model, (backbone.grid, backbone.grid), f"{section.backbone.name}'s features")
    if not trained and section.perceptual.kind == "lpips-vgg" and section.perceptual.weight > 0:
        load_lpips(section.perceptual, "autoencoder.perceptual")
    load_extractor(recipe.evaluation.extractor, backbone)
