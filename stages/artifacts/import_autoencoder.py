"""Imports a released autoencoder: SVG's Lightning checkpoint, SD-VAE or VA-VAE."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from svgpipe.manifests.autoencoder_section import (
    AutoencoderSection,
    BackboneSection,
    DecoderSection,
    KLSection,
    ResidualSection,
)
from svgpipe.manifests.checkpoint import save_tensors
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.model_manifests import AUTOENCODER_FILE, BACKBONE_FILE, AutoencoderManifest
from svgpipe.manifests.workdir import StageSpec, WorkDir
from svgpipe.models.autoencoder import Autoencoder
from svgpipe.models.convert import decoder_from_official, residual_from_official
from svgpipe.models.official import backbone_name, decoder_sizes, residual_sizes, split_autoencoder
from svgpipe.models.official_transformer import system_of
from svgpipe.models.official_vae import is_kl_autoencoder, kl_from_official
from svgpipe.models.svg_autoencoder import SVGAutoencoder

from ..networks.autoencoder import build_autoencoder, described
from ..networks.backbone import state_digest
from .imported import Imported, as_input, beside
from .official_files import read_official, tensors_of

IMAGE_SIZE = 256  # of images for a KL autoencoder, whose weights fit any size


@dataclass(frozen=True)
class _Converted:
    """An autoencoder with official weights.

    Attributes:
        backbone: weights of the frozen model, to be stored beside it.
        used: number of tensors of the file.
    """

    config: AutoencoderSection
    model: Autoencoder
    backbone: dict[str, Tensor] | None
    used: int
    ignored: dict[str, list[str]]
    what: str


def import_autoencoder(path: Path, out: Location, image_size: int | None) -> Imported:
    """Convert a released autoencoder and publish it at `out`.

    Args:
        path: official file.
        out: directory of the autoencoder.
        image_size: pixels per side of the images, for SD-VAE and VA-VAE; None: 256.

    Returns:
        What was imported.

    Raises:
        ArtifactError: the file is missing, unsafe, of another kind, or has unknown keys.
        UsageError: an image size for SVG, whose size is in the file.
    """
    checkpoint = read_official(path)
    _require_no_transformer(path, checkpoint)
    state = tensors_of(path, checkpoint, "state_dict")
    try:
        converted = _kl(state, image_size or IMAGE_SIZE) if is_kl_autoencoder(state) else _svg(state)
    except (ValueError, RuntimeError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    if image_size is not None and converted.config.image_size != image_size:
        raise UsageError(f"--image-size: {path} is for images of {converted.config.image_size} pixels.")
    source = as_input(path, "official-autoencoder")
    config = converted.config.model_dump(mode="json")
    with WorkDir(StageSpec(out, AutoencoderManifest, config, {"official": source})) as work:
        manifest = work.finished or work.publish(_manifest(converted, out, f"{path.name}, sha256 {source.fingerprint}"))
    ignored = {**converted.ignored, **beside(checkpoint, ["state_dict"])}
    return Imported(out, manifest.fingerprint, converted.what, converted.used, ignored)


def _require_no_transformer(path: Path, checkpoint: Any) -> None:
    """Check that a file is not a transformer, bare or in a training checkpoint.

    Raises:
        ArtifactError: it is.
    """
    held = checkpoint if isinstance(checkpoint, dict) else {}
    for state in (held, *(held.get(name) for name in ("ema", "model"))):
        if isinstance(state, dict) and (system := system_of(state)) is not None:
            raise ArtifactError(
                f"{path}: expected an autoencoder, found a transformer that looks like {system}: give it as "
                "--diffusion."
            )


def _manifest(converted: _Converted, out: Location, origin: str) -> AutoencoderManifest:
    """Write the weights.

    Returns:
        The manifest.
    """
    weights, model = "", converted.model
    if converted.backbone is not None and isinstance(model, SVGAutoencoder):
        save_tensors(out / BACKBONE_FILE, converted.backbone)
        weights = state_digest(model.backbone.state_dict())
    fields: dict[str, Any] = described(model, converted.config)
    return AutoencoderManifest(
        **fields,
        steps=0,
        backbone_weights=weights,
        content=save_tensors(out / AUTOENCODER_FILE, model.trained_state()),
        origin=origin,
    )


def _kl(state: dict[str, Tensor], image_size: int) -> _Converted:
    """Return a KL autoencoder.

    Raises:
        ValueError: keys or shapes without a place.
        UsageError: its stride does not divide the images.
    """
    official = kl_from_official(state)
    stride = 2 ** (len(official.sizes.ch_mult) - 1)
    if image_size % stride:
        raise UsageError(f"--image-size: expected a multiple of the stride {stride}, found {image_size}.")
    sizes = DecoderSection(
        ch=official.sizes.ch,
        ch_mult=official.sizes.ch_mult,
        num_res_blocks=official.sizes.num_res_blocks,
        attention=official.sizes.attention,
    )
    config = AutoencoderSection(
        kind="kl", image_size=image_size, decoder=sizes, kl=KLSection(channels=official.sizes.z_channels), steps=0
    )
    model = build_autoencoder(config)
    model.load_trained_state(official.state)
    what = f"KL autoencoder for {image_size} pixels, stride {stride}, {model.channels} channels"
    used = len(state) - sum(map(len, official.ignored.values()))
    return _Converted(config, model, None, used, official.ignored, what)


def _svg(state: dict[str, Tensor]) -> _Converted:
    """Return SVG's autoencoder.

    Raises:
        ValueError: keys or shapes without a place.
    """
    if not any(key.startswith(("extra_vit.", "encoder.", "decoder.")) for key in state):
        raise ValueError(
            "expected SVG's autoencoder (extra_vit.*) or a KL autoencoder (encoder.conv_in.weight), found keys like "
            f"{next(iter(state))}"
        )
    parts = split_autoencoder(state)
    residual, decoder = residual_sizes(parts.extra_vit), decoder_sizes(parts.decoder)
    name = backbone_name(parts.encoder)
    config = AutoencoderSection(
        image_size=int(residual["image_size"]),
        backbone=BackboneSection(name=name, weights="beside"),
        residual=ResidualSection.model_validate(
            {key: residual[key] for key in ("channels", "depth", "width", "heads", "mlp_ratio")}
        ),
        decoder=DecoderSection.model_validate(decoder, from_attributes=True),
        steps=0,
    )
    model = build_autoencoder(config.model_copy(update={"backbone": BackboneSection(name=name, weights="random")}))
    assert isinstance(model, SVGAutoencoder)
    model.backbone.load(parts.encoder)
    own = model.trained_state()
    model.load_trained_state(
        {
            "mask_token": parts.mask_token.reshape(own["mask_token"].shape),
            **{f"residual.{k}": v for k, v in residual_from_official(parts.extra_vit).items()},
            **{f"decoder.{k}": v for k, v in decoder_from_official(parts.decoder).items()},
            **{k: v for k, v in own.items() if k.startswith("alignment.")},  # measured later
        }
    )
    what = f"autoencoder for {config.image_size} pixels, {name}, {residual['channels']} residual channels"
    used = sum(map(len, (parts.encoder, parts.extra_vit, parts.decoder))) + 1
    return _Converted(config, model, parts.encoder, used, parts.ignored, what)
