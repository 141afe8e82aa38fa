"""report.json of whatever was evaluated, and report.schema.json beside it, which says what every field means."""

from __future__ import annotations

from typing import ClassVar, Self

from pydantic import ValidationError

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.figure import Record
from svgpipe.manifests.manifest import read_json, summarise, write_json
from svgpipe.manifests.storage import Location

REPORT_NAME = "report.json"
SCHEMA_NAME = "report.schema.json"


class WrittenReport(Record):
    """Base of reports: read and written as JSON, with its own JSON schema beside it."""

    NOUN: ClassVar[str]

    def write(self, directory: Location) -> None:
        """Write report.json and its schema atomically."""
        write_json(directory / SCHEMA_NAME, type(self).model_json_schema())
        write_json(directory / REPORT_NAME, self.model_dump(mode="json"))

    @classmethod
    def read(cls, directory: Location) -> Self:
        """Parse report.json. Raises ArtifactError if it is missing or not such a report."""
        path = directory / REPORT_NAME
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise ArtifactError(f"{path}: not {cls.NOUN}: {summarise(error)}") from error
