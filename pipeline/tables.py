"""Results of commands on the terminal: tables or JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from svgpipe.manifests.estimate import Estimate

if TYPE_CHECKING:
    from svgpipe.stages.artifacts.diff import CacheDifference
    from svgpipe.stages.artifacts.reconstruct_averages import Average
    from svgpipe.stages.artifacts.requantize_cost import RequantizeCost
    from svgpipe.stages.extract.cost import ExtractCost

T = TypeVar("T")
INEXACT, ROUNDED = 0.05, 0.005  # error of the profile of an average, and relative rounding error of its weights
MEASURED_AVERAGE = ("latent Fréchet distance", "in the right class")


def print_result(result: T, as_json: bool, show: Callable[[T], None]) -> None:
    """Print a result as JSON, or with `show`."""
    if not as_json:
        show(result)
    elif isinstance(result, BaseModel):
        typer.echo(result.model_dump_json(indent=2))
    else:
        typer.echo(json.dumps(result, indent=2))


def new_table(title: str, *columns: str, right: Iterable[str] = ()) -> Table:
    """Return a table without lines; without `columns`, it has no header. Columns in `right` hold numbers."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=bool(columns))
    for name in columns:
        table.add_column(name, justify="right" if name in right else "left", overflow="fold")
    return table


def print_table(table: Table, *lines: str) -> None:
    """Print a table and the lines below it."""
    console = Console(highlight=False)
    console.print(table)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


def with_interval(estimate: Estimate | None, form: str, unit: str = "") -> str:
    """Return `23.50 dB (23.10 – 23.90)`; `form` is a printf format. – if not measured."""
    if estimate is None:
        return "–"
    ends = (estimate.low, estimate.high)
    interval = "" if None in ends else f" ({' – '.join(form % end for end in ends if end is not None)})"
    return f"{form % estimate.value}{unit}{interval}"


def show_timings(timings: Mapping[str, Any]) -> None:
    """Print the seconds per worker of an extraction, and the advice that follows from them."""
    if not timings.get("workers"):
        return
    phases = list(dict.fromkeys(phase for worker in timings["workers"] for phase in worker["seconds"]))
    table = new_table("seconds per worker", "role", "worker", "images", *phases, right=("images", *phases))
    for worker in timings["workers"]:
        seconds = [f"{worker['seconds'][phase]:.1f}" if phase in worker["seconds"] else "" for phase in phases]
        table.add_row(worker["role"], worker["worker"], str(worker["images"]), *seconds)
    rate = timings["steady_images_per_s"]
    steady = "" if rate is None else f", {rate:.1f} images/s once under way"
    print_table(table, f"{timings['images']} images in {timings['seconds']:.1f} s{steady}", timings["advice"])


def show_cost(cost: RequantizeCost) -> None:
    """Print size and loss of a requantized cache."""
    table = new_table("size and loss")
    sizes = f"{cost.small_bytes / 1e6:.1f} of {cost.reference_bytes / 1e6:.1f} MB: {cost.bytes_ratio:.3f}"
    table.add_row("bytes", sizes)
    for group, snr in cost.snr.items():
        if snr is not None:
            table.add_row(f"signal to noise, {group} channels", f"{snr:.1f} dB")
    if cost.decoded_psnr is not None:
        table.add_row("decoded images against those of the source cache", f"{cost.decoded_psnr:.1f} dB PSNR")
    if cost.psnr_change is not None:
        pair = f"{cost.source_psnr_reference:.3f} → {cost.source_psnr_small:.3f} dB"
        table.add_row("decoded images against the originals", f"{pair}: {-cost.psnr_change:+.3f} dB")
    if cost.loss_change is not None:
        pair = f"{cost.heldout_loss_reference:.5f} → {cost.heldout_loss_small:.5f}"
        table.add_row("held-out loss of the trained model", f"{pair}: {cost.loss_change:+.3%}")
    print_table(table, *(f"not measured: {reason}" for reason in cost.not_measured))


