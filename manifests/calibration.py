"""Normalisation and quantisation of a cache, fixed before the first unit is written.

The journal of the cache keeps a copy of the store's own arrays. A resume uses the same numbers, and `repair` restores
one copy from the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .journal import Journal

CALIBRATION = "calibration"


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
