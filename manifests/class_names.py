"""Finds a class by its name or its number."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from .errors import UsageError


def find_class(wanted: str | int, names: Sequence[str], where: str, shown: Sequence[str] | None = None) -> int:
    """Return the number of a class.

    Args:
        wanted: its number from 0, or as text its name or its number.
        names: names of all classes, in label order.
        where: what has these classes, for messages.
        shown: names of all classes for people: `n01443537 goldfish`; None: none.

    Raises:
        UsageError: there is no such class, or there are several.
    """
    if isinstance(wanted, str) and wanted in names:
        return list(names).index(wanted)
    if isinstance(wanted, str) and (found := _named(wanted.lower(), names, shown or names)):
        if len(found) > 1:
            raise UsageError(f"class {wanted!r}: several classes have this name: {', '.join(names[n] for n in found)}.")
        return found[0]
    if str(wanted).isdecimal() and int(wanted) < len(names):
        return int(wanted)
    raise UsageError(
        f"class {str(wanted)!r}: expected a class name of {where}, or a number from 0 to {len(names) - 1}."
        f"{_nearest(str(wanted).lower(), names, shown or names)}"
    )


def _named(lowered: str, names: Sequence[str], shown: Sequence[str]) -> list[int]:
    """Return the classes that are shown under a name, with or without their own before it."""
    return [
        number
        for number, (name, text) in enumerate(zip(names, shown, strict=True))
        if lowered and lowered in (text.lower(), text.removeprefix(name).strip().lower())
    ]


def _nearest(lowered: str, names: Sequence[str], shown: Sequence[str]) -> str:
    alone = [text.removeprefix(name).strip() or text for name, text in zip(names, shown, strict=True)]
    by_lowered = {text.lower(): text for text in (*names, *alone)}
    near = difflib.get_close_matches(lowered, list(by_lowered), 3, 0.5)
    return f" Nearest: {', '.join(by_lowered[text] for text in near)}." if near else ""
