"""What `svgpipe probe` found, as a table and as a page."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.stages.analyze.probe import Probe

from .charts import LineChart
from .page import render


def show_probe(found: Probe) -> None:
    """Print the accuracies with their intervals."""
    console = Console(highlight=False)
    console.print(
        f"{found.classes} classes, {found.training_images} training images, {found.test_images} test images "
        f"({found.tested_on}); always the most frequent class: {_percent(found.most_frequent)}",
        markup=False,
        soft_wrap=True,
    )
    table = Table(
        title="top-1 accuracy, 95 % Wilson intervals; the paper's are of ImageNet",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    for name in ("channels", "number", "linear probe", f"{found.neighbours}-NN"):
        table.add_column(name, justify="left" if name == "channels" else "right")
    for group in found.groups:
        table.add_row(group.group, str(group.channels), _percent(group.linear), _percent(group.knn))
    for row in found.paper:
        table.add_row(f"paper: {row.features}", "", f"{row.top1:.1f} %", "")
    console.print(table)


def render_probe(found: Probe, out: Location) -> None:
    """Write a self-contained page."""
    series = {
        "linear probe": [_in_percent(g.linear) for g in found.groups],
        f"{found.neighbours}-NN": [_in_percent(g.knn) for g in found.groups],
    }
    levels = {"most frequent class": 100 * found.most_frequent.value}
    names = [g.group for g in found.groups]
    chart = LineChart("Top-1 accuracy by channels", "channels", "accuracy, %", names, series, levels, joined=False)
    drawn = chart.draw()
    write_atomic(out, render("probe_template.html", probe=found, chart=drawn))
    drawn.save_beside(out)


def _in_percent(f: Estimate) -> Estimate:
    low, high = (None if end is None else 100 * end for end in (f.low, f.high))
    return Estimate(value=100 * f.value, low=low, high=high, num_images=f.num_images)


def _percent(f: Estimate) -> str:
    interval = "" if f.low is None or f.high is None else f" ({100 * f.low:.1f} – {100 * f.high:.1f})"
    return f"{100 * f.value:.1f} %{interval}"
