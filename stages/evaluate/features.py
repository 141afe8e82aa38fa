"""Features of image sets, by torch-fidelity.

A distance is called FID only for the features of torch-fidelity's Inception. With a timm backbone it is a Fréchet
distance in the space of that backbone and is named so.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from svgpipe.manifests.autoencoder_section import BackboneSection
from svgpipe.manifests.errors import ArtifactError, UsageError, first_line
from svgpipe.manifests.evaluation_section import ExtractorSection
from svgpipe.manifests.feature_spaces import SPACES, SpaceName
from svgpipe.manifests.filesystem import Location, absolute, file_sha256
from svgpipe.manifests.manifest import InputRef, svgpipe_version
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.report_file import ExtractorInfo
from svgpipe.models.backbone import Backbone, own_input

from ..images.decode import RGBArray
from ..networks.backbone import build_backbone, state_digest
from ..networks.downloads import Download
from ..networks.weight_files import read_weight_file

POOLED, LOGITS, SPATIAL = "pooled", "logits", "spatial"
INCEPTION_LAYERS = {POOLED: "2048", LOGITS: "logits_unbiased"}
INCEPTION = "inception-v3-compat"
INCEPTION_SIZE = 299
INCEPTION_WEIGHTS = Download(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "6726825d",
)
SOFTWARE = ("torch", "torch-fidelity", "timm", "pillow", "scikit-image", "scipy", "numpy")


def software() -> dict[str, str]:
    """Return the versions of the libraries that determine a number."""
    return {"svgpipe": svgpipe_version(), **{name: metadata.version(name) for name in SOFTWARE}}


class SpatialInception(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """torch-fidelity's Inception, which also gives the features of sFID, (B,2023), under the name `spatial`.

    These are the first 7 channels of the 17x17 map of block Mixed_6d, in the order row, column, channel. Source:
    guided-diffusion evaluations/evaluator.py, where the block is `mixed_6/conv:0`.
    """

    CHANNELS = 7

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.returned = [*self.features_list, SPATIAL]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps: list[Tensor] = []
        hook = self.Mixed_6d.register_forward_hook(lambda _, __, output: maps.append(output[:, : self.CHANNELS]))
        try:
            others = super().forward(images)
        finally:
            hook.remove()
        return (*others, maps[0].permute(0, 2, 3, 1).flatten(1).float())

    def convert_features_tuple_to_dict(self, features: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip(self.returned, features, strict=True))


class BackboneExtractor(FeatureExtractorBase):  # type: ignore[misc]
    """The pooled embedding of a timm backbone as a torch-fidelity extractor: (B,3,H,W) uint8 → (B,D)."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__(backbone.name, [POOLED])
        self.backbone = backbone

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return (POOLED,)

    def forward(self, images: Tensor) -> tuple[Tensor]:
        model = self.backbone.model
        features = model.forward_features(self.backbone.prepare(images.float() / 255))
        return (model.forward_head(features, pre_logits=True).float(),)


@dataclass(frozen=True)
class Extractor:
    """A feature extractor and its description."""

    module: nn.Module
    layers: dict[str, str]  # POOLED, and LOGITS and SPATIAL if it has them, by the names in the module
    space: str  # what statistics of a reference must be of: the network, and its input size if that is not its own
    metric: str
    description: ExtractorInfo
    dimensions: int  # of POOLED
    source: Callable[[], Extractor]  # loads the same again, in another process

    @torch.no_grad()
    def features(self, images: RGBArray, batch_size: int) -> dict[str, Tensor]:
        """Return features (n,D) float32 on the CPU, by layer, of images (n,H,W,3) uint8."""
        device = next(self.module.parameters()).device
        batches = []
        for part in torch.from_numpy(images).permute(0, 3, 1, 2).split(batch_size):
            found = self.module(part.contiguous().to(device))
            by_layer = self.module.convert_features_tuple_to_dict(found)  # type: ignore[operator]
            batches.append({name: by_layer[layer].float().cpu() for name, layer in self.layers.items()})
        return {name: torch.cat([batch[name] for batch in batches]) for name in self.layers}


def weight_inputs(**sources: str) -> dict[str, InputRef]:
    """Return the fingerprints of local weight files as inputs of an evaluation. `hub` and others are not files."""
    files = {name: Path(source) for name, source in sources.items()}
    return {
        name: InputRef(kind="weights", fingerprint=file_sha256(path), path=str(path), config={})
        for name, path in files.items()
        if path.is_file()
    }


def space_extractor(name: SpaceName, weights: str) -> Extractor:
    """Load the network of another feature space.

    Returns:
        The extractor.

    Raises:
        ArtifactError: weights are neither given nor downloadable. The message says which file and which option.
    """
    space, key = SPACES[name], f"evaluation.spaces.{name}"
    section = ExtractorSection(kind="timm", name=space.model, weights=weights, input_size=space.input_size)
    return load_extractor(section, None, key, weights_key=key)


def extractor_for(
    config: ExtractorSection,
    encoder: AutoencoderManifest,
    autoencoder: Location,
    where: str = "evaluation.extractor",
    *,
    spatial: bool = False,
) -> Extractor:
    """Load the extractor of a recipe, with the backbone of the autoencoder if it is asked for.

    Returns:
        The extractor.

    Raises:
        UsageError: the autoencoder has no backbone.
        ArtifactError: see `load_extractor`.
    """
    again = partial(extractor_for, _absolute(config), encoder, absolute(autoencoder), where, spatial=spatial)
    backbone = None
    if config.kind == "backbone":
        if not encoder.backbone_weights:
            raise UsageError(
                f"{where}.kind: backbone is that of the autoencoder, but {autoencoder} was made without one. Choose "
                "inception, or timm with a name."
            )
        backbone = build_backbone(encoder.section.backbone, encoder.image_size, autoencoder)
    return replace(load_extractor(config, backbone, where, spatial=spatial), source=again)


