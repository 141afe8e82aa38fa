"""Normalisation and quantisation of a cache, fixed before the first unit is written.

The journal of the cache keeps a copy of the store's own arrays. A resume uses the same numbers, and `repair` restores
one copy from the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import UsageError
from .feature_store import Features
from .journal import Journal
from .moments import Moments
from .store_spec import Distribution

CALIBRATION = "calibration"
# A constant channel is not rescaled, because that would divide by zero.
MIN_STD = 1e-6


@dataclass(frozen=True)
class Calibration:
    """Per channel, (C,) float32: mean, standard deviation and, for int8, the quantisation step."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    scale: NDArray[np.float32] | None

    @classmethod
    def read(cls, journal: Journal) -> Calibration:
        """Return the recorded calibration.

        Raises:
            ArtifactError: the record is missing or damaged.
        """
        entry = journal.read(CALIBRATION)
        mean, std, scale = (
            None if entry[name] is None else np.asarray(entry[name], np.float32) for name in ("mean", "std", "scale")
        )
        assert mean is not None and std is not None
        return cls(mean, std, scale)

    def record(self, journal: Journal) -> None:
        """Write the calibration to the journal. float32 values survive JSON exactly."""
        scale = None if self.scale is None else self.scale.tolist()
        journal.record(CALIBRATION, {"mean": self.mean.tolist(), "std": self.std.tolist(), "scale": scale})


def measured_calibration(total: Moments, distribution: Distribution) -> Calibration:
    """Return the normalisation for the moments of features (C,); of a posterior, for the latents drawn from it.

    A latent z = m + s * eps has mean E[m] and variance Var[m] + E[s²]. Constant channels are not divided.
    """
    mean, std = total.mean, total.std
    if distribution == "gaussian":
        half = len(mean) // 2
        std = np.sqrt(std[:half] ** 2 + std[half:] ** 2 + mean[half:] ** 2)
        mean = mean[:half]
    return given_calibration(mean, np.where(std < MIN_STD, 1.0, std), len(mean), distribution)


def given_calibration(mean: ArrayLike, std: ArrayLike, channels: int, distribution: Distribution) -> Calibration:
    """Return a normalisation: numbers, or one per channel of the latents; standard deviations are divided by `std`.

    Raises:
        UsageError: of another length, not finite, or a standard deviation that is not positive.
    """
    try:
        both = [np.broadcast_to(np.asarray(values, np.float32).ravel(), channels) for values in (mean, std)]
    except ValueError as error:
        raise UsageError(f"mean and std: expected one number or {channels}, one per channel ({error}).") from error
    if not np.isfinite(both).all() or both[1].min() <= 0:
        raise UsageError("mean and std: expected finite numbers, and positive standard deviations.")
    means, stds = both
    if distribution == "gaussian":
        means, stds = np.concatenate([means, np.zeros_like(means)]), np.concatenate([stds, stds])
    return Calibration(means.astype(np.float32), stds.astype(np.float32), None)


def usable(features: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which rows (n,) of features (n, …) may be measured: finite, and no larger than float16's limit."""
    limit = float(np.finfo(np.float16).max)
    return np.asarray((np.abs(features) <= limit).reshape(len(features), -1).all(axis=1))


def normalised(features: NDArray[np.float32], calibration: Calibration) -> tuple[Features, NDArray[np.bool_]]:
    """Return normalised float16 features (n, …, channels), and which rows (n,) fit: finite, and not too large.

    `features` is changed in place.
    """
    features -= calibration.mean
    features /= calibration.std
    with np.errstate(over="ignore"):  # becomes infinite
        stored = features.astype(np.float16)
    fits = np.isfinite(stored).reshape(len(stored), -1).all(axis=1)
    return stored, np.asarray(fits)
