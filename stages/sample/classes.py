"""Which classes are sampled: by name or by number."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.selection import evenly_spread

from ..networks.diffusion import TrainedDiffusion


def class_number(wanted: str | int, model: TrainedDiffusion, shown: Sequence[str] | None = None) -> int:
    """Return the number of a class.

    Args:
        wanted: its number from 0, or as text its name or its number.
        model: the diffusion model.
        shown: names of all classes for people: `n01443537 goldfish`; None: none.

    Raises:
        UsageError: there is no such class, there are several, or it had no training images.
    """
    names = model.class_names
    if isinstance(wanted, str) and wanted in names:
        number = names.index(wanted)
    elif isinstance(wanted, str) and (found := _named(wanted.lower(), names, shown or names)):
        if len(found) > 1:
            raise UsageError(f"class {wanted!r}: several classes have this name: {', '.join(names[n] for n in found)}.")
        number = found[0]
    elif str(wanted).isdecimal() and int(wanted) < len(names):
        number = int(wanted)
    else:
        raise UsageError(
            f"class {str(wanted)!r}: expected a class name of {model.directory}, or a number from 0 to "
            f"{len(names) - 1}.{_nearest(str(wanted).lower(), names, shown or names)}"
        )
    if number in model.untrained_classes:
        raise UsageError(f"class {names[number]!r}: {model.directory} was trained without an image of it.")
    return number


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


def labels_in_order(classes: Sequence[int], count: int) -> list[int]:
    """Return `count` labels, in the order of the classes: equally many of each, the first ones get the rest.

    With fewer labels than classes, they are evenly spread over the classes.
    """
    if count < len(classes):
        return [classes[place] for place in evenly_spread(len(classes), count)]
    each, rest = divmod(count, len(classes))
    return [label for place, label in enumerate(classes) for _ in range(each + (place < rest))]
