"""report.json of an evaluation, and report.schema.json, which describes every field."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import Field, ValidationError

from .errors import ArtifactError
from .filesystem import Location, has_sha256
from .manifest import MANIFEST_NAME, FrozenModel, read_json, summarise, write_json

REPORT_NAME = "report.json"
SCHEMA_NAME = "report.schema.json"


def evaluate_again(directory: Location) -> str:
    """Return the advice for a finished evaluation with missing or altered files."""
    return f"Delete {directory / MANIFEST_NAME} and run the same command: only missing parts are made again."


class ExtractorInfo(FrozenModel):
    """The feature extractor: everything that determines the features of an image."""

    kind: str = Field(description="inception, backbone (the autoencoder's own) or timm.")
    name: str = Field(description="Name of the network.")
    weights: str = Field(description="sha256 over its tensors.")
    input_size: int = Field(description="Pixels per side that images are resized to.")
    library: str = Field(description="Library of the network and of the resizing, with its version.")


class WrittenReport(FrozenModel):
    """Base of reports: written as JSON, with a JSON schema."""

    NOUN: ClassVar[str]

    schema_version: int
    inputs: dict[str, str] = Field(
        description="Fingerprints of all inputs, and sha256 of weight files. manifest.json has their paths and "
        "their own inputs."
    )
    software: dict[str, str] = Field(description="Versions of the libraries that computed the numbers.")

    def write(self, directory: Location) -> None:
        """Write report.json and its schema atomically."""
        write_json(directory / SCHEMA_NAME, type(self).model_json_schema())
        write_json(directory / REPORT_NAME, self.model_dump(mode="json"))

    @classmethod
    def require_published(cls, directory: Location, sha256: str) -> None:
        """Check that report.json has this hash.

        Raises:
            ArtifactError: it is missing or altered.
        """
        path = directory / REPORT_NAME
        if not has_sha256(path, sha256):
            raise ArtifactError(f"{path}: is missing or was altered. {evaluate_again(directory)}")

    @classmethod
    def read(cls, directory: Location) -> Self:
        """Return the parsed report.json.

        Raises:
            ArtifactError: it is missing, has another layout, or is not such a report.
        """
        path = directory / REPORT_NAME
        report, expected = read_json(path), cls.model_fields["schema_version"].default
        if report.get("schema_version") != expected:
            raise ArtifactError(
                f"{path}: expected {cls.NOUN} of layout {expected}, found {report.get('schema_version')}. Read it with "
                "the svgpipe that wrote it, or move its directory away and run the command again; latents are reused."
            )
        try:
            return cls.model_validate(report)
        except ValidationError as error:
            raise ArtifactError(f"{path}: not {cls.NOUN}: {summarise(error)}") from error
