"""report.json of an evaluation, and report.schema.json beside it, which says what every field means."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, ValidationError

from .errors import ArtifactError
from .filesystem import Location, has_sha256
from .manifest import MANIFEST_NAME, FrozenModel, read_json, summarise, write_json

REPORT_NAME = "report.json"
SCHEMA_NAME = "report.schema.json"


def evaluate_again(directory: Location) -> str:
    """What to do where something of a finished evaluation is gone or altered."""
    return f"Delete {directory / MANIFEST_NAME} and run the same command: only what is missing is made anew."


class ExtractorInfo(FrozenModel):
    """What made the features: all that decides those of an image, so that features are kept by it."""

    kind: str = Field(description="inception, backbone (the autoencoder's own) or timm.")
    name: str = Field(description="Of the network.")
    weights: str = Field(description="sha256 over its tensors, whatever file they came from.")
    input_size: int = Field(description="Pixels a side that images are resized to.")
    library: str = Field(description="Whose network and resizing it is, with its version.")


class WrittenReport(FrozenModel):
    """Base of reports: read and written as JSON, with its own JSON schema beside it."""

    NOUN: ClassVar[str]

    schema_version: int
    inputs: dict[str, str] = Field(
        description="Fingerprints of what the numbers were made from, and sha256 of weight files that were given; "
        "manifest.json says where they lay, and has their own inputs too."
    )
    software: dict[str, str] = Field(description="Versions of what computed the numbers.")

    def write(self, directory: Location) -> None:
        """Write report.json and its schema atomically."""
        write_json(directory / SCHEMA_NAME, type(self).model_json_schema())
        write_json(directory / REPORT_NAME, self.model_dump(mode="json"))

    @classmethod
    def require_published(cls, directory: Location, sha256: str) -> None:
        """Raise ArtifactError unless report.json is the one of that hash."""
        path = directory / REPORT_NAME
        if not has_sha256(path, sha256):
            raise ArtifactError(f"{path}: is gone, or not what was published. {evaluate_again(directory)}")

    @classmethod
    def read(cls, directory: Location) -> Self:
        """Parse report.json. Raises ArtifactError if it is missing, of another layout, or not such a report."""
        path = directory / REPORT_NAME
        report, expected = read_json(path), cls.model_fields["schema_version"].default
        if report.get("schema_version") != expected:
            raise ArtifactError(
                f"{path}: expected {cls.NOUN} of layout {expected}, found {report.get('schema_version')}. Read it with "
                "the svgpipe that wrote it, or move its directory away and run the command again: latents are found."
            )
        try:
            return cls.model_validate(report)
        except ValidationError as error:
            raise ArtifactError(f"{path}: not {cls.NOUN}: {summarise(error)}") from error
