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
        wanted: its name, or its number from 0.
        model: the diffusion model.
        shown: other names of all classes, for people; None: none.

    Raises:
        UsageError: there is no such class, or it had no training images.
    """
    names, lowered = model.class_names, str(wanted).lower()
    others = {name.lower(): number for number, name in enumerate(shown or names)}
    if str(wanted) in names:
        number = names.index(str(wanted))
    elif lowered in others:
        number = others[lowered]
    elif lowered.isdecimal() and int(lowered) < len(names):
        number = int(lowered)
    else:
        near = difflib.get_close_matches(lowered, [*names, *others], 3, 0.5)
        nearest = f" Nearest: {', '.join(dict.fromkeys(near))}." if near else ""
        raise UsageError(
            f"class {str(wanted)!r}: expected a class name of {model.directory}, or a number from 0 to "
            f"{len(names) - 1}.{nearest}"
        )
    if number in model.untrained_classes:
        raise UsageError(f"class {names[number]!r}: {model.directory} was trained without an image of it.")
    return number


def labels_in_order(classes: Sequence[int], count: int) -> list[int]:
    """Return `count` labels, sorted by class: equally many of every class, the first ones get the rest.

    With fewer labels than classes, they are evenly spread over the classes.
    """
    if count < len(classes):
        return [classes[place] for place in evenly_spread(len(classes), count)]
    each, rest = divmod(count, len(classes))
    return [label for place, label in enumerate(classes) for _ in range(each + (place < rest))]
