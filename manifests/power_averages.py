"""Snapshots of the power averages of a diffusion training, and the averages that were reconstructed from them.

averages/step-00005000-0.05.safetensors     float16 snapshot at a step, of one length; listed in the model's manifest
averages/step-00005000.json                 record of the snapshots of a step, with their hashes
power-0.07.safetensors                      reconstructed weights
reconstructed.json                          their names and hashes; the model's manifest does not change
"""

from __future__ import annotations

import re

from pydantic import Field, ValidationError

from .errors import ArtifactError
from .filesystem import Location
from .manifest import FrozenModel, read_json, summarise, write_json

AVERAGES_FOLDER, RECONSTRUCTED_NAME = "averages", "reconstructed.json"
_SNAPSHOT = re.compile(rf"{AVERAGES_FOLDER}/step-(\d+)-(0\.\d+)\.safetensors")


def snapshot_file(step: int, sigma: float) -> str:
    """Return the name of a snapshot, relative to the model."""
    return f"{AVERAGES_FOLDER}/step-{step:08d}-{sigma!r}.safetensors"


def snapshot_unit(step: int) -> str:
    """Return the name of the record of the snapshots of a step."""
    return f"step-{step:08d}"


def read_snapshot_name(name: str) -> tuple[int, float] | None:
    """Return step and length of a snapshot; None for the name of another file."""
    match = _SNAPSHOT.fullmatch(name)
    return None if match is None else (int(match[1]), float(match[2]))


class MadeAverages(FrozenModel):
    """Averages that were reconstructed for one model."""

    model: str = Field(description="Fingerprint of the diffusion model.")
    content: dict[str, str] = Field(description="sha256 of each safetensors file.")

    @classmethod
    def read(cls, directory: Location, model: str) -> MadeAverages:
        """Return those of a model; none if there is no file, or if it belongs to an earlier model of this place.

        Raises:
            ArtifactError: the file is damaged.
        """
        path = directory / RECONSTRUCTED_NAME
        if not path.exists():
            return cls(model=model, content={})
        try:
            found = cls.model_validate(read_json(path))
        except ValidationError as error:
            raise ArtifactError(
                f"{path}: not a list of averages: {summarise(error)}. Delete it, and run svgpipe ema again."
            ) from error
        return found if found.model == model else cls(model=model, content={})

    def write(self, directory: Location) -> None:
        """Write it atomically."""
        write_json(directory / RECONSTRUCTED_NAME, self.model_dump(mode="json"))
