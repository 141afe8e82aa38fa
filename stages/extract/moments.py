"""Per-channel statistics in float64, merged in a fixed order, so that they do not depend on who computed what.

Source of the merge: Chan, Golub, LeVeque 1979, the pairwise update, for matrices.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from svgpipe.manifests.errors import ArtifactError

Float64 = NDArray[np.float64]
# Vectors per matrix product: a bound on memory, and part of what fixes the order of summation.
BLOCK = 4096


@dataclass(frozen=True)
class Moments:
    """Of a set of channel vectors: their number, mean, co-moment (sum of products of deviations), and extremes."""

    count: int
    mean: Float64  # (C,)
    comoment: Float64  # (C,C)
    minimum: Float64  # (C,)
    maximum: Float64  # (C,)

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Of nothing: neutral in a merge."""
        infinite = np.full(channels, np.inf)
        return cls(0, np.zeros(channels), np.zeros((channels, channels)), infinite, -infinite)

    @classmethod
    def of(cls, values: NDArray[Any], scale: NDArray[np.float32] | None = None) -> Moments:
        """Of (…, C) values; all axes but the last are samples. `scale` (C,) multiplies them first, exactly."""
        flat = values.reshape(-1, values.shape[-1])
        total = cls.empty(flat.shape[1])
        # One thread: how many there are would change the order of summation inside a product.
        with threadpool_limits(1):
            for start in range(0, len(flat), BLOCK):
                block = flat[start : start + BLOCK].astype(np.float64)
                if scale is not None:
                    block *= scale
                mean = block.mean(axis=0)
                low, high = block.min(axis=0), block.max(axis=0)
                block -= mean
                total = total.merge(cls(len(block), mean, block.T @ block, low, high))
        return total

    def merge(self, other: Moments) -> Moments:
        """Of both sets together."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        weight = self.count * other.count / count
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.comoment + other.comoment + np.outer(delta, delta) * weight,
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
        )

    @property
    def covariance(self) -> Float64:
        """(C,C) population covariance."""
        return self.comoment / max(1, self.count)

    @property
    def std(self) -> Float64:
        """(C,) population standard deviation."""
        return np.sqrt(np.diagonal(self.covariance))

    def to_bytes(self) -> bytes:
        """A .npy file of one vector: count, mean, minimum, maximum, upper triangle of the co-moment; exact."""
        upper = self.comoment[np.triu_indices(len(self.mean))]
        buffer = io.BytesIO()
        np.save(buffer, np.concatenate([[self.count], self.mean, self.minimum, self.maximum, upper]))
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, content: bytes, channels: int) -> Moments:
        """Inverse of `to_bytes`. Raises ArtifactError for anything else."""
        size = 1 + 3 * channels + channels * (channels + 1) // 2
        try:
            vector = np.load(io.BytesIO(content), allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise ArtifactError(f"expected moments of {channels} channels, found no .npy file ({error}).") from error
        if vector.shape != (size,) or vector.dtype != np.float64:
            raise ArtifactError(f"expected {size} float64 moments, found {vector.dtype} {vector.shape}.")
        mean, low, high = vector[1 : 1 + 3 * channels].reshape(3, channels)
        comoment = np.zeros((channels, channels))
        upper = np.triu_indices(channels)
        comoment[upper] = vector[1 + 3 * channels :]
        comoment = comoment + np.triu(comoment, 1).T
        return cls(int(vector[0]), mean, comoment, low, high)


def merge_all(parts: Iterable[Moments], channels: int) -> Moments:
    """Merge in the order given."""
    total = Moments.empty(channels)
    for part in parts:
        total = total.merge(part)
    return total


def effective_rank(covariance: Float64) -> float:
    """exp of the entropy of the normalised eigenvalues, between 1 and C. Source: Roy & Vetterli 2007."""
    eigenvalues = np.clip(np.linalg.eigvalsh(covariance), 0, None)
    total = eigenvalues.sum()
    if total == 0:
        return 0.0
    shares = eigenvalues[eigenvalues > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))
