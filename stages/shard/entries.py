"""Files of a source of images, as they are listed."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import PurePosixPath

from ..images.decode import EXTENSIONS

TRAIN, HELDOUT = frozenset({"train", "training"}), frozenset({"val", "valid", "validation"})
SPLITS = TRAIN | HELDOUT | {"test", "testing"}


def modified_ns(status: os.stat_result) -> int:
    """Return the modification time in ns, at most what 64 bits hold (the year 2262)."""
    return min(status.st_mtime_ns, 2**63 - 1)


@dataclass(frozen=True)
class Entry:
    """One file of a source.

    Attributes:
        name: its name in the source.
        size: in bytes; 0 for a row of a table.
        modified_ns: of the file, or of the archive or table that holds it.
        class_name: None if it lies in no class.
        origin: folder, archive or table that holds it, absolute.
        place: where it lies: offset in a tar; record batch and row of a table.
        block: files of one block are read together; empty: this one is read alone.
        problem: why it cannot be used, as found in the listing; empty: nothing is known.
    """

    name: str
    size: int
    modified_ns: int
    class_name: str | None
    origin: str
    place: tuple[int, ...] = ()
    block: str = ""
    problem: str = ""

    @property
    def is_image(self) -> bool:
        """Whether it is a row of a table, or has the extension of an image."""
        return bool(self.block) or PurePosixPath(self.name).suffix.lower() in EXTENSIONS


@dataclass(frozen=True)
class Listing:
    """Files of a source, and its class names in label order (None: the sorted names of the classes)."""

    entries: list[Entry]
    class_names: list[str] | None = None
