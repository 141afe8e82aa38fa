"""alignment.json: the four alignment scalars of an imported autoencoder.

Official checkpoints hold no alignment, because the official code aligns every batch by itself. The first extraction or
evaluation measures the scalars and stores them next to the weights. They never change afterwards. Caches and
evaluations keep a copy, because a second import of the same weights may get other scalars.
"""

from __future__ import annotations

from pydantic import ConfigDict, Field, ValidationError

from .errors import ArtifactError, MismatchError
from .filesystem import Location
from .manifest import FrozenModel, read_json, summarise, write_json

ALIGNMENT_NAME = "alignment.json"


class MeasuredAlignment(FrozenModel):
    """The measured scalars, and the images they were measured on."""

    model_config = ConfigDict(allow_inf_nan=False)

    scalars: tuple[float, float, float, float] = Field(description="Frozen mean, std, residual mean, std.")
    images: int
    shards: str = Field(description="Fingerprint of the shard set of these images.")

    @classmethod
    def read(cls, directory: Location) -> MeasuredAlignment | None:
        """Return the alignment of an autoencoder, a cache or an evaluation; None if there is no file.

        Raises:
            ArtifactError: the file is damaged.
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
    """Check that two artifacts have the same alignment, if both have one.

    Raises:
        MismatchError: the alignment of `directory` differs from that of `expected`.
    """
    ours, theirs = MeasuredAlignment.read(expected), MeasuredAlignment.read(directory)
    if ours is not None and theirs is not None and ours.scalars != theirs.scalars:
        raise MismatchError(
            f"{directory}: expected the alignment {ours.scalars} of {expected}, found {theirs.scalars}. The "
            "autoencoder was imported more than once and measured again. "
            f"Restore the first {ALIGNMENT_NAME}, or make both artifacts again."
        )


def keep_alignment(source: Location, directory: Location) -> None:
    """Copy the measured alignment of an autoencoder or a cache to `directory`, if there is one.

    Raises:
        MismatchError: `directory` has another alignment.
    """
    require_same_alignment(source, directory)
    measured = MeasuredAlignment.read(source)
    if measured is not None and MeasuredAlignment.read(directory) is None:
        measured.write(directory)
