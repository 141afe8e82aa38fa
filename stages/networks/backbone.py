"""Builds the frozen vision model of a recipe, and finds its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

import timm
import torch
from torch import Tensor

from svgpipe.manifests.autoencoder_section import BackboneSection
from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.errors import ArtifactError, UsageError, first_line
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.model_manifests import BACKBONE_FILE
from svgpipe.models.backbone import Backbone, Layers
from svgpipe.models.convert import in_order

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
    weights_key: str | None = None,
) -> Backbone:
    """Return the backbone of a recipe with its weights.

    Args:
        config: section of the recipe.
        image_size: pixels per side of the images.
        directory: of its autoencoder, for weights `beside`.
        where: dotted name of the section, for messages.
        pooled: only the pooled embedding is used, so the input need not be a multiple of the stride.
        weights_key: dotted name of the key of the weights, for messages; default: `weights` in the section.

    Raises:
        UsageError: an unknown model, or a feature level that it does not have.
        ArtifactError: weights are missing, cannot be downloaded, or do not fit.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            size = config.input_size or image_size
            backbone = Backbone(
                config.name, input_size=size, feature_level=config.feature_level, layers=_layers(config)
            )
            _ = pooled or backbone.grid
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    if config.weights == "random":
        return backbone
    key = weights_key or f"{where}.weights"
    state = _find_weights(config, directory, key)
    try:
        backbone.load(state)
    except ValueError as error:
        raise ArtifactError(f"{key} {config.weights}: {error}") from error
    return backbone


def _layers(config: BackboneSection) -> Layers | None:
    blocks = config.layers if config.last is None else config.last
    return None if blocks is None else Layers(blocks, config.combine or "mean", config.spatial_mean)


def _find_weights(config: BackboneSection, directory: Location | None, key: str) -> dict[str, Tensor]:
    if directory is not None and config.is_file and (directory / BACKBONE_FILE).exists():
        return load_tensors(directory / BACKBONE_FILE)
    if config.weights == "beside":
        if directory is None:
            raise UsageError(
                f"{key}=beside: only an imported autoencoder has its backbone next to it. Give "
                "a file, hub, random or package:NAME."
            )
        return load_tensors(directory / BACKBONE_FILE)
    if config.weights == "hub":
        return _from_hub(config.name, key)
    if config.weights.startswith("package:"):
        state = read_weight_file(_package_file(config.weights.removeprefix("package:"), key))
        try:
            # Keys of another package for the same model: matched by order, head included.
            return in_order(state, timm.create_model(config.name, pretrained=False).state_dict())
        except ValueError as error:
            raise ArtifactError(f"{key} {config.weights}: {error}") from error
    return read_weight_file(Path(config.weights))


def keep_backbone(config: BackboneSection, directory: Location) -> None:
    """Copy the weight file of a recipe to `directory`, where other folders and nodes find it.

    Raises:
        ArtifactError: the file is missing or unreadable.
    """
    if config.is_file and not (directory / BACKBONE_FILE).exists():
        save_tensors(directory / BACKBONE_FILE, read_weight_file(Path(config.weights)))


def _from_hub(name: str, key: str) -> dict[str, Tensor]:
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # timm and the hub client raise many kinds
        raise ArtifactError(
            f"{key}: could not get the weights of {name} from the model hub "
            f"({first_line(error)}). Give a local "
            f"file with --set {key}=FILE (timm or Meta keys), or use =random."
        ) from error
    return dict(model.state_dict())


def _package_file(name: str, key: str) -> Path:
    try:
        files = metadata.files(name) or []
    except metadata.PackageNotFoundError as error:
        raise ArtifactError(
            f"{key} package:{name}: the package is not installed. Install it with `pip install {name}`."
        ) from error
    weight_files = [f for f in files if f.suffix in {".pth", ".pt", ".safetensors"}]
    if len(weight_files) != 1:
        raise ArtifactError(f"package {name}: expected one weight file, found {len(weight_files)}.")
    return Path(str(weight_files[0].locate()))
