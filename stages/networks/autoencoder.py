"""Builds an `Autoencoder` from a recipe section or an artifact, and checks its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from svgpipe.manifests.alignment import MeasuredAlignment
from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.checkpoint import load_tensors
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.model_manifests import AUTOENCODER_FILE, AutoencoderManifest
from svgpipe.models.autoencoder import Autoencoder, DecoderAlone, LatentDecoder
from svgpipe.models.backbone import Backbone
from svgpipe.models.decoder import Decoder
from svgpipe.models.encoder import Encoder
from svgpipe.models.kl_autoencoder import KLAutoencoder
from svgpipe.models.residual import ResidualEncoder
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.models.vit_decoder import ViTDecoder

from ..images.decode import RGBArray
from ..images.tensors import as_pixels, as_unit_range
from ..runtime.device import pick_device
from .backbone import build_backbone, state_digest


def build_autoencoder(config: AutoencoderSection, directory: Location | None = None) -> Autoencoder:
    """Return a new autoencoder with a loaded backbone, if it has one; everything else is initialised.

    Args:
        config: section of the recipe.
        directory: see `build_backbone`.

    Raises:
        UsageError: sizes do not match; the message says what would.
        ArtifactError: backbone weights are not available.
    """
    backbone = None
    if config.encodes_with_backbone:
        backbone = build_backbone(config.backbone, config.image_size, directory)
    latent_grid(config, backbone)
    try:
        # Initial weights depend only on the recipe's seed.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return _new_kl(config) if backbone is None else _new_svg(config, backbone)
    except ValueError as error:
        raise UsageError(f"autoencoder: {error}") from error


def latent_grid(config: AutoencoderSection, backbone: Backbone | None) -> int:
    """Return the rows and columns of the latents.

    Args:
        config: section of the recipe.
        backbone: the one that encodes; None for a KL autoencoder.

    Raises:
        UsageError: the levels of the decoder, or the patches of a ViT, do not match the image.
    """
    size, levels = config.image_size, len(config.decoder.ch_mult)
    stride = 2 ** (levels - 1)
    if backbone is None and size % stride:
        raise UsageError(
            f"autoencoder.image_size: {levels} levels in decoder.ch_mult make a stride of {stride}, expected a "
            f"multiple of it, found {size}."
        )
    grid = size // stride if backbone is None else backbone.grid
    if config.decoder.vit is not None:
        if size % grid:
            raise UsageError(
                f"autoencoder.decoder.vit: expected an image_size that is a multiple of the backbone's {grid}x{grid} "
                f"grid, found {size}. Change backbone.input_size or image_size."
            )
        return grid
    if grid * stride != size:
        raise UsageError(
            f"autoencoder.decoder.ch_mult: {levels} levels make {grid * stride} pixels of the backbone's "
            f"{grid}x{grid} grid, expected image_size {size}. Change ch_mult, backbone.input_size or image_size."
        )
    return grid


def _new_kl(config: AutoencoderSection) -> KLAutoencoder:
    sizes, channels = config.decoder, config.kl.channels
    encoder = Encoder(
        z_channels=channels,
        ch=sizes.ch,
        ch_mult=sizes.ch_mult,
        num_res_blocks=sizes.num_res_blocks,
        attention=sizes.attention,
    )
    return KLAutoencoder(encoder, _new_convolutions(config, channels, config.image_size // encoder.factor), channels)


def _new_decoder(config: AutoencoderSection, channels: int, grid: int) -> Decoder | ViTDecoder:
    if config.decoder.vit is not None:
        sizes = config.decoder.vit.model_dump()
        return ViTDecoder(z_channels=channels, grid=grid, patch=config.image_size // grid, **sizes)
    return _new_convolutions(config, channels, grid)


def _new_convolutions(config: AutoencoderSection, channels: int, grid: int) -> Decoder:
    return Decoder(
        z_channels=channels,
        ch=config.decoder.ch,
        ch_mult=config.decoder.ch_mult,
        num_res_blocks=config.decoder.num_res_blocks,
        attn_resolutions=(grid,) if config.decoder.attention else (),
        resolution=config.image_size,
    )


def _new_svg(config: AutoencoderSection, backbone: Backbone) -> SVGAutoencoder:
    grid, size = backbone.grid, config.image_size
    residual = None
    if config.kind == "svg":
        residual = ResidualEncoder(
            image_size=size,
            patch_size=size // grid,
            channels=config.residual.channels,
            depth=config.residual.depth,
            width=config.residual.width,
            heads=config.residual.heads,
            mlp_ratio=config.residual.mlp_ratio,
            dropout=config.residual.dropout,
        )
    decoder = _new_decoder(config, backbone.channels + (residual.channels if residual else 0), grid)
    section = config.residual
    return SVGAutoencoder(backbone, decoder, residual, align=section.align, mask_ratio=section.mask_ratio)


def new_decoder_alone(config: AutoencoderSection, channels: int, grid: int) -> DecoderAlone:
    """Return the decoding part of an autoencoder, initialised. `channels` and `grid` are those of its latents."""
    decoder = _new_decoder(config, channels, grid)
    return DecoderAlone(decoder, None if config.encodes_with_backbone else nn.Conv2d(channels, channels, 1))


def load_decoder(directory: Location) -> tuple[DecoderAlone, AutoencoderManifest]:
    """Open the decoder of a finished autoencoder in eval mode. Its encoder is not even built.

    Returns:
        Model and manifest.

    Raises:
        ArtifactError: unfinished, damaged or missing weights.
    """
    manifest = AutoencoderManifest.read(directory)
    model = new_decoder_alone(manifest.section, manifest.channels, manifest.grid[0])
    try:
        weights = load_tensors(directory / AUTOENCODER_FILE, manifest.content)
        model.load_trained_state({key: weights[key] for key in model.trained_state()})
    except (ValueError, KeyError) as error:
        raise ArtifactError(f"{directory / AUTOENCODER_FILE}: {error}") from error
    return model.eval(), manifest


def described(model: Autoencoder, config: AutoencoderSection) -> dict[str, Any]:
    """Return the fields of a manifest that say what latents are like: image_size, grid, channels, alignment."""
    described: dict[str, Any] = {"image_size": config.image_size, "alignment": None}
    if not isinstance(model, SVGAutoencoder):
        side = latent_grid(config, None)
        none = {"frozen_channels": 0, "residual_channels": 0}
        return {**described, **none, "grid": (side, side), "posterior_channels": model.channels}
    side, frozen = model.backbone.grid, model.backbone.channels
    if model.alignment is not None and model.can_encode:
        described["alignment"] = [float(value) for value in model.alignment.scalars]
    channels = {"frozen_channels": frozen, "residual_channels": model.channels - frozen}
    return {**described, **channels, "grid": (side, side)}


def load_autoencoder(directory: Location) -> tuple[Autoencoder, AutoencoderManifest]:
    """Open a finished autoencoder in eval mode. Every weight is checked against the manifest.

    An imported autoencoder has the alignment of its first use. Before that it cannot encode.

    Returns:
        Model and manifest.

    Raises:
        ArtifactError: unfinished, damaged or missing weights.
        MismatchError: the weights of the backbone are not those of the training.
    """
    manifest = AutoencoderManifest.read(directory)
    model = build_autoencoder(manifest.section, directory)
    if isinstance(model, SVGAutoencoder):
        _require_same_backbone(model.backbone, directory, manifest)
    try:
        model.load_trained_state(load_tensors(directory / AUTOENCODER_FILE, manifest.content))
    except ValueError as error:
        raise ArtifactError(f"{directory / AUTOENCODER_FILE}: {error}") from error
    if isinstance(model, SVGAutoencoder) and model.alignment is not None and manifest.alignment is None:
        measured = MeasuredAlignment.read(directory)
        if measured is not None:
            model.alignment.freeze(torch.tensor(measured.scalars))
    return model.eval(), manifest


def _require_same_backbone(backbone: Backbone, directory: Location, manifest: AutoencoderManifest) -> None:
    """Check that a backbone is the one of the training.

    Raises:
        MismatchError: it is not.
    """
    found, config = state_digest(backbone.state_dict()), manifest.section.backbone
    if found != manifest.backbone_weights:
        raise MismatchError(
            f"{directory}: was trained with backbone weights {manifest.backbone_weights[:12]}, but "
            f"{config.weights} gives {found[:12]} for {config.name}. Use the original weights."
        )


@torch.no_grad()
def reconstruct(
    model: Autoencoder, pixels: RGBArray, batch_size: int, *, residual: bool = True, noise: Tensor | None = None
) -> RGBArray:
    """Encode and decode (N,S,S,3) uint8 in eval mode. The result does not depend on `batch_size`.

    Args:
        model: autoencoder.
        pixels: images.
        batch_size: images per forward pass.
        residual: False: the mask token replaces the residual, if the autoencoder has a residual encoder.
        noise: (N,row,column,channel), added to the un-normalised latents.

    Returns:
        (N,S,S,3) uint8; of a posterior, its mean is decoded.
    """
    device = next(model.parameters()).device
    encode = model.encode
    if isinstance(model, SVGAutoencoder) and not residual:
        encode = model.encode_without_residual
    parts = []
    for i in range(0, len(pixels), batch_size):
        latents = model.latents(encode(as_unit_range(pixels[i : i + batch_size]).to(device)))
        if noise is not None:
            latents = latents + noise[i : i + batch_size].permute(0, 3, 1, 2).to(latents)
        parts.append(as_pixels(model.decode(latents)))
    return np.concatenate(parts) if parts else pixels


@torch.inference_mode()
def decode_latents(model: LatentDecoder, latents: Tensor, batch_size: int = 64) -> RGBArray:
    """Decode denormalised latents (n,row,column,channel) float32 to (n,H,W,3) uint8.

    Returns:
        The images.
    """
    device, features = next(model.parameters()).device, latents.permute(0, 3, 1, 2)
    return np.concatenate([as_pixels(model.decode(part.to(device))) for part in features.split(batch_size)])


def latent_decoder(autoencoder: Location) -> Callable[[NDArray[np.float32]], RGBArray]:
    """Return `decode_latents` of arrays with the decoder at `autoencoder`, which is loaded at once.

    Raises the errors of `load_decoder`.
    """
    model = load_decoder(autoencoder)[0].to(pick_device())
    return lambda latents: decode_latents(model, torch.from_numpy(latents))
