"""The record of finished units of work: what proves that they are whole, and what a resume skips.

    journal/unit-000003.json    {"entry": what is known of the unit, "files": [name, num_bytes, sha256], "sha256": …}

A stage writes a record atomically after the unit's files are on disk. All stages that work unit by unit use this class.
Checkpoints of a training have a list of their own.
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
# Units that are checked at the same time: an object store answers slowly.
CHECKS = 16


@dataclass(frozen=True)
class UnitFile:
    """One file of a finished unit. `name` is its path below the artifact's directory."""

    name: str
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class UnitRecord:
    """What the journal says of a finished unit."""

    entry: Json
    files: list[UnitFile]


class Journal:
    """One JSON file for each finished unit of an artifact. A unit is a number, or a name that ends in `-NUMBER`.

    Records that are no units, such as the calibration, have other names; `missing` and `names` leave them out.
    """

    def __init__(self, root: Location, name: str = "journal") -> None:
        """The journal `root`/`name`. The first record creates it."""
        self.root, self.directory = root, root.joinpath(*name.split("/"))

    def _path(self, unit: int | str) -> Location:
        return self.directory / (f"{unit}.json" if isinstance(unit, str) else f"unit-{unit:06d}.json")

    def record(self, unit: int | str, entry: Json, files: Mapping[str, str | None] | None = None) -> None:
        """Say that `unit` is finished.

        Args:
            files: the files of the unit, by their paths below `root`, with their sha256; None computes it.
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
            raise ArtifactError(f"{self._path(unit)}: a damaged record: its content is not what was written.")
        return UnitRecord(content["entry"], [UnitFile(**file) for file in content["files"]])

    def read(self, unit: int | str) -> Json:
        """The entry of a finished unit. Raises ArtifactError if its record is missing or damaged."""
        return self._load(unit).entry

    def files(self, unit: int | str) -> list[UnitFile]:
        """The files of a finished unit. Raises ArtifactError if its record is missing or damaged."""
        return self._load(unit).files

    def check(self, unit: int | str, *, deep: bool = False) -> UnitRecord:
        """The record of a unit that is whole: the record is intact, and every file has its recorded size.

        Args:
            deep: also compare the sha256 of every file.
        Raises:
            ArtifactError: it is not.
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
        """`check`, or None where it raises."""
        with suppress(ArtifactError):
            return self.check(unit, deep=deep)
        return None

    def whole(self, units: Sequence[Unit], *, deep: bool = False) -> dict[Unit, UnitRecord]:
        """Records of those of `units` that are finished and whole, see `check`. Every record is read once."""
        names = set(self.names())
        recorded = [unit for unit in units if self._path(unit).stem in names]
        with ThreadPoolExecutor(CHECKS) as threads:
            records = list(threads.map(partial(self.find, deep=deep), recorded))
        return {unit: record for unit, record in zip(recorded, records, strict=True) if record is not None}

    def missing(self, units: Sequence[Unit], *, deep: bool = False) -> list[Unit]:
        """Those of `units` that `whole` does not give."""
        whole = self.whole(units, deep=deep)
        return [unit for unit in units if unit not in whole]

    def has(self, unit: int | str) -> bool:
        """Whether there is a record, intact or not."""
        return self._path(unit).exists()

    def names(self) -> list[str]:
        """Names of the numbered units that have a record, sorted; `unit-000003` for unit 3."""
        return [path.stem for path in children(self.directory) if re.fullmatch(r".+-\d+\.json", path.name)]

    def numbers(self) -> list[int]:
        """Numbers of the units that have a record, in order."""
        return [int(match[1]) for name in self.names() if (match := re.fullmatch(r"unit-(\d+)", name))]

    def kept(self, unit: int | str, key: str, make: Callable[[], Json]) -> Json:
        """What `make` returns, or returned in an earlier run with the same `key`."""
        record = self.find(unit)
        entry = {} if record is None else record.entry
        if entry.get("key") != key:
            entry = {"key": key, "kept": make()}
            self.record(unit, entry)
        kept: Json = entry["kept"]
        return kept

    def forget(self, unit: int | str) -> None:
        """Say that `unit` must be done again."""
        self._path(unit).unlink(missing_ok=True)
