"""The record of finished units of work: what proves that a store is complete, and what a resume skips."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable

from .errors import ArtifactError
from .manifest import Json, digest, read_json, write_json
from .storage import Location, children, file_size, make_directory, write_atomic


class Journal:
    """One JSON file per finished unit, written atomically after the unit's data is on disk."""

    def __init__(self, directory: Location) -> None:
        """Open or create the journal in `directory`."""
        self.directory = directory
        make_directory(directory)

    def _path(self, unit: int) -> Location:
        return self.directory / f"unit-{unit:06d}.json"

    def _attachment(self, unit: int) -> Location:
        return self.directory / f"unit-{unit:06d}.npy"

    def record(self, unit: int, entry: Json, attachment: bytes | None = None) -> None:
        """Say that `unit` is finished; numbers that are too many for JSON are attached as a file beside it."""
        if attachment is not None:
            write_atomic(self._attachment(unit), attachment)
            entry = {**entry, "attachment": hashlib.sha256(attachment).hexdigest()}
        write_json(self._path(unit), entry)

    def kept(self, unit: int, key: str, make: Callable[[], Json]) -> Json:
        """What `make` gives, or gave in an earlier run under the same key; a damaged record is made anew."""
        with contextlib.suppress(ArtifactError):
            record = self.read(unit)
            if record.get("key") == key and record.get("sha256") == digest(record.get("kept")):
                kept: Json = record["kept"]
                return kept
        found = make()
        self.record(unit, {"key": key, "kept": found, "sha256": digest(found)})
        return found

    def forget(self, unit: int) -> None:
        """Say that `unit` must be done again."""
        self._path(unit).unlink(missing_ok=True)

    def finished(self) -> set[int]:
        """Numbers of the finished units."""
        return finished_units(self.directory)

    def read(self, unit: int) -> Json:
        """The record of a finished unit. Raises ArtifactError if it is missing or damaged."""
        return read_json(self._path(unit))

    def attachment(self, unit: int) -> bytes:
        """What was attached to the record of `unit`. Raises ArtifactError if it is missing or altered."""
        path, sha256 = self._attachment(unit), self.read(unit).get("attachment")
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise ArtifactError(f"{path}: expected a file, found none.") from error
        if hashlib.sha256(content).hexdigest() != sha256:
            raise ArtifactError(f"{path}: was altered after it was written.")
        return content

    def has_attachment(self, unit: int) -> bool:
        """Whether something lies beside the record of `unit`; its content is checked by `attachment`."""
        return bool(file_size(self._attachment(unit)))

    def missing(self, num_units: int) -> list[int]:
        """Units of range(num_units) that are not finished."""
        done = self.finished()
        return [unit for unit in range(num_units) if unit not in done]


def finished_units(directory: Location) -> set[int]:
    """Numbers of the units that the journal in `directory`, which need not exist, calls finished."""
    names = (re.fullmatch(r"unit-(\d+)\.json", path.name) for path in children(directory))
    return {int(match[1]) for match in names if match}
