"""calibration.json: what a cache is normalised and quantised with, fixed before anything is written.

Kept beside the store's own arrays, so that a resume uses the very same numbers, and either can be mended by the other.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import ArtifactError
from .filesystem import Location
from .manifest import read_json, write_json

CALIBRATION_NAME = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """Per channel: (C,) float32 mean, standard deviation, and for int8 the step."""

    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    scale: NDArray[np.float32] | None

    @classmethod
    def read(cls, path: Location) -> Calibration:
        """Parse calibration.json. Raises ArtifactError if it is missing or damaged."""
        entry = read_json(path)
        try:
            mean, std = (np.asarray(entry[key], np.float32) for key in ("mean", "std"))
            scale = None if entry["scale"] is None else np.asarray(entry["scale"], np.float32)
        except (KeyError, ValueError, TypeError) as error:
            raise ArtifactError(f"{path}: expected mean, std and scale per channel ({error}).") from error
        return cls(mean, std, scale)

    def write(self, path: Location) -> None:
        """Write calibration.json atomically; float32 survives JSON exactly."""
        scale = None if self.scale is None else self.scale.tolist()
        write_json(path, {"mean": self.mean.tolist(), "std": self.std.tolist(), "scale": scale})
