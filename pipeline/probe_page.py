"""The result of `svgpipe probe`, as a table and as a page."""

from __future__ import annotations

import typer

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.stages.analyze.probe import Probe

from .charts import LineChart
from .page import render
from .tables import new_table, print_table, with_interval


def show_probe(probe: Probe) -> None:
    """Print the accuracies with their intervals."""
    typer.echo(
        f"{probe.classes} classes, {probe.training_images} training images, {probe.test_images} test images "
        f"({probe.tested_on}); accuracy of the most frequent class: {_percent(probe.most_frequent)}"
    )
    numbers = ("number", "linear probe", f"{probe.neighbours}-NN")
    title = "top-1 accuracy, 95 % Wilson intervals; the paper's values are for ImageNet"
    table = new_table(title, "channels", *numbers, right=numbers)
    for group in probe.groups:
        table.add_row(group.group, str(group.channels), _percent(group.linear), _percent(group.knn))
    for row in probe.paper:
        table.add_row(f"paper: {row.features}", "", f"{row.top1:.1f} %", "")
    print_table(table)


def render_probe(probe: Probe, out: Location) -> None:
    """Write a self-contained page."""
    series = {
        "linear probe": [_in_percent(g.linear) for g in probe.groups],
        f"{probe.neighbours}-NN": [_in_percent(g.knn) for g in probe.groups],
    }
    levels = {"most frequent class": 100 * probe.most_frequent.value}
    names = [g.group for g in probe.groups]
    chart = LineChart("Top-1 accuracy by channels", "channels", "accuracy, %", names, series, levels, joined=False)
    drawn = chart.render()
    write_atomic(out, render("probe_template.html", probe=probe, chart=drawn))
    drawn.save_beside(out)


def _in_percent(f: Estimate) -> Estimate:
    low, high = (None if end is None else 100 * end for end in (f.low, f.high))
    return Estimate(value=100 * f.value, low=low, high=high, num_images=f.num_images)


def _percent(share: Estimate) -> str:
    return with_interval(_in_percent(share), "%.1f", " %")
