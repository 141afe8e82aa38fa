"""Per-channel mean and standard deviation in float64, merged in a fixed order.

Source of the merge: Chan, Golub, LeVeque 1979, the pairwise update.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations per channel."""

    count: int
    mean: Float64
    m2: Float64

    @classmethod
    def of(cls, values: NDArray[Any]) -> Moments:
        """Of (…, channel) values; all axes but the last are samples."""
        flat = values.reshape(-1, values.shape[-1]).astype(np.float64)
        if not len(flat):
            return cls(0, np.zeros(flat.shape[1]), np.zeros(flat.shape[1]))
        mean = flat.mean(axis=0)
        return cls(len(flat), mean, ((flat - mean) ** 2).sum(axis=0))

    def merge(self, other: Moments) -> Moments:
        """Of both sets together."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        return Moments(count, mean, self.m2 + other.m2 + delta**2 * (self.count * other.count / count))

    @property
    def std(self) -> Float64:
        """Population standard deviation per channel."""
        return np.asarray(np.sqrt(self.m2 / max(1, self.count)))

    def as_json(self) -> dict[str, Any]:
        """Exact: Python writes floats so that they read back bit for bit."""
        return {"count": self.count, "mean": self.mean.tolist(), "m2": self.m2.tolist()}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> Moments:
        """Inverse of `as_json`."""
        return cls(int(entry["count"]), np.asarray(entry["mean"]), np.asarray(entry["m2"]))


def merge_all(parts: Iterable[Moments], channels: int) -> Moments:
    """Merge in the order given."""
    total = Moments(0, np.zeros(channels), np.zeros(channels))
    for part in parts:
        total = total.merge(part)
    return total
