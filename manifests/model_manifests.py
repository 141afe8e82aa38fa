"""Manifests of autoencoders and diffusion models, and the names of their files and weights. Does not need torch."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import ClassVar, Literal

from pydantic import Field

from .autoencoder_section import AutoencoderSection
from .errors import MismatchError, UsageError
from .filesystem import Location
from .manifest import InputRef, Json, Manifest, require_same
from .store_spec import Distribution

AUTOENCODER_FILE = "autoencoder.safetensors"
BACKBONE_FILE = "backbone.safetensors"
STATISTICS_FILE = "statistics.safetensors"
# Weights without EMA, the name for the recipe's first EMA decay, and averages that were reconstructed afterwards.
RAW, EMA, POWER = "raw", "ema", "power"
System = Literal["svg", "dit", "sit", "repa", "lightningdit"]  # whose transformers can be imported
OFFICIAL_LATENTS = "official-latents"  # kind of the input of an imported model that replaces the cache


def average_name(decay: float) -> str:
    """Return the name of the EMA weights with this decay: `ema-0.9999`."""
    return f"{EMA}-{decay!r}"


def power_name(sigma: float) -> str:
    """Return the name of the power average of this length: `power-0.05`."""
    return f"{POWER}-{sigma!r}"


def choose_weights(decays: Sequence[float], choice: str) -> str:
    """Return the name of the weights that `ema` (first decay), `ema-DECAY`, `DECAY`, `power-SIGMA` or `raw` stands for.

    Whether a power average was reconstructed is not checked here.

    Raises:
        UsageError: the model has no EMA weights of this decay.
    """
    names = [*map(average_name, decays), RAW]
    with suppress(ValueError):
        if choice.startswith(f"{POWER}-"):
            return power_name(float(choice.removeprefix(f"{POWER}-")))
    name = names[0] if choice == EMA else choice
    with suppress(ValueError):  # 0.90 and ema-0.90 mean the decay 0.9
        name = average_name(float(choice.removeprefix(f"{EMA}-")))
    if name not in names:
        raise UsageError(f"weights {choice!r}: expected one of {EMA}, {', '.join(names)}.")
    return name


def weights_file(name: str) -> str:
    """Return the file name of the weights `raw` or `ema-DECAY`."""
    return f"{name}.safetensors"


class AutoencoderManifest(Manifest):
    """A trained autoencoder: shape of its latents, hash of the trained part."""

    KIND: ClassVar[str] = "autoencoder"
    NOUN: ClassVar[str] = "an autoencoder"
    GROWS: ClassVar[frozenset[str]] = frozenset({"steps"})
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset({"heldout_psnr", "reconstruction_grid", "origin"})
    ADDED: ClassVar[frozenset[str]] = frozenset({"posterior_channels"})

    kind: Literal["autoencoder"] = "autoencoder"
    steps: int
    image_size: int
    grid: tuple[int, int]
    frozen_channels: int = Field(description="Channels of the backbone's features in a latent.")
    residual_channels: int = Field(description="Channels of the residual encoder in a latent.")
    posterior_channels: int = Field(0, description="kl and aligned-kl: channels of a latent.")
    backbone_weights: str = Field(description="sha256 over the backbone's tensors, as loaded; empty: none was needed.")
    alignment: list[float] | None = Field(
        description="Alignment scalars: frozen mean, std, residual mean, std. Imported ones: see alignment.json."
    )
    content: str = Field(description=f"sha256 of {AUTOENCODER_FILE}.")
    heldout_psnr: float | None = Field(None, description="dB, mean over held-out images; null without any.")
    reconstruction_grid: str | None = None
    origin: str | None = Field(None, description="Imported: source file and its sha256.")

    @classmethod
    def upgraded(cls, config: Json) -> Json:
        """Return a config with `kind`, which replaces `residual.enabled` of older versions."""
        if "kind" in config:
            return config
        residual = dict(config["residual"])
        kind = "svg" if residual.pop("enabled", True) else "vision"
        new = AutoencoderSection().model_dump(mode="json", include={"kl", "vision_loss"})
        return {**config, "kind": kind, "residual": residual, **new}

    @property
    def section(self) -> AutoencoderSection:
        """Section of the recipe that it was made with."""
        return AutoencoderSection.model_validate(self.upgraded(self.config))

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.frozen_channels + self.residual_channels + self.posterior_channels

    @property
    def distribution(self) -> Distribution:
        """What is stored of an image: a point, or mean and standard deviation of a posterior."""
        return "gaussian" if self.posterior_channels else "point"

    @property
    def stored_channels(self) -> int:
        """Channels of a cache: those of a latent, twice for a posterior."""
        return self.channels * (2 if self.distribution == "gaussian" else 1)


def encoder_of(autoencoder: InputRef) -> str:
    """Return the fingerprint of the autoencoder whose encoder it has: a fine-tuned decoder keeps that of its source."""
    while "autoencoder" in autoencoder.inputs:
        autoencoder = autoencoder.inputs["autoencoder"]
    return autoencoder.fingerprint


def require_decoder(
    where: str, recorded: InputRef | None, shape: tuple[int, int, int], autoencoder: Location, what_to_do: str
) -> AutoencoderManifest:
    """Check that an autoencoder decodes some latents: its encoder made them, or, if not recorded, it has their shape.

    Args:
        where: of the latents, for messages.
        recorded: autoencoder that made them; None: not recorded, as for features that others computed.
        shape: rows, columns and channels of a latent.
        autoencoder: the one that was given.
        what_to_do: last sentence of the message.

    Returns:
        Its manifest.

    Raises:
        MismatchError: it does not.
    """
    encoder = AutoencoderManifest.read(autoencoder)
    given = encoder.as_input(autoencoder)
    if recorded is not None and encoder_of(recorded) != encoder_of(given):
        require_same(where, recorded, given, what_to_do=what_to_do)
    own = (*encoder.grid, encoder.channels)
    if own != shape:
        raise MismatchError(f"{where}: holds latents of {shape}, but {autoencoder} decodes {own}. {what_to_do}")
    return encoder


class DiffusionManifest(Manifest):
    """A trained diffusion transformer, with the normalisation statistics of its latents."""

    KIND: ClassVar[str] = "diffusion"
    NOUN: ClassVar[str] = "a diffusion model"
    GROWS: ClassVar[frozenset[str]] = frozenset({"steps"})
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset(
        {"heldout_loss", "num_parameters", "origin", "untrained_classes"}
    )

    kind: Literal["diffusion"] = "diffusion"
    steps: int = Field(description="Training steps; 0 for an imported model, whose file does not say.")
    grid: tuple[int, int]
    channels: int
    class_names: list[str]
    content: dict[str, str] = Field(description="sha256 of each safetensors file.")
    num_parameters: int
    untrained_classes: list[int] = Field([], description="Class indexes without training images; never sampled.")
    heldout_loss: float | None = None
    origin: str | None = Field(None, description="Imported: source file and its sha256.")

    @classmethod
    def upgraded(cls, config: Json) -> Json:
        """Return a config with `objective`, which was always flow in older versions."""
        return {"objective": "flow", **config}
