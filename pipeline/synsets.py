"""Human names of ImageNet's classes, from the tables in the timm package. Does not import timm."""

from __future__ import annotations

import functools
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

_SYNSET = re.compile(r"n\d{8}")


def shown_names(names: Sequence[str]) -> list[str]:
    """Return class names for a reader: `n01440764 tench` for a synset, other names as they are."""
    return [shown_name(name) for name in names]


def shown_name(name: str) -> str:
    """Return one class name for a reader, see `shown_names`."""
    lemma = _lemmas().get(name) if _SYNSET.fullmatch(name) else None
    return name if lemma is None else f"{name} {lemma}"


def imagenet_synsets() -> list[str]:
    """Return the 1,000 synsets of ImageNet-1k in label order; an empty list if timm has no such table."""
    return _table("imagenet_synsets.txt")


@functools.cache
def _lemmas() -> dict[str, str]:
    """Return the first human name of every synset."""
    entries = (line.partition("\t") for line in _table("imagenet_synset_to_lemma.txt"))
    return {synset: lemmas.partition(",")[0].strip() for synset, _, lemmas in entries}


def _table(name: str) -> list[str]:
    found = importlib.util.find_spec("timm")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    for folder in folders:
        path = Path(folder) / "data" / "_info" / name
        if path.is_file():
            return path.read_text(encoding="utf-8").splitlines()
    return []
