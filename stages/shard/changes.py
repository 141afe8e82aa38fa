"""Notices input files that are not any more what was sharded.

    sources.parquet    path (bytes), size, modified_ns, sha256 of every input file of a shard set, sorted by path

A file with another modification time is hashed before it counts as changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as parquet

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import Location, staged

from .scan import SourceFile
from .sources import read_entry

SOURCES_NAME = "sources.parquet"
_SCHEMA = pa.schema([("path", pa.binary()), ("size", pa.int64()), ("modified_ns", pa.int64()), ("sha256", pa.string())])


@dataclass(frozen=True)
class ReadFile:
    """What was read of an input file; `sha256` is empty if it could not be read."""

    path: str
    size: int
    modified_ns: int
    sha256: str

    def is_still(self, file: SourceFile) -> bool:
        """Return whether the file has the content that was read."""
        entry = file.entry
        if (self.size, self.modified_ns) == (entry.size, entry.modified_ns) and self.was_read:
            return True
        return self.size == entry.size and self.sha256 == _sha256_of(file)

    @property
    def was_read(self) -> bool:
        """Whether the file could be read. One that could not may be readable now, with the same size and time."""
        return bool(self.sha256)


def _sha256_of(file: SourceFile) -> str:
    try:
        return "" if file.entry.problem else hashlib.sha256(read_file(file)).hexdigest()
    except OSError:
        return ""


def read_file(file: SourceFile) -> bytes:
    """Return the content of an input file.

    Raises:
        OSError: it cannot be read.
    """
    entry = file.entry
    return read_entry(entry.origin, entry.name, entry.place, entry.size)


def write_sources(out: Location, files: Iterable[ReadFile]) -> None:
    """Write sources.parquet."""
    rows = sorted(files, key=lambda file: file.path)
    table = pa.table(
        {
            "path": [os.fsencode(row.path) for row in rows],
            "size": [row.size for row in rows],
            "modified_ns": [row.modified_ns for row in rows],
            "sha256": [row.sha256 for row in rows],
        },
        schema=_SCHEMA,
    )
    # A file, not a path: pyarrow would read "a:b" as an address, and refuses names that are not UTF-8.
    with staged(out / SOURCES_NAME) as partial, partial.open("wb") as file:
        parquet.write_table(table, file)


def _read_sources(out: Location) -> Mapping[str, ReadFile]:
    path = out / SOURCES_NAME
    try:
        with path.open("rb") as file:
            rows = parquet.read_table(file, schema=_SCHEMA).to_pylist()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable parquet file: {error}") from error
    return {(name := os.fsdecode(row["path"])): ReadFile(**{**row, "path": name}) for row in rows}


def require_unchanged(out: Location, files: Sequence[SourceFile], *, record: bool) -> None:
    """Check that the files of a finished shard set have their recorded content.

    Args:
        out: the shard set.
        files: what is there now; the paths and sizes are those of the set.
        record: store new modification times, so that the next run need not hash these files.

    Raises:
        ArtifactError: a file was changed, or the record is damaged.
    """
    if not (out / SOURCES_NAME).exists():  # a set of an earlier version
        return
    recorded = _read_sources(out)
    touched = [
        file
        for file in files
        if file.entry.modified_ns != (read := recorded[file.path]).modified_ns or not read.was_read
    ]
    changed = [file.entry for file in touched if not recorded[file.path].is_still(file)]
    if changed:
        raise ArtifactError(
            f"{out}: {len(changed)} of {len(files)} source files were changed after they were sharded, as "
            f"{changed[0].origin}/{changed[0].name}. Shard the images into a new directory, or restore the files."
        )
    if record and any(file.entry.modified_ns != recorded[file.path].modified_ns for file in files):
        entries = ((f.path, f.entry) for f in files)
        write_sources(out, (ReadFile(p, e.size, e.modified_ns, recorded[p].sha256) for p, e in entries))
