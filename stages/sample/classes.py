"""Which classes are sampled: by name or by number."""

from __future__ import annotations

from collections.abc import Sequence

from svgpipe.manifests.class_names import find_class
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
    number = find_class(wanted, names, str(model.directory), shown)
    if number in model.untrained_classes:
        raise UsageError(f"class {names[number]!r}: {model.directory} was trained without an image of it.")
    return number


def labels_in_order(classes: Sequence[int], count: int) -> list[int]:
    """Return `count` labels, in the order of the classes: equally many of each, the first ones get the rest.

    With fewer labels than classes, they are evenly spread over the classes.
    """
    if count < len(classes):
        return [classes[place] for place in evenly_spread(len(classes), count)]
    each, rest = divmod(count, len(classes))
    return [label for place, label in enumerate(classes) for _ in range(each + (place < rest))]
