"""alignment.json: the four scalars of an imported autoencoder, which came without them.

Official checkpoints hold none, as the official code aligns every batch by itself. The first extraction or evaluation
measures them and puts them beside the weights; whatever encodes with that autoencoder from then on uses the same ones.
Once there, they never change. What is encoded with them keeps a copy, be it a cache or the reconstructions of an
evaluation: imported anew, the same weights may be given others.
"""

from __future__ import annotations

from pydantic import ConfigDict, Field, ValidationError

from .errors import ArtifactError, MismatchError
from .filesystem import Location
from .manifest import FrozenModel, read_json, summarise, write_json

ALIGNMENT_NAME = "alignment.json"


class MeasuredAlignment(FrozenModel):
    """What was measured, and on what."""

    model_config = ConfigDict(allow_inf_nan=False)

    scalars: tuple[float, float, float, float] = Field(description="Frozen mean, std, residual mean, std.")
    images: int
    shards: str = Field(description="Fingerprint of the shard set that the images are from.")

    @classmethod
    def read(cls, directory: Location) -> MeasuredAlignment | None:
        """Of an autoencoder, or of what was encoded with it; None where nothing was measured.

        Raises ArtifactError for a damaged file.
        """
        path = directory / ALIGNMENT_NAME
        if not path.exists():
            return None
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise ArtifactError(f"{path}: not an alignment: {summarise(error)}") from error

    def write(self, directory: Location) -> None:
        """Write it atomically."""
        write_json(directory / ALIGNMENT_NAME, self.model_dump(mode="json"))


def require_same_alignment(directory: Location, expected: Location) -> None:
    """Raise MismatchError where both hold an alignment, and `directory` another than `expected`."""
    ours, theirs = MeasuredAlignment.read(expected), MeasuredAlignment.read(directory)
    if ours is not None and theirs is not None and ours.scalars != theirs.scalars:
        raise MismatchError(
            f"{directory}: expected the alignment {ours.scalars} of {expected}, found {theirs.scalars}: the "
            "autoencoder was imported more than once, and measured anew. "
            f"Put the first {ALIGNMENT_NAME} back, or make both anew."
        )


def keep_alignment(source: Location, directory: Location) -> None:
    """Put a copy of an autoencoder's (or a cache's) measured alignment beside what was encoded with it, if it has one.

    Raises:
        MismatchError: `directory` was begun with another one.
    """
    require_same_alignment(source, directory)
    measured = MeasuredAlignment.read(source)
    if measured is not None and MeasuredAlignment.read(directory) is None:
        measured.write(directory)
