"""The perceptual term that a recipe chose, with its weights; there is no silent fallback."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError, UsageError, first_line
from svgpipe.manifests.recipe import PerceptualSection
from svgpipe.models.autoencoder import Autoencoder
from svgpipe.models.losses import LPIPS, BackbonePerceptual

from .autoencoder import read_weight_file


def load_perceptual(config: PerceptualSection, model: Autoencoder) -> BackbonePerceptual | LPIPS | None:
    """The perceptual term that the recipe chose, frozen.

    Raises:
        ArtifactError: LPIPS weights that cannot be had; there is no silent fallback.
    """
    if config.weight == 0:
        return None
    if config.kind == "backbone":
        try:
            return BackbonePerceptual(model.backbone, config.levels)
        except ValueError as error:
            raise UsageError(f"autoencoder.perceptual: {error}") from error
    return load_lpips(config, "autoencoder.perceptual")


def load_lpips(config: PerceptualSection, where: str) -> LPIPS:
    """LPIPS with VGG16, frozen, in eval mode.

    Args:
        config: names its two weight files. where: dotted name of the recipe's keys, for messages.
    Raises:
        ArtifactError: weights that cannot be had, or do not fit.
    """
    lpips = LPIPS()
    try:
        lpips.load(
            _weights(config.vgg_weights, "https://download.pytorch.org/models/vgg16-397923af.pth", where),
            _weights(
                config.lpips_weights,
                "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
                where,
            ),
        )
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from error
    return lpips.eval()


def _weights(source: str, url: str, where: str) -> dict[str, Tensor]:
    if source != "hub":
        return read_weight_file(Path(source))
    try:
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
    except Exception as error:  # urllib's many kinds; all mean that the file cannot be had
        choice = "" if where == "reconstruction" else f", or choose --set {where}.kind=backbone"
        raise ArtifactError(
            f"{where}: could not download {url} ({first_line(error)}). Give local files with "
            f"--set {where}.vgg_weights=FILE and {where}.lpips_weights=FILE{choice}."
        ) from error
    return state