def _absolute(config: ExtractorSection) -> ExtractorSection:
    """Return the same with an absolute path of weights, for processes with another current directory."""
    path = Path(config.weights)
    return config.model_copy(update={"weights": str(path.absolute())}) if path.is_file() else config


def load_extractor(
    config: ExtractorSection,
    backbone: Backbone | None,
    where: str = "evaluation.extractor",
    *,
    spatial: bool = False,
    weights_key: str | None = None,
) -> Extractor:
    """Load the extractor of a recipe.

    Args:
        config: section of the recipe.
        backbone: of the autoencoder, for kind `backbone`.
        where: dotted name of the section, for messages.
        spatial: also the features of sFID, of Inception.
        weights_key: dotted name of the key of the weights; default: `weights` in the section.

    Returns:
        The extractor.

    Raises:
        ArtifactError: weights are neither given nor downloadable. The message says which file and which option.
        UsageError: an unknown timm model.
    """
    if config.kind == "timm":
        backbone = _timm(config, where, weights_key)
    if config.kind != "inception":
        assert backbone is not None, "built where the recipe names kind backbone"
        size = _other_size(config, backbone.name)
        return Extractor(
            BackboneExtractor(backbone).eval(),
            {POOLED: POOLED},
            backbone.name + size,
            f"Fréchet distance in {backbone.name} space{size} (not FID)",
            _record(config.kind, backbone.name, backbone, backbone.input_size, "timm"),
            int(backbone.model.head_hidden_size),
            partial(load_extractor, _absolute(config), None if config.kind == "timm" else backbone, where),
        )
    return _inception(config, where, spatial=spatial)


def _inception(config: ExtractorSection, where: str, *, spatial: bool) -> Extractor:
    """Return torch-fidelity's Inception.

    Raises:
        ArtifactError: its weights are neither given nor downloadable.
    """
    state = None if config.weights == "hub" else read_weight_file(Path(config.weights))
    try:
        with contextlib.redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            # torch-fidelity unpickles its file, so it is given one that holds only tensors.
            safe = Path(folder) / "inception.pth"
            torch.save(INCEPTION_WEIGHTS.load() if state is None else state, safe)
            network = SpatialInception if spatial else FeatureExtractorInceptionV3
            module = network(INCEPTION, list(INCEPTION_LAYERS.values()), feature_extractor_weights_path=str(safe))
    except Exception as error:  # errors of urllib, and of torch for a damaged file
        raise ArtifactError(
            f"{where}: Inception weights could not be loaded ({first_line(error)}). "
            f"Download {INCEPTION_WEIGHTS.url} and give it with --set {where}.weights=FILE, or measure in another "
            f"space: --set {where}.kind=backbone (of the autoencoder), or timm."
        ) from error
    published = config.weights == "hub" or INCEPTION_WEIGHTS.is_file(Path(config.weights))
    return Extractor(
        module.eval(),
        INCEPTION_LAYERS | ({SPATIAL: SPATIAL} if spatial else {}),
        INCEPTION,
        "FID" if published else f"Fréchet distance with the Inception weights {Path(config.weights).name} (not FID)",
        _record("inception", INCEPTION, module, INCEPTION_SIZE, "torch-fidelity"),
        int(INCEPTION_LAYERS[POOLED]),
        partial(load_extractor, _absolute(config), None, where, spatial=spatial),
    )


def _other_size(config: ExtractorSection, name: str) -> str:
    """Return ` at N pixels` for an input size that is not the model's own, because it gives other features; else ``."""
    if config.input_size is None or config.input_size == own_input(name)[0]:
        return ""
    return f" at {config.input_size} pixels"


def _record(kind: str, name: str, network: nn.Module, input_size: int, library: str) -> ExtractorInfo:
    return ExtractorInfo(
        kind=kind,
        name=name,
        weights=state_digest(network.state_dict()),
        input_size=input_size,
        library=f"{library} {metadata.version(library)}",
    )


def _timm(config: ExtractorSection, where: str, weights_key: str | None) -> Backbone:
    """Return a timm model at the recipe's input size or its own, pooled as for its classifier.

    Raises:
        UsageError: an unknown model, or an input size that it cannot take.
    """
    assert config.name is not None, "the section is validated"
    try:
        own_size, level = own_input(config.name)
    except ValueError as error:
        raise UsageError(f"{where}.name: {error}") from error
    size = config.input_size or own_size
    section = BackboneSection(name=config.name, weights=config.weights, input_size=size, feature_level=level)
    if size == own_size:
        return build_backbone(section, size, where=where, pooled=True, weights_key=weights_key)
    try:
        backbone = build_backbone(section, size, where=where, pooled=True, weights_key=weights_key)
        BackboneExtractor(backbone)(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:  # timm's, in the constructor or in the forward pass
        raise UsageError(
            f"{where}.input_size: {config.name} does not take images of {size} pixels ({first_line(error)}). "
            f"Leave it out for the model's own, {own_size}."
        ) from error
    return backbone
