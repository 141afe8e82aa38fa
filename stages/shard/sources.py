"""Files of an image folder: what is there, and whether it is still what was sharded.

    sources.parquet    path (bytes), size, modified_ns, sha256 of every input file of a shard set, sorted by path

A file of another size or modification time is hashed before it counts as changed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import Location, staged

from ..images.decode import EXTENSIONS
from ..images.folder import visible_files, visible_folders

SOURCES_NAME = "sources.parquet"
_SCHEMA = pa.schema([("path", pa.binary()), ("size", pa.int64()), ("modified_ns", pa.int64()), ("sha256", pa.string())])
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}


@dataclass(frozen=True)
class SourceFile:
    """One input file; `label` is None outside a class folder."""

    path: str  # relative to the source
    size: int
    modified_ns: int
    label: int | None


@dataclass(frozen=True)
class ReadFile:
    """What was read of an input file; `sha256` is empty if it could not be read."""

    path: str
    size: int
    modified_ns: int
    sha256: str

    def is_still(self, file: SourceFile, source: Path) -> bool:
        """Return whether the file has the content that was read."""
        if (self.size, self.modified_ns) == (file.size, file.modified_ns):
            return True
        return self.size == file.size and self.sha256 == sha256_of(source / file.path)


def sha256_of(path: Path) -> str:
    """Return the sha256 (hex) of a file; an empty text if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def scan(source: Path) -> tuple[list[str], list[SourceFile]]:
    """Return class names and all non-hidden files below `source`, both sorted.

    Raises:
        UsageError: no such folder, no class folder, a class without a file of an image's extension, or the folders are
            splits that hold the class folders.
    """
    if not source.is_dir():
        found = "a file" if source.exists() else "nothing"
        raise UsageError(f"{source}: expected a folder of class folders, found {found}.")
    class_names = visible_folders(source)
    if not class_names:
        images = sum(Path(entry.name).suffix.lower() in EXTENSIONS for entry in visible_files(source, below=False))
        raise UsageError(
            f"{source}: expected class folders (class/image.jpg), found none; {images} images lie directly in it."
        )
    _require_no_splits(source, class_names)
    files = [_listed(entry, source, None) for entry in visible_files(source, below=False)]
    for label, name in enumerate(class_names):
        own = [_listed(entry, source, label) for entry in visible_files(source / name)]
        if not any(Path(file.path).suffix.lower() in EXTENSIONS for file in own):
            raise UsageError(
                f"{source / name}: expected images of class {name!r} ({', '.join(EXTENSIONS)}), found "
                f"{f'{len(own)} other files' if own else 'none'}. Remove the folder."
            )
        files += own
    return class_names, sorted(files, key=lambda file: file.path)


def _require_no_splits(source: Path, class_names: Sequence[str]) -> None:
    """Check that the folders are not `train/` and `val/`, which hold the class folders: they would become classes.

    Raises:
        UsageError: they are.
    """
    if not all(name.lower() in SPLITS for name in class_names):
        return
    holders = [name for name in class_names if visible_folders(source / name)]
    if holders and not any(True for name in holders for _ in visible_files(source / name, below=False)):
        raise UsageError(
            f"{source}: expected class folders, found splits ({', '.join(class_names)}) that hold folders. Give one of "
            f"them, as in {source / holders[0]}."
        )


def _listed(entry: os.DirEntry[str], source: Path, label: int | None) -> SourceFile:
    # A broken symbolic link is an input that cannot be read, and is rejected with that reason.
    status = entry.stat(follow_symlinks=entry.is_file())
    return SourceFile(os.path.relpath(entry.path, source), status.st_size, status.st_mtime_ns, label)


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
    with staged(out / SOURCES_NAME) as partial:
        parquet.write_table(table, partial)


def _read_sources(out: Location) -> Mapping[str, ReadFile]:
    path = out / SOURCES_NAME
    try:
        with path.open("rb") as file:
            rows = parquet.read_table(file, schema=_SCHEMA).to_pylist()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable parquet file: {error}") from error
    return {(name := os.fsdecode(row["path"])): ReadFile(**{**row, "path": name}) for row in rows}


def require_unchanged(out: Location, source: Path, files: Sequence[SourceFile], *, record: bool) -> None:
    """Check that the files of a finished shard set have their recorded content.

    Args:
        out: the shard set.
        source: the image folder.
        files: what is there now; the paths and sizes are those of the set.
        record: store new modification times, so that the next run need not hash these files.

    Raises:
        ArtifactError: a file was changed, or the record is damaged.
    """
    recorded = _read_sources(out)
    touched = [file for file in files if file.modified_ns != recorded[file.path].modified_ns]
    changed = [file.path for file in touched if not recorded[file.path].is_still(file, source)]
    if changed:
        raise ArtifactError(
            f"{out}: {len(changed)} of {len(files)} source files were changed after they were sharded, as "
            f"{source / changed[0]}. Shard the folder into a new directory, or restore the files."
        )
    if touched and record:
        write_sources(out, (ReadFile(f.path, f.size, f.modified_ns, recorded[f.path].sha256) for f in files))
