"""Names of the members of WebDataset tars."""

from __future__ import annotations

SEGMENTATION_EXTENSION, DEPTH_EXTENSION = "seg.png", "depth.npy"  # label maps beside an image


def split_name(name: str) -> tuple[str, str]:
    """Return key and lower-case extension: `a/b.jpg` → (`a/b`, `jpg`), `a/b.seg.png` → (`a/b`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def printable(name: str) -> str:
    """Return a file name as valid Unicode; other bytes become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
