"""Interprets the statistics of a cache: quality of the normalisation, and effective rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.cache import FeatureCache

# Limits of a normalised channel.
MEAN_LIMIT, STD_LOW, STD_HIGH = 0.05, 0.95, 1.05
NAMED = 8


@dataclass(frozen=True)
class CacheStatistics:
    """Statistics of all stored values of valid rows and all views, in normalised units.

    Of a posterior cache, those of the means, with the standard deviation of drawn latents.
    """

    mean: NDArray[np.float64]  # (C,) and so on
    std: NDArray[np.float64]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]
    eigenvalues: NDArray[np.float64]  # (C,) of the covariance, largest first
    effective_rank: float
    groups: dict[str, slice]  # of channels, by what made them
    calibrated_on_all: bool | None  # whether calibration used all training images; None: it is not recorded

    @classmethod
    def of(cls, cache: FeatureCache) -> CacheStatistics:
        """Read the statistics of a cache.

        Returns:
            The statistics.

        Raises:
            ArtifactError: an array is missing or damaged.
        """
        channels, calibrated = cache.manifest.latent_shape[-1], cache.manifest.config.get("calibration_images")
        arrays = {
            name: cache.store.array(f"stored_{name}").astype(np.float64) for name in ("mean", "std", "min", "max")
        }
        if cache.manifest.distribution == "gaussian":  # variance of a drawn latent: Var[m] + E[s²]
            mean, std = arrays["mean"], arrays["std"]
            squares = std[channels:] ** 2 + mean[channels:] ** 2
            arrays = {name: values[:channels] for name, values in arrays.items()}
            arrays["std"] = np.sqrt(arrays["std"] ** 2 + squares)
        covariance = cache.store.array("stored_covariance")[:channels, :channels]
        return cls(
            mean=arrays["mean"],
            std=arrays["std"],
            minimum=arrays["min"],
            maximum=arrays["max"],
            eigenvalues=np.clip(np.linalg.eigvalsh(covariance)[::-1], 0, None),
            effective_rank=effective_rank(covariance),
            groups=cache.manifest.channel_groups,
            calibrated_on_all=None if calibrated is None else len(cache.training_rows) <= calibrated,
        )

    def name_of(self, channel: int) -> str:
        """Return `backbone 17` or `residual 3`, each counted from 0."""
        name, group = next((n, g) for n, g in reversed(self.groups.items()) if g.start <= channel)
        return f"{name} {channel - group.start}"

    @property
    def off(self) -> list[int]:
        """Channels whose mean or standard deviation is outside the limits, the worst first."""
        distance = np.maximum(
            np.abs(self.mean) / MEAN_LIMIT,
            np.where(self.std < 1, (1 - self.std) / (1 - STD_LOW), (self.std - 1) / (STD_HIGH - 1)),
        )
        return [int(channel) for channel in np.argsort(-distance, kind="stable") if distance[channel] > 1]

    @property
    def warnings(self) -> list[str]:
        """One sentence that names the worst channels, if any is outside the limits."""
        off = self.off
        if not off:
            return []
        worst = ", ".join(f"{self.name_of(c)} (mean {self.mean[c]:+.3f}, std {self.std[c]:.3f})" for c in off[:NAMED])
        more = f" and {len(off) - NAMED} more" if len(off) > NAMED else ""
        advice = {
            None: "The normalisation was fixed when the cache was made.",
            True: "Calibration used all training images; held-out images and flips differ from them.",
            False: "Calibrate over more images (extract.calibration_images).",
        }[self.calibrated_on_all]
        return [
            f"{len(off)} of {len(self.mean)} channels are not normalised (|mean| > {MEAN_LIMIT} or std "
            f"outside {STD_LOW}–{STD_HIGH}): {worst}{more}. {advice}"
        ]


def effective_rank(covariance: NDArray[np.float64]) -> float:
    """Return exp of the entropy of the normalised eigenvalues, between 1 and C. Source: Roy & Vetterli 2007."""
    eigenvalues = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    total = eigenvalues.sum()
    if total == 0:
        return 0.0
    shares = eigenvalues[eigenvalues > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
