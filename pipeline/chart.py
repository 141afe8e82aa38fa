"""Charts with axes, as SVG inside a page: no script, readable in print."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 130, 14, 40
LINE_HEIGHT = 13
MAX_TICKS = 9
COLOURS = (
    *("#b3460e", "#1f5fa8", "#2e7d4f", "#7b3fa0", "#8a6d00"),
    *("#a8326b", "#00798c", "#5d5048", "#c0392b", "#47568f"),
)
DASHES = ("", "7 4", "2 3", "9 3 2 3", "4 2", "1 4")


@dataclass(frozen=True)
class Point:
    """A place in the chart, the ends of its interval if it has one, and what it says."""

    x: float
    y: float
    low: float | None
    high: float | None
    text: str


@dataclass(frozen=True)
class Line:
    """One series: colour and dash both tell it apart."""

    name: str
    points: tuple[Point, ...]
    colour: str
    dash: str
    joined: bool

    @property
    def path(self) -> str:
        """Points of an SVG polyline."""
        return " ".join(f"{p.x:.1f},{p.y:.1f}" for p in self.points)


@dataclass(frozen=True)
class Level:
    """A horizontal line that the series are seen against; its name stands at `text_y`, clear of the others'."""

    name: str
    y: float
    text_y: float


@dataclass(frozen=True)
class Tick:
    """A mark on an axis."""

    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """All that the template draws, in the coordinates of the SVG."""

    title: str
    x_name: str
    y_name: str
    lines: tuple[Line, ...]
    levels: tuple[Level, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]

    width, height = WIDTH, HEIGHT
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM


@dataclass(frozen=True)
class Value:
    """A number with its interval."""

    value: float
    low: float | None = None
    high: float | None = None


def chart(
    title: str,
    x_name: str,
    y_name: str,
    xs: Sequence[int | float | str],
    series: Mapping[str, Sequence[Value]],
    levels: Mapping[str, float],
    *,
    joined: bool = True,
    logarithmic: bool = False,
) -> Chart:
    """One line per series over the same xs, which are placed at equal distances; y from 0, or the least value below it.

    Args:
        series: as many values as there are xs.
        levels: horizontal lines by name.
        joined: draw lines between the points; else the series stand beside each other at every x.
        logarithmic: y by its logarithm, from the least value or level to the largest, all of which must be positive;
            intervals that reach further are cut off there.
    """
    drawn = [v for values in series.values() for v in values]
    ends = [end for v in drawn for end in (v.low, v.value, v.high) if end is not None]
    axis = _logarithmic([*(v.value for v in drawn), *levels.values()]) if logarithmic else _linear(ends, levels)
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    apart = 0 if joined else width / len(xs) / (len(series) + 1)

    def at(i: int, number: float = 0.0) -> float:
        return LEFT + width * (i + 0.5) / len(xs) + apart * number

    def up(value: float) -> float:
        return TOP + height * (1 - axis.place(value))

    def point(i: int, v: Value, name: str, number: int) -> Point:
        low, high = (None if end is None else up(end) for end in (v.low, v.high))
        beside = number - (len(series) - 1) / 2
        return Point(at(i, beside), up(v.value), low, high, f"{name}, {x_name} {xs[i]}: {v.value:.4g}")

    lines = [
        Line(
            name,
            tuple(point(i, v, name, number) for i, v in enumerate(values)),
            COLOURS[number % len(COLOURS)],
            DASHES[number % len(DASHES)],
            joined,
        )
        for number, (name, values) in enumerate(series.items())
    ]
    return Chart(
        title,
        x_name,
        f"{y_name}, logarithmic" if logarithmic else y_name,
        tuple(lines),
        _named({name: up(value) for name, value in levels.items()}),
        tuple(Tick(at(i), str(x)) for i, x in enumerate(xs)),
        tuple(Tick(up(value), f"{value:g}") for value in axis.ticks),
    )


@dataclass(frozen=True)
class _Axis:
    """From `bottom` to `top`; what lies outside is drawn at the end."""

    bottom: float
    top: float
    ticks: tuple[float, ...]
    scale: Callable[[float], float] = float

    def place(self, value: float) -> float:
        """0 at the bottom, 1 at the top."""
        low, high = self.scale(self.bottom), self.scale(self.top)
        return (self.scale(min(max(value, self.bottom), self.top)) - low) / (high - low)


def _linear(ends: Sequence[float], levels: Mapping[str, float]) -> _Axis:
    top = 1.05 * max([0.0, *ends, *levels.values()])
    bottom = min([0.0, *(1.05 * end for end in ends)])
    top = top if top > bottom else 1.0
    return _Axis(bottom, top, tuple(_round_values(bottom, top)))


def _logarithmic(values: Sequence[float]) -> _Axis:
    """1, 2 and 5 times powers of ten, or powers of ten alone where there would be too many."""
    bottom, top = min(values) / 1.15, max(values) * 1.15
    powers = range(math.floor(math.log10(bottom)), math.ceil(math.log10(top)) + 1)
    for factors in ((1, 2, 5), (1,)):
        ticks = tuple(f * 10.0**p for p in powers for f in factors if bottom <= f * 10.0**p <= top)
        if len(ticks) <= MAX_TICKS:
            break
    return _Axis(bottom, top, ticks or (min(values),), math.log)


def _named(places: Mapping[str, float]) -> tuple[Level, ...]:
    """Levels from the top down, their names pushed apart where they would lie on each other."""
    found: list[Level] = []
    for name, y in sorted(places.items(), key=lambda item: item[1]):
        found.append(Level(name, y, max(y, found[-1].text_y + LINE_HEIGHT) if found else y))
    return tuple(found)


def _round_values(bottom: float, top: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `bottom` <= 0 to `top`: three to eight of them."""
    third = (top - bottom) / 3
    power = 10.0 ** math.floor(math.log10(third))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= third)
    return [round(i * step, 12) for i in range(math.ceil(bottom / step), int(top / step) + 1)]
