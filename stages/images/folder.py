"""Lists image folders. Every command that reads a folder of images uses this walk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def visible_folders(folder: Path) -> list[str]:
    """Return the sorted names of the folders directly in `folder`, links to folders included, without hidden ones."""
    return sorted(entry.name for entry in os.scandir(folder) if _is_folder(entry) and not entry.name.startswith("."))


def visible_files(folder: Path, *, below: bool = True) -> Iterator[os.DirEntry[str]]:
    """Yield the files in `folder`. Files and folders whose names begin with a dot are skipped.

    Args:
        folder: to list.
        below: also list the folders in it. Links to folders are followed, except to a folder that contains the link.

    Yields:
        Files, and links that lead to nothing, in no particular order.
    """
    yield from _walk(folder, below, frozenset({_identity(folder)}))


def _walk(folder: Path, below: bool, above: frozenset[tuple[int, int]]) -> Iterator[os.DirEntry[str]]:
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        if not _is_folder(entry):
            yield entry
        elif below and (identity := _identity(entry)) not in above:
            yield from _walk(Path(entry.path), below, above | {identity})


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(place: Path | os.DirEntry[str]) -> tuple[int, int]:
    status = Path(place).stat()
    return status.st_dev, status.st_ino
