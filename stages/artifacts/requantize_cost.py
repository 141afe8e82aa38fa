"""What storing features in fewer bytes costs: two caches of the same rows, compared in every way that matters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.checkpoint import AutoencoderManifest, DiffusionManifest
from svgpipe.manifests.errors import ArtifactError, MismatchError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import Json, require_same
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.manifests.shards import ShardSet

from ..extract.quantization import signal_to_noise
from ..images.decode import psnr
from ..images.stream import load_images
from ..networks.autoencoder import latent_decoder
from ..networks.diffusion import open_diffusion
from ..runtime.device import pick_device
from ..runtime.selection import choose_evenly
from ..train_diffusion.loss import heldout_loss
from ..training.distributed import ProcessGroup

COST_NAME = "cost.json"
# Rows that signal-to-noise and decoded images are measured on.
MEASURED_ROWS = 256


@dataclass(frozen=True)
class RequantizeCost:
    """Of the cache `small` against `reference`; None where `not_measured` says why."""

    reference_bytes: int
    small_bytes: int
    backbone_snr: float  # dB, over the frozen channels
    residual_snr: float | None  # dB, over the residual channels
    decoded_psnr: float | None  # dB, images decoded from `small` against those decoded from `reference`
    source_psnr_reference: float | None  # dB, images decoded from `reference` against the source images
    source_psnr_small: float | None  # dB, likewise from `small`
    heldout_loss_reference: float | None
    heldout_loss_small: float | None
    not_measured: tuple[str, ...]

    @property
    def bytes_ratio(self) -> float:
        """Bytes of `small` over those of `reference`."""
        return self.small_bytes / self.reference_bytes

    @property
    def psnr_change(self) -> float | None:
        """dB that the decoded images lose against the source images; positive is a loss."""
        if self.source_psnr_reference is None or self.source_psnr_small is None:
            return None
        return self.source_psnr_reference - self.source_psnr_small

    @property
    def loss_change(self) -> float | None:
        """Relative change of the trained model's held-out loss."""
        if self.heldout_loss_reference is None or self.heldout_loss_small is None:
            return None
        return self.heldout_loss_small / self.heldout_loss_reference - 1


def measure_cost(
    reference: FeatureCache,
    small: FeatureCache,
    *,
    autoencoder: Location | None,
    diffusion: Location | None,
) -> RequantizeCost:
    """Compare two caches of the same images.

    Args:
        autoencoder: that extracted them, to decode with. diffusion: trained on `reference`, for its held-out loss.
    Raises:
        MismatchError: an autoencoder or a diffusion model that does not belong to `reference`.
    """
    usable = np.flatnonzero(reference.valid)
    rows = choose_evenly(usable.tolist(), MEASURED_ROWS)
    frozen = reference.manifest.frozen_channels
    a, b = reference.read(rows), small.read(rows)
    residual = None if frozen == a.shape[-1] else signal_to_noise(a[..., frozen:], b[..., frozen:])
    missing: list[str] = []
    return RequantizeCost(
        reference_bytes=reference.manifest.num_bytes,
        small_bytes=small.manifest.num_bytes,
        backbone_snr=signal_to_noise(a[..., :frozen], b[..., :frozen]),
        residual_snr=residual,
        **_decoded(reference, small, rows, autoencoder, missing),
        **_losses(reference, small, diffusion, missing),
        not_measured=tuple(missing),
    )


def _decoded(
    reference: FeatureCache, small: FeatureCache, rows: list[int], autoencoder: Location | None, missing: list[str]
) -> dict[str, Any]:
    names = ("decoded_psnr", "source_psnr_reference", "source_psnr_small")
    if autoencoder is None:
        missing.append("decoded images: the autoencoder is not where the cache says; give --autoencoder")
        return dict.fromkeys(names)
    encoder = AutoencoderManifest.read(autoencoder)
    expected = reference.manifest.inputs["autoencoder"]
    what = "Decode with the autoencoder that extracted the cache."
    require_same(str(reference.path), expected, encoder.as_input(autoencoder), what_to_do=what)
    decode = latent_decoder(autoencoder)
    one, two = (decode(cache.denormalize(cache.read(rows))) for cache in (reference, small))
    between = psnr(one, two)
    found: dict[str, Any] = {"decoded_psnr": float(np.mean(np.minimum(between, 100.0)))}
    try:
        shards = ShardSet.of_input(reference.manifest.inputs["shards"])
        source = load_images(shards, rows, encoder.image_size)
    except (ArtifactError, MismatchError, OSError) as error:
        missing.append(f"distance to the source images: {error}")
        return {**found, "source_psnr_reference": None, "source_psnr_small": None}
    found["source_psnr_reference"], found["source_psnr_small"] = (float(psnr(source, x).mean()) for x in (one, two))
    return found


def _losses(
    reference: FeatureCache, small: FeatureCache, diffusion: Location | None, missing: list[str]
) -> dict[str, float | None]:
    if diffusion is None:
        missing.append("held-out loss of a trained model: none was given (--diffusion)")
        return {"heldout_loss_reference": None, "heldout_loss_small": None}
    manifest, trained = DiffusionManifest.read(diffusion), open_diffusion(diffusion)
    found = reference.manifest.as_input(reference.path)
    what = "Give a model that was trained on the cache itself."
    require_same(str(diffusion), manifest.inputs["cache"], found, what_to_do=what)
    config, group = DiffusionSection.model_validate(manifest.config), ProcessGroup(pick_device())
    model = trained.load().to(group.device)
    losses = [heldout_loss(model, cache, config, group) for cache in (reference, small)]
    if None in losses:
        missing.append("held-out loss: the cache has no held-out rows")
    return {"heldout_loss_reference": losses[0], "heldout_loss_small": losses[1]}


def _finite(value: Any) -> Any:
    """None for what JSON has no word for: the signal-to-noise ratio where there is no noise, or no signal."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_json(found: RequantizeCost) -> Json:
    """`cost.json`."""
    return {
        **{name: _finite(value) for name, value in vars(found).items() if name != "not_measured"},
        "bytes_ratio": found.bytes_ratio,
        "psnr_change": found.psnr_change,
        "loss_change": found.loss_change,
        "not_measured": list(found.not_measured),
    }
