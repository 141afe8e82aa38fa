"""Charts by matplotlib: as SVG with selectable text for pages, and as PDF for papers."""

from __future__ import annotations

import io
import logging
import re
import warnings
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

# Any two differ by a CIEDE2000 of 8 or more, also for people with protanopia, deuteranopia or tritanopia; contrast on
# white is 3 or more. page_style.html has the counterparts for dark pages.
COLOURS = ("#2a7fd4", "#b84400", "#2d1a5e", "#0a8f6a", "#a8882a", "#7a1030")
INK, LEVEL_COLOUR, GRID_COLOUR = "#000000", "#7a828e", "#e3e6ea"
# CSS names of the colours. A page defines them for light and dark mode.
CSS_COLOURS = {colour: f"var(--series-{number})" for number, colour in enumerate(COLOURS, 1)} | {
    INK: "var(--ink)",
    LEVEL_COLOUR: "var(--level)",
    GRID_COLOUR: "var(--line)",
}
DASHES = ("-", "--", ":", "-.", (0, (4, 1)), (0, (1, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": GRID_COLOUR,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.axisbelow": True,
}
# Fonts for class names in other scripts; matplotlib's own has none.
OTHER_SCRIPTS = ("Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "IPAGothic", "Noto Sans", "Unifont")
WIDE, SMALL, SQUARE = (4.8, 2.9), (3.2, 1.7), (4.4, 4.4)  # inches; readable on a phone
CROWDED = 8  # more ticks have smaller labels
LEGEND_COLUMNS = 3  # more names of series continue below
LEGEND_WIDTH, HANDLE_WIDTH = 66, 7  # in characters: of a line of a legend, and of the symbol before a name
LEGEND_ROW = 0.18  # inches
SHORT_NAME = 12  # characters of the name of a logarithmic axis
LABEL_GAP = 0.07  # minimum distance of the names of levels, relative to the height


@dataclass(frozen=True)
class Drawing:
    """A finished chart."""

    title: str
    svg: Markup
    pdf: bytes

    def save_beside(self, page: Location) -> None:
        """Write the PDF next to a page: `report.html` → `report-distance-against-steps.pdf`."""
        write_atomic(page.with_name(f"{page.stem}-{_slug(self.title)}.pdf"), self.pdf)


@dataclass(frozen=True)
class LineChart:
    """One line per series over the same xs, placed at equal distances.

    Attributes:
        levels: horizontal reference lines by name.
        joined: connect the points of a series; otherwise series are drawn side by side at each x.
        logarithmic: logarithmic y axis; all values and levels must be positive.
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
        """Draw the chart, with intervals as vertical bars.

        Returns:
            The finished chart.
        """
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
        axes.tick_params(axis="x", labelsize=9 if len(self.xs) <= CROWDED else 7)
        axes.set_xlim(-0.5, len(self.xs) - 0.5)
        axes.set_xlabel(self.x_name)
        axes.set_ylabel(_logarithmic(self.y_name) if self.logarithmic else self.y_name)
        _add_legend(figure, list(self.series))
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
            linestyle=_dash(number) if self.joined else "none",
            marker=MARKERS[number % len(MARKERS)],
            markersize=4.5,
        )

    def _logarithmic_limits(self) -> tuple[float, float]:
        """Return limits from the smallest to the largest value. Longer intervals are cut off."""
        values = [v.value for values in self.series.values() for v in values] + list(self.levels.values())
        return min(values) / 1.15, max(values) * 1.15

    def _name_levels(self, axes: Axes) -> None:
        """Write the names of the levels on the right, without overlap. Needs the final limits of the axes."""
        before = -LABEL_GAP
        for name, value in sorted(self.levels.items(), key=lambda item: item[1]):
            height = float(axes.transAxes.inverted().transform(axes.transData.transform((0, value)))[1])
            before = max(height, before + LABEL_GAP)
            axes.text(1.01, before, name, transform=axes.transAxes, va="center")


def curve(title: str, xs: Sequence[float], values: Sequence[float], x_name: str) -> Drawing:
    """Return a small chart of one curve with many points, such as a training loss."""
    figure, axes = _new(SMALL)
    axes.plot(xs, values, color=COLOURS[0], linewidth=1.2)
    axes.set_xlabel(x_name)
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    return _finish(figure, title)


def curves(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    x_name: str,
    y_name: str,
    *,
    marked: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    levels: Mapping[str, float] | None = None,
) -> Drawing:
    """Return a chart of several curves with points (x, y) of their own; the y axis is logarithmic.

    Args:
        title: of the chart.
        lines: curves by name; a curve of one point is a marker.
        x_name: name of the x axis.
        y_name: name of the y axis.
        marked: single points by name, in the order of the series after the lines.
        levels: horizontal reference lines by name.
    """
    from matplotlib.ticker import MaxNLocator

    figure, axes = _new(WIDE)
    for number, (name, points) in enumerate(lines.items()):
        xs, ys = zip(*points, strict=True)
        style: dict[str, Any] = {"linestyle": _dash(number), "linewidth": 1.3, "marker": "o" if len(xs) == 1 else ""}
        axes.plot(xs, ys, label=name, color=COLOURS[number % len(COLOURS)], **style)
    for number, (name, points) in enumerate((marked or {}).items(), len(lines)):
        xs, ys = zip(*points, strict=True)
        style = {"linestyle": "none", "marker": MARKERS[number % len(MARKERS)], "markersize": 4.5}
        axes.plot(xs, ys, label=name, color=COLOURS[number % len(COLOURS)], **style)
    for name, value in (levels or {}).items():
        axes.axhline(value, color=LEVEL_COLOUR, linestyle=(0, (3, 3)), linewidth=1)
        axes.annotate(name, (1.01, value), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")  # within a decade, the minor ticks are all there is
    axes.tick_params(axis="y", which="minor", labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(x_name)
    axes.set_ylabel(_logarithmic(y_name))
    _add_legend(figure, [*lines, *(marked or {})])
    return _finish(figure, title)


def scatter(title: str, points: Sequence[tuple[float, float]], names: Sequence[str]) -> Drawing:
    """Return a scatter chart of points with class names. The name of a class is above its points."""
    figure, axes = _new(SQUARE)
    places = np.asarray(points)
    for number, name in enumerate(sorted(set(names))):
        own, colour = places[[other == name for other in names]], COLOURS[number % len(COLOURS)]
        marker = MARKERS[number % len(MARKERS)]
        axes.scatter(own[:, 0], own[:, 1], s=12, color=colour, marker=marker, alpha=0.75, linewidths=0)
        top = (float(np.median(own[:, 0])), float(own[:, 1].max()))
        axes.annotate(name, top, (0, 4), textcoords="offset points", color=INK, ha="center", fontweight="bold")
    axes.set_aspect("equal")
    axes.set_axis_off()
    return _finish(figure, title)


def arrows(
    title: str,
    source: tuple[float, float],
    targets: Mapping[str, tuple[Sequence[tuple[float, float]], tuple[float, float]]],
) -> Drawing:
    """Return a chart of thin lines from one point to the points of each target, and an arrow to its mean."""
    figure, axes = _new(SQUARE)
    for number, (name, (points, mean)) in enumerate(targets.items()):
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        for x, y in points:
            axes.plot([source[0], x], [source[1], y], color=colour, alpha=0.15, linewidth=0.6)
        xs, ys = zip(*points, strict=True)
        axes.scatter(xs, ys, s=12, color=colour, marker=marker, alpha=0.75, linewidths=0)
        axes.annotate("", mean, source, arrowprops={"arrowstyle": "-|>", "color": colour, "linewidth": 2.2})
        axes.annotate(name, mean, (0, 8), textcoords="offset points", color=INK, ha="center", fontweight="bold")
    axes.plot(*source, "o", color=LEVEL_COLOUR, markersize=7)
    axes.annotate("noise", source, (0, -14), textcoords="offset points", color=INK, ha="center")
    axes.set_aspect("equal")
    axes.set_axis_off()
    return _finish(figure, title)


def _new(size: tuple[float, float]) -> tuple[Figure, Axes]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it reports a home directory without its cache folder
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    fonts = ["DejaVu Sans", *(name for name in OTHER_SCRIPTS if name in installed)]
    with rc_context({**STYLE, "font.family": fonts}):
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.add_subplot()


def _add_legend(figure: Figure, names: Sequence[str]) -> None:
    """Add a legend above the axes, with as many columns as the longest name leaves room for. The figure grows."""
    room = LEGEND_WIDTH // (max(map(len, names)) + HANDLE_WIDTH)
    columns = max(1, min(len(names), LEGEND_COLUMNS, room))
    figure.legend(loc="outside upper left", ncols=columns, frameon=False)
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + LEGEND_ROW * (rows - 1))


def _dash(number: int) -> Any:
    """Return the dashes of a series. Where colours repeat, dashes are others."""
    return DASHES[(number + number // len(COLOURS)) % len(DASHES)]


def _logarithmic(name: str) -> str:
    """Return the label of a logarithmic axis, in two lines if it is longer than the axis."""
    return f"{name},{' ' if len(name) <= SHORT_NAME else chr(10)}logarithmic"


def _finish(figure: Figure, title: str) -> Drawing:
    """Return a chart whose bytes are the same every time: no dates, no random identifiers."""
    from matplotlib import rc_context

    svg, pdf = io.StringIO(), io.BytesIO()
    with rc_context({**STYLE, "svg.hashsalt": title}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # the page has its own fonts; a PDF shows a box
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    text = svg.getvalue()
    # Remove what belongs to a separate file: everything before the element, its size in points, metadata.
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, name in CSS_COLOURS.items():
        text = text.replace(colour, name)
    # Make identifiers unique in a page with several charts.
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{_slug(title)}-", text)
    head = f'<svg class="chart" role="img" aria-label="{Markup.escape(title)}" '
    text = re.sub(r'^<svg (.*?)width="[^"]*pt" height="[^"]*pt" ', rf"{head}\1", text, count=1, flags=re.DOTALL)
    return Drawing(title, Markup(text), pdf.getvalue())


def _slug(title: str) -> str:
    """Return `distance-against-steps` for `Distance against steps`."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
