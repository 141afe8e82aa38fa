"""The result of `svgpipe analyze`, as a table and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.markup import escape

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.stages.analyze.analyze import Analysis, CacheAnalysis
from svgpipe.stages.analyze.class_velocities import ClassVelocities

from .charts import Drawing, LineChart, arrows, scatter
from .page import render
from .synsets import shown_names
from .tables import new_table, print_table, with_interval


@dataclass(frozen=True)
class AnalysisRow:
    """One quantity, with a text per cache."""

    name: str
    what: str
    values: list[str]


@dataclass(frozen=True)
class CachePlots:
    """The charts of one cache. rows: number of images that contribute to the velocity field, by time."""

    analysis: CacheAnalysis
    map: Drawing | None
    agreement: Drawing | None
    velocities: Drawing | None
    rows: str


def show_analysis(analysis: Analysis) -> None:
    """Print the numbers, one column per cache, and what was not measured."""
    names = [escape(one.cache) for one in analysis.caches]
    table = new_table("analysis, 95 % intervals", "", *names, right=names)
    for row in summary_rows(analysis.caches):
        table.add_row(row.name, *row.values)
    reasons = [f"not measured of {one.cache}: {reason}" for one in analysis.caches for reason in one.not_measured]
    print_table(table, *reasons)


def summary_rows(caches: Sequence[CacheAnalysis]) -> list[AnalysisRow]:
    """Return the summary of every cache, one row per quantity; – if not measured."""
    rows = [
        AnalysisRow("images", "", [f"{c.num_images} of {len(c.classes)} classes" for c in caches]),
        AnalysisRow("latent", "rows, columns, channels", ["x".join(map(str, c.shape)) for c in caches]),
    ]
    for group in dict.fromkeys(d.group for c in caches for d in c.distances):
        of_group = [next((d for d in c.distances if d.group == group), None) for c in caches]
        rows.append(
            AnalysisRow(
                f"distance between / within classes, {group}",
                "pooled features; 1: classes do not matter",
                [_text(None if d is None else d.ratio) for d in of_group],
            )
        )
    rows.append(
        AnalysisRow(
            "velocity fields of two classes / of two halves of one",
            "(1 - cosine between) / (1 - cosine within), mean over times; 1: classes do not matter",
            ["–" if (p := c.mean_parted) is None else f"{_text(p)}, {p.num_images} points" for c in caches],
        )
    )
    if any(c.velocities is not None for c in caches):
        rows += [
            AnalysisRow(
                f"cosine of velocities, {which}",
                "velocity to an image, and the mean velocity to the class",
                ["–" if (v := c.velocities) is None else _of_both(v, attribute) for c in caches],
            )
            for which, attribute in (("own class", "own"), ("other class", "other"))
        ]
    straight = [c.straightness for c in caches]
    for name, what, attribute in (
        (
            "largest deviation from a straight path",
            "relative to the distance from noise to sample",
            "largest_deviation",
        ),
        ("curvature of the paths", "0: straight", "curvature"),
        ("error of a single step", "relative to the distance from noise to sample", "one_step"),
    ):
        rows.append(AnalysisRow(name, what, [_text(None if s is None else getattr(s, attribute)) for s in straight]))
    return rows


def render_analysis(analysis: Analysis, out: Location) -> None:
    """Write a self-contained page."""
    numbered = enumerate(analysis.caches, 1)
    straight = {f"{number}: {c.cache}": c.straightness for number, c in numbered if c.straightness is not None}
    deviation = None
    if straight:
        times = next(iter(straight.values())).times[::5]
        series = {name: s.deviation[::5] for name, s in straight.items()}
        chart = LineChart("Distance from the straight path", "t", "relative distance", times, series, {})
        deviation = chart.render()
    plots = [_plots(one, number) for number, one in enumerate(analysis.caches, 1)]
    page = render(
        "analysis_template.html",
        analysis=analysis,
        rows=summary_rows(analysis.caches),
        plots=plots,
        deviation=deviation,
    )
    write_atomic(out, page)
    for drawing in (deviation, *(drawing for plot in plots for drawing in (plot.map, plot.agreement, plot.velocities))):
        if drawing is not None:
            drawing.save_beside(out)


def _plots(one: CacheAnalysis, number: int) -> CachePlots:
    names = dict(zip(sorted({m.label for m in one.map}), shown_names(one.classes), strict=False))
    points = (
        scatter(f"t-SNE of cache {number}", [(m.x, m.y) for m in one.map], [names[m.label] for m in one.map])
        if one.map
        else None
    )
    agreement = None
    if one.agreement:
        series = {
            "within a class": [a.within for a in one.agreement],
            "between classes": [a.between for a in one.agreement],
        }
        times = [a.time for a in one.agreement]
        agreement = LineChart(
            f"Agreement of velocity fields, cache {number}", "t", "cosine", times, series, {}
        ).render()
    rows = ", ".join(f"{a.rows.value:.3g} at {a.time:g}" for a in one.agreement)
    return CachePlots(one, points, agreement, _velocities(one, number), rows)


def _velocities(one: CacheAnalysis, number: int) -> Drawing | None:
    """Return the chart of the velocities from a noise sample to the images of two classes."""
    if (found := one.velocities) is None:
        return None
    targets = {plane.name: (plane.images, plane.mean) for plane in found.classes}
    return arrows(f"Velocities of two classes, cache {number}", found.source, targets)


def _of_both(found: ClassVelocities, attribute: str) -> str:
    return "; ".join(f"{plane.name} {_text(getattr(plane, attribute))}" for plane in found.classes)


def _text(f: Estimate | None) -> str:
    return with_interval(f, "%.3f")
