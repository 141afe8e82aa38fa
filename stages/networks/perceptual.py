"""The perceptual loss of a recipe, with its weights."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from svgpipe.manifests.autoencoder_section import PerceptualSection
from svgpipe.manifests.errors import ArtifactError, UsageError, first_line
from svgpipe.models.backbone import Backbone
from svgpipe.models.losses import LPIPS, BackbonePerceptual

from .downloads import Download
from .weight_files import read_weight_file

VGG = Download("https://download.pytorch.org/models/vgg16-397923af.pth", "397923af")
LINEAR = Download(
    "https://github.com/richzhang/PerceptualSimilarity/raw/master/lpips/weights/v0.1/vgg.pth",
    "a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868",
)


def load_perceptual(config: PerceptualSection, backbone: Backbone | None) -> BackbonePerceptual | LPIPS | None:
    """Return the frozen perceptual loss of a recipe. There is no silent fallback. Only kind backbone needs a backbone.

    Raises:
        ArtifactError: LPIPS weights are not available.
        UsageError: the backbone does not have these feature levels.
    """
    if config.weight == 0:
        return None
    if config.kind == "backbone":
        assert backbone is not None, "built wherever the recipe needs it"
        try:
            return BackbonePerceptual(backbone, config.levels)
        except ValueError as error:
            raise UsageError(f"autoencoder.perceptual: {error}") from error
    return load_lpips(config, "autoencoder.perceptual")


def load_lpips(config: PerceptualSection, where: str) -> LPIPS:
    """Return LPIPS with VGG16, frozen, in eval mode.

    Args:
        config: names the two weight files.
        where: dotted name of the recipe's keys, for messages.

    Raises:
        ArtifactError: weights are not available, or do not fit.
    """
    lpips = LPIPS()
    try:
        lpips.load(_weights(config.vgg_weights, VGG, where), _weights(config.lpips_weights, LINEAR, where))
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from error
    return lpips.eval()


def _weights(source: str, download: Download, where: str) -> dict[str, Tensor]:
    if source != "hub":
        return read_weight_file(Path(source))
    try:
        return download.load()
    except Exception as error:  # urllib raises many kinds
        choice = "" if where == "reconstruction" else f", or choose --set {where}.kind=backbone"
        raise ArtifactError(
            f"{where}: could not download {download.url} ({first_line(error)}). Give local files with "
            f"--set {where}.vgg_weights=FILE and {where}.lpips_weights=FILE{choice}."
        ) from error
