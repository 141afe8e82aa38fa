"""Charts, drawn by matplotlib: as SVG inside a page, with text that can be selected, and as PDF for a paper."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.filesystem import Location, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dark enough for text on white (WCAG AA, 4.5): class names are written in them.
COLOURS = (
    *("#b3460e", "#1f5fa8", "#2e7d4f", "#7b3fa0", "#8a6d00"),
    *("#a8326b", "#00798c", "#5d5048", "#c0392b", "#47568f"),
)
LEVEL_COLOUR = "#7a828e"
DASHES = ("-", "--", ":", "-.", (0, (4, 1)), (0, (1, 3)))
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e3e6ea",
    "axes.axisbelow": True,
}
WIDE, SMALL, SQUARE = (6.4, 2.7), (3.2, 1.7), (4.4, 4.4)  # inches
LABEL_GAP = 0.07  # of the height: names of levels nearer to each other are pushed apart


@dataclass(frozen=True)
class Drawing:
    """A finished chart."""

    title: str
    svg: Markup
    pdf: bytes

    def save_beside(self, page: Location) -> None:
        """Write the PDF beside a page: `report.html` → `report-distance-against-steps.pdf`."""
        write_atomic(page.with_name(f"{page.stem}-{_slug(self.title)}.pdf"), self.pdf)


@dataclass(frozen=True)
class LineChart:
    """One line per series over the same xs, which are placed at equal distances.

    levels: horizontal lines by name, that the series are seen against.
    joined: draw lines between the points; else the series stand beside each other at every x.
    logarithmic: y by its logarithm; all values and levels must be positive.
    """

    title: str
    x_name: str
    y_name: str
    xs: Sequence[float | str]
    series: Mapping[str, Sequence[Estimate]]
    levels: Mapping[str, float]
    joined: bool = True
    logarithmic: bool = False

    def render(self) -> Drawing:
        """The chart with intervals as vertical bars."""
        from matplotlib.ticker import LogLocator, NullLocator

        figure, axes = _new(WIDE)
        for number, (name, values) in enumerate(self.series.items()):
            self._draw_series(axes, number, name, values)
        for value in self.levels.values():
            axes.axhline(value, color=LEVEL_COLOUR, linestyle=(0, (3, 3)), linewidth=1)
        if self.logarithmic:
            axes.set_yscale("log")
            axes.set_ylim(*self._logarithmic_limits())
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
        self._name_levels(axes)
        axes.set_xticks(range(len(self.xs)), [x if isinstance(x, str) else f"{x:g}" for x in self.xs])
        axes.set_xlim(-0.5, len(self.xs) - 0.5)
        axes.set_xlabel(self.x_name)
        axes.set_ylabel(f"{self.y_name}, logarithmic" if self.logarithmic else self.y_name)
        figure.legend(loc="outside upper left", ncols=len(self.series), frameon=False)
        return _finish(figure, self.title)

    def _draw_series(self, axes: Axes, number: int, name: str, values: Sequence[Estimate]) -> None:
        beside = 0.0 if self.joined else (number - (len(self.series) - 1) / 2) / (len(self.series) + 1)
        lows = [v.value - min(v.value, v.value if v.low is None else v.low) for v in values]
        highs = [max(v.value, v.value if v.high is None else v.high) - v.value for v in values]
        axes.errorbar(
            np.arange(len(values)) + beside,
            [v.value for v in values],
            yerr=[lows, highs],
            label=name,
            color=COLOURS[number % len(COLOURS)],
            linestyle=DASHES[number % len(DASHES)] if self.joined else "none",
            marker="o",
            markersize=4.5,
        )

    def _logarithmic_limits(self) -> tuple[float, float]:
        """From the least to the largest value; intervals that reach further are cut off there."""
        values = [v.value for values in self.series.values() for v in values] + list(self.levels.values())
        return min(values) / 1.15, max(values) * 1.15

    def _name_levels(self, axes: Axes) -> None:
        """Names on the right of the lines, from the lowest up. Needs the final limits of the axes."""
        before = -LABEL_GAP
        for name, value in sorted(self.levels.items(), key=lambda item: item[1]):
            height = float(axes.transAxes.inverted().transform(axes.transData.transform((0, value)))[1])
            before = max(height, before + LABEL_GAP)
            axes.text(1.01, before, name, transform=axes.transAxes, va="center")


def curve(title: str, xs: Sequence[float], values: Sequence[float], x_name: str) -> Drawing:
    """Many points as one small line, as of a training."""
    figure, axes = _new(SMALL)
    axes.plot(xs, values, color=COLOURS[0], linewidth=1.2)
    axes.set_xlabel(x_name)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    return _finish(figure, title)


def scatter(title: str, points: Sequence[tuple[float, float]], names: Sequence[str]) -> Drawing:
    """Points with the name of a class each; the name stands where the points of the class lie."""
    figure, axes = _new(SQUARE)
    places = np.asarray(points)
    for number, name in enumerate(sorted(set(names))):
        own, colour = places[[other == name for other in names]], COLOURS[number % len(COLOURS)]
        axes.scatter(own[:, 0], own[:, 1], s=9, color=colour, alpha=0.75, linewidths=0)
        x, y = np.median(own, axis=0)
        paper = {"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1}
        axes.text(x, y, name, color=colour, ha="center", va="center", fontweight="bold", bbox=paper)
    axes.set_aspect("equal")
    axes.set_axis_off()
    return _finish(figure, title)


def _new(size: tuple[float, float]) -> tuple[Figure, Axes]:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.add_subplot()


def _finish(figure: Figure, title: str) -> Drawing:
    """The same bytes for the same chart: neither dates nor random identifiers."""
    from matplotlib import rc_context

    svg, pdf = io.StringIO(), io.BytesIO()
    with rc_context({**STYLE, "svg.hashsalt": title}):
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    text = svg.getvalue()
    # Of a file of its own: what comes before the element, its size in points, and metadata.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    # Identifiers are unique in a page that holds several charts.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{_slug(title)}-", text)
    head = f'<svg class="chart" role="img" aria-label="{Markup.escape(title)}" '
    text = re.sub(r'^<svg (.*?)width="[^"]*pt" height="[^"]*pt" ', rf"{head}\1", text, count=1, flags=re.DOTALL)
    return Drawing(title, Markup(text), pdf.getvalue())


def _slug(title: str) -> str:
    """`Distance against steps` → `distance-against-steps`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