def show_averages(model: str, averages: Sequence[Average]) -> None:
    """Print averages of the weights of a model, measured or not; the smallest distance is marked."""
    distances = [average.latent_fd for average in averages if average.latent_fd is not None]
    measured = any(average.latent_accuracy is not None for average in averages) or bool(distances)
    columns = ["error of the profile", "rounding", *(MEASURED_AVERAGE if measured else [])]
    table = new_table(f"averages of {model}", "weights", *columns, right=columns)
    for average in averages:
        cells = [_or_dash(average.error, "{:.2%}"), _or_dash(average.rounding, "{:.3%}")]
        if measured:
            best = " (smallest)" if distances and average.latent_fd == min(distances) else ""
            cells += [_or_dash(average.latent_fd, "{:.3g}") + best, _or_dash(average.latent_accuracy, "{:.1%}")]
        table.add_row(average.name, *cells)
    inexact = [a.name for a in averages if (a.error or 0) > INEXACT or (a.rounding or 0) > ROUNDED]
    notes = [f"{', '.join(inexact)}: not exact; more snapshots (power_averages.every) or other lengths help"]
    print_table(table, *(notes if inexact else []), "use one: --ema power-SIGMA")


def _or_dash(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def show_plan(cost: ExtractCost) -> None:
    """Print the estimate of an extraction."""
    table = new_table("estimate of the extraction")
    several = "s" if cost.num_views > 1 else ""
    table.add_row("images", f"{cost.num_images:,} in {cost.shard_bytes / 1e9:.2f} GB of shards")
    table.add_row("features", f"{'x'.join(map(str, cost.row_shape))}, {cost.num_views} view{several}")
    for dtype, size in cost.gigabytes_per_view.items():
        table.add_row(f"cache, {dtype}", f"{size:.2f} GB per view, {size * cost.num_views:.2f} GB in all")
    table.add_row("encoding", f"{cost.encode_s * 1e3:.1f} ms per image, all views, one worker on this machine")
    table.add_row("reading and decoding", f"{(cost.read_s + cost.decode_s) * 1e3:.1f} ms per image and core")
    several = "s" if cost.num_workers > 1 else ""
    hours = f"{cost.hours:.2f} hours, with {cost.reader_cores} more CPU core(s) for reading"
    table.add_row(f"{cost.num_workers} worker{several}", hours)
    if cost.deadline_hours is not None:
        table.add_row(f"within {cost.deadline_hours:g} hours", f"{cost.workers_for_deadline} workers")
    print_table(table, f"estimated from {cost.sampled_images} images encoded here; a cluster may be faster or slower")


def show_diff(diff: CacheDifference) -> None:
    """Print the histograms of the differences between two caches."""
    typer.echo(f"{diff.rows} rows in views {', '.join(diff.views)}")
    cosines = [f"{low:g} … {min(1.0, high):g}" for low, high in pairwise(diff.cosine_edges)]
    differences = [f"{low:g} … {high:g}" for low, high in pairwise(diff.difference_edges)]
    differences.append(f"over {diff.difference_edges[-1]:g}")
    for group in diff.groups:
        row, view = group.largest_at
        typer.echo(
            f"\n{group.name} channels: cosine {group.mean_cosine:.6f} on average, {group.smallest_cosine:.6f} at least"
            f"; largest difference {group.largest_difference:.4g} standard deviations (row {row}, {view})"
        )
        print_table(_histogram("cosine of vectors", cosines, group.cosine_counts))
        print_table(_histogram("largest difference of rows", differences, group.difference_counts))
    for name, count in (("labels differ", diff.labels_differ), ("validity differs", diff.validity_differs)):
        if count:
            typer.echo(f"{name} in {count} rows")
    typer.echo("\ndifferent config, inputs or content:" if diff.fields else "\nthe same in config, inputs and content")
    for line in diff.fields:
        typer.echo(f"  {line}")


def _histogram(title: str, labels: Sequence[str], counts: Sequence[int]) -> Table:
    table = new_table(title)
    table.add_column(justify="right")
    table.add_column(justify="right")
    total = max(1, sum(counts))
    for label, count in zip(labels, counts, strict=True):
        if count:
            table.add_row(label, f"{count:,}", "█" * max(1, round(40 * count / total)))
    return table
