"""The record of finished units of work: what proves that a store is complete, and what a resume skips."""

from __future__ import annotations

import re
from pathlib import Path

from svgpipe.manifests.manifest import Json, read_json, write_json


class Journal:
    """One JSON file per finished unit, written atomically after the unit's data is on disk."""

    def __init__(self, directory: Path) -> None:
        """Open or create the journal in `directory`."""
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _path(self, unit: int) -> Path:
        return self.directory / f"unit-{unit:06d}.json"

    def record(self, unit: int, entry: Json) -> None:
        """Say that `unit` is finished."""
        write_json(self._path(unit), entry)

    def finished(self) -> set[int]:
        """Numbers of the finished units."""
        names = (re.fullmatch(r"unit-(\d+)\.json", path.name) for path in self.directory.iterdir())
        return {int(match[1]) for match in names if match}

    def read(self, unit: int) -> Json:
        """The record of a finished unit. Raises ArtifactError if it is missing or damaged."""
        return read_json(self._path(unit))

    def missing(self, num_units: int) -> list[int]:
        """Units of range(num_units) that are not finished."""
        done = self.finished()
        return [unit for unit in range(num_units) if unit not in done]
