"""alignment.json: the four scalars of an imported autoencoder, which came without them.

Official checkpoints hold none, as the official code aligns every batch by itself. The first extraction measures them
and puts them beside the weights; whatever encodes with that autoencoder from then on uses the same ones. Once there,
they never change.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.manifest import read_json, summarise, write_json
from svgpipe.manifests.storage import Location

ALIGNMENT_NAME = "alignment.json"


class MeasuredAlignment(BaseModel):
    """What was measured, and on what."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scalars: tuple[float, float, float, float] = Field(description="Frozen mean, std, residual mean, std.")
    images: int
    shards: str = Field(description="Fingerprint of the shard set that the images are from.")

    @classmethod
    def read(cls, autoencoder: Location) -> MeasuredAlignment | None:
        """Of an autoencoder's directory; None where nothing was measured. Raises ArtifactError for a damaged file."""
        path = autoencoder / ALIGNMENT_NAME
        if not path.exists():
            return None
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise ArtifactError(f"{path}: not an alignment: {summarise(error)}") from error

    def write(self, autoencoder: Location) -> None:
        """Write it atomically."""
        write_json(autoencoder / ALIGNMENT_NAME, self.model_dump(mode="json"))
