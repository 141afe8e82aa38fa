"""Statistics per channel in float64, merged in a fixed order, so that they do not depend on the workers.

Source of the merge: Chan, Golub, LeVeque 1979, pairwise update.
"""

from __future__ import annotations

import base64
import binascii
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError
from .manifest import Json

Float64 = NDArray[np.float64]
# Vectors converted to float64 at a time. Limits the memory, and is part of the fixed order of summation.
BLOCK = 4096


@dataclass(frozen=True)
class Moments:
    """Moments of a set of channel vectors: number, and per channel mean, squared deviations, minimum, maximum."""

    count: int
    mean: Float64  # (C,)
    squares: Float64  # (C,)
    minimum: Float64  # (C,)
    maximum: Float64  # (C,)

    @classmethod
    def empty(cls, channels: int) -> Moments:
        """Return the moments of no vectors, which are neutral in a merge."""
        infinite = np.full(channels, np.inf)
        return cls(0, np.zeros(channels), np.zeros(channels), infinite, -infinite)

    @classmethod
    def of(cls, values: NDArray[Any], scale: NDArray[np.float32] | None = None) -> Moments:
        """Return the moments of (…, C) values over all axes but the last.

        `scale` (C,) multiplies them first, exactly.
        """
        flat = values.reshape(-1, values.shape[-1])
        total = cls.empty(flat.shape[1])
        for start in range(0, len(flat), BLOCK):
            block = flat[start : start + BLOCK].astype(np.float64)
            if scale is not None:
                block *= scale
            low, high = block.min(axis=0), block.max(axis=0)
            mean = block.mean(axis=0)
            block -= mean
            total = total.merge(cls(len(block), mean, np.einsum("nc,nc->c", block, block), low, high))
        return total

    def merge(self, other: Moments) -> Moments:
        """Return the moments of both sets together."""
        count = self.count + other.count
        if count == 0:
            return self
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.squares + other.squares + delta**2 * (self.count * other.count / count),
            np.minimum(self.minimum, other.minimum),
            np.maximum(self.maximum, other.maximum),
        )

    @property
    def std(self) -> Float64:
        """(C,) population standard deviation."""
        return np.sqrt(self.squares / max(1, self.count))

    def to_json(self) -> Json:
        """Return JSON for a journal record: the count, and (4,C) little-endian float64 as base64, which is exact."""
        values = np.stack([self.mean, self.squares, self.minimum, self.maximum]).astype("<f8")
        return {"count": self.count, "values": base64.b64encode(values.tobytes()).decode()}

    @classmethod
    def from_json(cls, entry: object, channels: int) -> Moments:
        """Convert the result of `to_json` back.

        Returns:
            The moments.

        Raises:
            ArtifactError: it is something else.
        """
        try:
            assert isinstance(entry, dict), "no record"
            values = np.frombuffer(base64.b64decode(entry["values"], validate=True), "<f8").reshape(4, channels)
            return cls(int(entry["count"]), *values.astype(np.float64))
        except (AssertionError, KeyError, TypeError, ValueError, binascii.Error) as error:
            raise ArtifactError(f"expected statistics of {channels} channels, found others ({error}).") from error
