"""What a cache is normalised and quantised with, fixed before anything is written.

It lies in the cache's journal beside the store's own arrays: a resume uses the same numbers, and `repair` restores
either of them from the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .journal import Journal

CALIBRATION = "calibration"


@dataclass(frozen=True)
class Calibration:
    """Per channel: (C,) float32 mean, standard deviation, and for int8 the step."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    scale: NDArray[np.float32] | None

    @classmethod
    def read(cls, journal: Journal) -> Calibration:
        """The recorded one. Raises ArtifactError if it is missing or damaged."""
        entry = journal.read(CALIBRATION)
        mean, std, scale = (
            None if entry[name] is None else np.asarray(entry[name], np.float32) for name in ("mean", "std", "scale")
        )
        assert mean is not None and std is not None
        return cls(mean, std, scale)

    def record(self, journal: Journal) -> None:
        """Put it into the journal. float32 survives JSON exactly."""
        scale = None if self.scale is None else self.scale.tolist()
        journal.record(CALIBRATION, {"mean": self.mean.tolist(), "std": self.std.tolist(), "scale": scale})
