"""Maps of points with class names on them, as SVG inside a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from .chart import COLOURS

SIDE, MARGIN = 440, 26


@dataclass(frozen=True)
class Dot:
    """A point, or a name where the points of a class lie."""

    x: float
    y: float
    colour: str
    text: str


@dataclass(frozen=True)
class Scatter:
    """All that the template draws, in the coordinates of the SVG."""

    title: str
    dots: tuple[Dot, ...]
    names: tuple[Dot, ...]

    side = SIDE


def scatter(title: str, points: Sequence[tuple[float, float]], names: Sequence[str]) -> Scatter:
    """Points with the name of their class each, colours by the order in which names appear when sorted."""
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(sorted(set(names)))}
    lows = [min(axis) for axis in zip(*points, strict=True)]
    span = max(max(axis) - low for axis, low in zip(zip(*points, strict=True), lows, strict=True)) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        scale = (SIDE - 2 * MARGIN) / span
        return MARGIN + (x - lows[0]) * scale, SIDE - MARGIN - (y - lows[1]) * scale

    dots = [Dot(*place(*point), colours[name], name) for point, name in zip(points, names, strict=True)]
    middles = []
    for name, colour in colours.items():
        own = [dot for dot in dots if dot.text == name]
        middles.append(Dot(median(d.x for d in own), median(d.y for d in own), colour, name))
    return Scatter(title, tuple(dots), tuple(middles))
