"""The record of finished units of work: what proves that they are whole, and what a resume skips.

    unit-000003.json    {"entry": what is known of the unit, "sha256": of that entry}

A stage writes a record atomically after the unit's data is on disk. All stages that work unit by unit use this class;
checkpoints of a training have their own listing.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable

from .errors import ArtifactError
from .filesystem import Location, children, make_directory
from .manifest import Json, digest, read_json, write_json


class Journal:
    """One JSON file for each finished unit. Units have numbers, or names where they are found by content."""

    def __init__(self, directory: Location) -> None:
        """The journal in `directory`, which the first record creates."""
        self.directory = directory

    def _path(self, unit: int | str) -> Location:
        return self.directory / (f"{unit}.json" if isinstance(unit, str) else f"unit-{unit:06d}.json")

    def record(self, unit: int | str, entry: Json) -> None:
        """Say that `unit` is finished."""
        make_directory(self.directory)
        write_json(self._path(unit), {"entry": entry, "sha256": digest(entry)})

    def read(self, unit: int | str) -> Json:
        """The entry of a finished unit. Raises ArtifactError if its record is missing or damaged."""
        path = self._path(unit)
        record = read_json(path)
        entry = record.get("entry")
        if not isinstance(entry, dict) or record.get("sha256") != digest(entry):
            raise ArtifactError(f"{path}: a damaged record: its content is not what was written.")
        return entry

    def find(self, unit: int | str) -> Json | None:
        """`read`, or None where it raises."""
        with contextlib.suppress(ArtifactError):
            return self.read(unit)
        return None

    def kept(self, unit: int | str, key: str, make: Callable[[], Json]) -> Json:
        """What `make` returns, or returned in an earlier run with the same `key`."""
        entry = self.find(unit)
        if entry is not None and entry.get("key") == key:
            kept: Json = entry["kept"]
            return kept
        made = make()
        self.record(unit, {"key": key, "kept": made})
        return made

    def forget(self, unit: int | str) -> None:
        """Say that `unit` must be done again."""
        self._path(unit).unlink(missing_ok=True)

    def finished(self) -> set[int]:
        """Numbers of the finished units; none where the directory does not exist."""
        names = (re.fullmatch(r"unit-(\d+)\.json", path.name) for path in children(self.directory))
        return {int(match[1]) for match in names if match}

    def missing(self, num_units: int) -> list[int]:
        """Units of range(num_units) that are not finished."""
        done = self.finished()
        return [unit for unit in range(num_units) if unit not in done]
