"""The journal of finished units of work. A resume skips the units that have an intact record.

    journal/unit-000003.json    {"entry": facts about the unit, "files": [name, num_bytes, sha256], "sha256": …}

A stage writes a record atomically after the files of the unit are on disk. All stages with units of work use this
class. Training checkpoints have their own list (checkpoint.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

from .errors import ArtifactError
from .filesystem import Location, children, file_sha256, file_size, make_directory
from .manifest import Json, digest, read_json, write_json

Unit = TypeVar("Unit", int, str)
# Units that are checked concurrently; object stores are slow.
CHECKS = 16


@dataclass(frozen=True)
class UnitFile:
    """One file of a finished unit. `name` is its path below the directory of the artifact."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class UnitRecord:
    """Content of the record of a finished unit."""

    entry: Json
    files: list[UnitFile]


class Journal:
    """One JSON file per finished unit of an artifact. A unit is a number or a name that ends in `-NUMBER`.

    Other records, such as the calibration, have other names. `missing` and `names` skip them.
    """

    def __init__(self, root: Location, name: str = "journal") -> None:
        """Open the journal `root`/`name`. The first record creates the folder."""
        self.root, self.directory = root, root.joinpath(*name.split("/"))

    def _path(self, unit: int | str) -> Location:
        return self.directory / (f"{unit}.json" if isinstance(unit, str) else f"unit-{unit:06d}.json")

    def record(self, unit: int | str, entry: Json, files: Mapping[str, str | None] | None = None) -> None:
        """Mark `unit` as finished.

        Args:
            unit: number or name.
            entry: facts about the unit, JSON values.
            files: sha256 of the unit's files by path below `root`; None: compute it.
        """
        content = {"entry": entry, "files": [asdict(self._listed(*file)) for file in (files or {}).items()]}
        make_directory(self.directory)
        write_json(self._path(unit), {**content, "sha256": digest(content)})

    def _listed(self, name: str, sha256: str | None) -> UnitFile:
        path = self.root / name
        if (size := file_size(path)) is None:
            raise ArtifactError(f"{path}: expected the file that was just written, found none.")
        return UnitFile(name, size, sha256 or file_sha256(path))

    def _load(self, unit: int | str) -> UnitRecord:
        content = read_json(self._path(unit))
        if content.pop("sha256", None) != digest(content) or set(content) != {"entry", "files"}:
            raise ArtifactError(f"{self._path(unit)}: damaged record: its content does not match its hash.")
        return UnitRecord(content["entry"], [UnitFile(**file) for file in content["files"]])

    def read(self, unit: int | str) -> Json:
        """Return the entry of a finished unit.

        Raises:
            ArtifactError: the record is missing or damaged.
        """
        return self._load(unit).entry

    def files(self, unit: int | str) -> list[UnitFile]:
        """Return the files of a finished unit.

        Raises:
            ArtifactError: the record is missing or damaged.
        """
        return self._load(unit).files

    def check(self, unit: int | str, *, deep: bool = False) -> UnitRecord:
        """Return the record of a unit after checking it: the record is intact, and every file has its recorded size.

        Args:
            unit: number or name.
            deep: also compare the sha256 of every file.

        Raises:
            ArtifactError: a check fails.
        """
        record = self._load(unit)
        for file in record.files:
            path = self.root / file.name
            if (size := file_size(path)) != file.num_bytes:
                actual = "no file" if size is None else f"{size}"
                raise ArtifactError(f"{path}: expected {file.num_bytes} bytes, found {actual}.")
            if deep and (sha256 := file_sha256(path)) != file.sha256:
                raise ArtifactError(f"{path}: expected sha256 {file.sha256[:12]}, found {sha256[:12]}.")
        return record

    def find(self, unit: int | str, *, deep: bool = False) -> UnitRecord | None:
        """Return `check(unit)`, or None if it fails."""
        with suppress(ArtifactError):
            return self.check(unit, deep=deep)
        return None

    def whole(self, units: Sequence[Unit], *, deep: bool = False) -> dict[Unit, UnitRecord]:
        """Return the records of those `units` that pass `check`. Every record is read once."""
        names = set(self.names())
        recorded = [unit for unit in units if self._path(unit).stem in names]
        with ThreadPoolExecutor(CHECKS) as threads:
            records = list(threads.map(partial(self.find, deep=deep), recorded))
        return {unit: record for unit, record in zip(recorded, records, strict=True) if record is not None}

    def missing(self, units: Sequence[Unit], *, deep: bool = False) -> list[Unit]:
        """Return those `units` that do not pass `check`."""
        whole = self.whole(units, deep=deep)
        return [unit for unit in units if unit not in whole]

    def has(self, unit: int | str) -> bool:
        """Return whether there is a record, intact or not."""
        return self._path(unit).exists()

    def names(self) -> list[str]:
        """Return the sorted names of the numbered units with a record; `unit-000003` for unit 3."""
        return [path.stem for path in children(self.directory) if re.fullmatch(r".+-\d+\.json", path.name)]

    def numbers(self) -> list[int]:
        """Return the sorted numbers of the units with a record."""
        return [int(match[1]) for name in self.names() if (match := re.fullmatch(r"unit-(\d+)", name))]

    def kept(self, unit: int | str, key: str, make: Callable[[], Json]) -> Json:
        """Return the result of `make`, or the recorded result of an earlier call with the same `key`."""
        record = self.find(unit)
        entry = {} if record is None else record.entry
        if entry.get("key") != key:
            entry = {"key": key, "kept": make()}
            self.record(unit, entry)
        kept: Json = entry["kept"]
        return kept

    def forget(self, unit: int | str) -> None:
        """Delete the record of a unit, so that it is computed again."""
        self._path(unit).unlink(missing_ok=True)
