"""Hashes of the files of an image folder, kept between runs: a folder may hold hundreds of gigabytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from svgpipe.manifests.filesystem import Location, make_directory, write_atomic

READERS = 16


class FileHash(NamedTuple):
    """Size, modification time and sha256 of a file."""

    size: int
    modified_ns: int
    sha256: str


def hashes_of(files: Mapping[str, Path], kept: Location | None) -> dict[str, FileHash]:
    """Return the hashes of files by name. A file with its kept size and modification time is not read.

    Args:
        files: paths by name.
        kept: JSON file with the hashes of earlier runs, which is updated; None: hash all files.
    """
    known = {} if kept is None else _read(kept)
    with ThreadPoolExecutor(READERS) as readers:
        found = dict(zip(files, readers.map(lambda name: _hashed(files[name], known.get(name)), files), strict=True))
    if kept is not None and not found.items() <= known.items():
        make_directory(kept.parent)
        write_atomic(kept, json.dumps(known | found).encode())
    return found


def _hashed(path: Path, known: FileHash | None) -> FileHash:
    status = path.stat()
    if known is not None and known[:2] == (status.st_size, status.st_mtime_ns):
        return known
    data = path.read_bytes()
    return FileHash(len(data), status.st_mtime_ns, hashlib.sha256(data).hexdigest())


def _read(kept: Location) -> dict[str, FileHash]:
    try:
        return {name: FileHash(*values) for name, values in json.loads(kept.read_bytes()).items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
