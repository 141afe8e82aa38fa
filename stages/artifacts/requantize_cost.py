"""The loss of storing features in fewer bytes: comparison of two caches of the same rows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.errors import ArtifactError, MismatchError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import FrozenModel, require_same
from svgpipe.manifests.model_manifests import DiffusionManifest, require_decoder
from svgpipe.manifests.selection import choose_evenly
from svgpipe.manifests.shards import ShardSet

from ..extract.quantization import signal_to_noise
from ..images.decode import psnr
from ..images.stream import load_images
from ..networks.autoencoder import latent_decoder
from ..networks.diffusion import open_diffusion
from ..runtime.device import pick_device
from ..train_diffusion.loss import heldout_loss
from ..training.distributed import ProcessGroup

COST_NAME = "cost.json"
# Rows that signal to noise and decoded images are measured on.
MEASURED_ROWS = 256


class RequantizeCost(FrozenModel):
    """`cost.json`: the cache `small` against `reference`; null if not measured, or for infinite dB."""

    reference_bytes: int
    small_bytes: int
    bytes_ratio: float = Field(description="small / reference.")
    snr: dict[str, float | None] = Field(description="dB, by group of channels.")
    decoded_psnr: float | None = Field(None, description="dB, images decoded from small against those from reference.")
    source_psnr_reference: float | None = Field(None, description="dB, images decoded from reference against sources.")
    source_psnr_small: float | None = Field(None, description="dB, images decoded from small against sources.")
    psnr_change: float | None = Field(None, description="dB; positive: images decoded from small are worse.")
    heldout_loss_reference: float | None = None
    heldout_loss_small: float | None = None
    loss_change: float | None = Field(None, description="Relative change of the trained model's held-out loss.")
    not_measured: list[str]


def measure_cost(
    reference: FeatureCache,
    small: FeatureCache,
    *,
    autoencoder: Location | None,
    diffusion: Location | None,
) -> RequantizeCost:
    """Compare two caches of the same images.

    Args:
        reference: the original cache.
        small: the converted cache.
        autoencoder: decodes both; None: decoded images are not measured.
        diffusion: model trained on `reference`, for its held-out loss.

    Returns:
        Sizes, signal to noise, PSNR and losses.

    Raises:
        MismatchError: the autoencoder or the diffusion model does not belong to `reference`.
    """
    usable = np.flatnonzero(reference.valid)
    rows = choose_evenly(usable.tolist(), MEASURED_ROWS)
    a, b = reference.read(rows), small.read(rows)
    groups = dict(reference.manifest.channel_groups)
    if reference.manifest.distribution == "gaussian":
        groups["deviation"] = slice(reference.manifest.latent_shape[-1], None)
    missing: list[str] = []
    return RequantizeCost(
        reference_bytes=reference.manifest.num_bytes,
        small_bytes=small.manifest.num_bytes,
        bytes_ratio=small.manifest.num_bytes / reference.manifest.num_bytes,
        snr={name: _snr(a[..., group], b[..., group]) for name, group in groups.items()},
        **_decoded(reference, small, rows, autoencoder, missing),
        **_losses(reference, small, diffusion, missing),
        not_measured=missing,
    )


def _snr(signal: NDArray[Any], stored: NDArray[Any]) -> float | None:
    """Return dB; None without noise or without signal, because JSON has no infinity."""
    ratio = signal_to_noise(signal, stored)
    return ratio if math.isfinite(ratio) else None


def _decoded(
    reference: FeatureCache, small: FeatureCache, rows: list[int], autoencoder: Location | None, missing: list[str]
) -> dict[str, Any]:
    if autoencoder is None:
        missing.append("decoded images: the cache records no autoencoder, or it was moved; give --autoencoder")
        return {}
    manifest, what = reference.manifest, "Decode with the autoencoder that extracted the cache."
    maker = manifest.inputs.get("autoencoder")
    encoder = require_decoder(str(reference.path), maker, manifest.latent_shape, autoencoder, what)
    decode = latent_decoder(autoencoder)
    one, two = (decode(cache.denormalize(cache.read_latents(rows))) for cache in (reference, small))
    between = {"decoded_psnr": float(np.mean(np.minimum(psnr(one, two), 100.0)))}
    try:
        shards = ShardSet.of_input(manifest.input("shards"), reference.path)
        source = load_images(shards, rows, encoder.image_size)
    except (ArtifactError, MismatchError, OSError) as error:
        missing.append(f"distance to the source images: {error}")
        return between
    first, second = (float(psnr(source, images).mean()) for images in (one, two))
    return {
        **between,
        "source_psnr_reference": first,
        "source_psnr_small": second,
        "psnr_change": first - second,
    }


def _losses(
    reference: FeatureCache, small: FeatureCache, diffusion: Location | None, missing: list[str]
) -> dict[str, Any]:
    if diffusion is None:
        missing.append("held-out loss of a trained model: none was given (--diffusion)")
        return {}
    manifest, trained = DiffusionManifest.read(diffusion), open_diffusion(diffusion)
    own = reference.manifest.as_input(reference.path)
    what = "Give a model that was trained on this cache."
    require_same(str(diffusion), manifest.inputs["cache"], own, what_to_do=what)
    config, group = DiffusionSection.model_validate(manifest.config), ProcessGroup(pick_device())
    model = trained.load().to(group.device)
    first, second = (heldout_loss(model, cache, config, group) for cache in (reference, small))
    if first is None or second is None:
        missing.append("held-out loss: the cache has no held-out rows")
        return {}
    return {"heldout_loss_reference": first, "heldout_loss_small": second, "loss_change": second / first - 1}
