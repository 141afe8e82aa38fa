"""Tables that commands end with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console
from rich.table import Table


def show_timings(timings: Mapping[str, Any]) -> None:
    """Print where an extraction's time went, a row per worker, and the advice that follows from it."""
    if not timings.get("workers"):
        return
    phases = list(dict.fromkeys(phase for worker in timings["workers"] for phase in worker["seconds"]))
    table = Table(title="seconds per worker", title_justify="left", box=None, pad_edge=False)
    for name in ("", "worker", "images", *phases):
        table.add_column(name, justify="left" if name in ("", "worker") else "right")
    for worker in timings["workers"]:
        seconds = [f"{worker['seconds'][phase]:.1f}" if phase in worker["seconds"] else "" for phase in phases]
        table.add_row(worker["role"], worker["worker"], str(worker["images"]), *seconds)
    console = Console(highlight=False)
    console.print(table)
    rate = timings["steady_images_per_s"]
    steady = "" if rate is None else f", {rate:.1f} images/s once under way"
    console.print(f"{timings['images']} images in {timings['seconds']:.1f} s{steady}", markup=False)
    console.print(timings["advice"], markup=False, soft_wrap=True)


def show_cost(cost: Mapping[str, Any]) -> None:
    """Print what `requantize` saved and lost."""
    table = Table(title="cost of the smaller cache", title_justify="left", box=None, show_header=False, pad_edge=False)
    sizes = f"{cost['small_bytes'] / 1e6:.1f} of {cost['reference_bytes'] / 1e6:.1f} MB: {cost['bytes_ratio']:.3f}"
    table.add_row("bytes", sizes)
    for group in ("backbone", "residual"):
        if (value := cost[f"{group}_snr"]) is not None:
            table.add_row(f"signal to noise, {group} channels", f"{value:.1f} dB")
    if cost["decoded_psnr"] is not None:
        table.add_row("decoded images against those of the larger cache", f"{cost['decoded_psnr']:.1f} dB PSNR")
    if cost["psnr_change"] is not None:
        pair = f"{cost['source_psnr_reference']:.3f} → {cost['source_psnr_small']:.3f} dB"
        table.add_row("decoded images against their sources", f"{pair}: {-cost['psnr_change']:+.3f} dB")
    if cost["loss_change"] is not None:
        pair = f"{cost['heldout_loss_reference']:.5f} → {cost['heldout_loss_small']:.5f}"
        table.add_row("held-out loss of the trained model", f"{pair}: {cost['loss_change']:+.3%}")
    console = Console(highlight=False)
    console.print(table)
    for reason in cost["not_measured"]:
        console.print(f"not measured: {reason}", markup=False, soft_wrap=True)


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what an extraction will take."""
    table = Table(title="plan of an extraction", title_justify="left", box=None, show_header=False, pad_edge=False)
    rows, columns, channels = plan["row_shape"]
    views = plan["num_views"]
    table.add_row("images", f"{plan['num_images']:,} in {plan['shard_bytes'] / 1e9:.2f} GB of shards")
    table.add_row("features", f"{rows}x{columns}x{channels}, {views} view{'s' if views > 1 else ''}")
    for dtype, gigabytes in plan["gigabytes_per_view"].items():
        table.add_row(f"cache, {dtype}", f"{gigabytes:.2f} GB per view, {gigabytes * views:.2f} GB in all")
    table.add_row("encoding", f"{plan['encode_s'] * 1e3:.1f} ms per image, all views, one worker like this machine")
    reading = (plan["read_s"] + plan["decode_s"]) * 1e3
    table.add_row("reading and decoding", f"{reading:.1f} ms per image and core")
    workers = plan["num_workers"]
    table.add_row(
        f"{workers} worker{'s' if workers > 1 else ''}",
        f"{plan['hours']:.2f} hours, with {plan['reader_cores']} more CPU core(s) for reading",
    )
    if plan["deadline_hours"] is not None:
        table.add_row(f"within {plan['deadline_hours']:g} hours", f"{plan['workers_for_deadline']} workers")
    console = Console(highlight=False)
    console.print(table)
    console.print(f"estimated from {plan['sampled_images']} images encoded here; the cluster may be faster or slower")


def show_diff(diff: Mapping[str, Any]) -> None:
    """Print the histograms of two caches' differences."""
    console = Console(highlight=False)
    console.print(f"{diff['rows']} rows in views {', '.join(diff['views'])}", markup=False)
    for group in diff["groups"]:
        row, view = group["largest_at"]
        console.print(
            f"\n{group['name']} channels: cosine {group['mean_cosine']:.6f} on average, {group['smallest_cosine']:.6f} "
            f"at least; largest difference {group['largest_difference']:.4g} standard deviations (row {row}, {view})",
            markup=False,
            soft_wrap=True,
        )
        edges = diff["cosine_edges"]
        labels = [f"{low:g} … {min(1.0, high):g}" for low, high in pairwise(edges)]
        _histogram(console, "cosine of vectors", labels, group["cosine_counts"])
        edges = diff["difference_edges"]
        labels = [f"{low:g} … {high:g}" for low, high in pairwise(edges)] + [f"over {edges[-1]:g}"]
        _histogram(console, "largest difference of rows", labels, group["difference_counts"])
    for name in ("labels_differ", "validity_differs"):
        if diff[name]:
            console.print(f"{name.replace('_', ' ')} in {diff[name]} rows", markup=False)
    console.print(
        "\nwhat they were made from differs in:" if diff["fields"] else "\nthe same in config, inputs and content"
    )
    for line in diff["fields"]:
        console.print(f"  {line}", markup=False, soft_wrap=True)


def _histogram(console: Console, title: str, labels: Sequence[str], counts: Sequence[int]) -> None:
    table = Table(title=title, title_justify="left", box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column(justify="right")
    table.add_column()
    total = max(1, sum(counts))
    for label, count in zip(labels, counts, strict=True):
        if count:
            table.add_row(label, f"{count:,}", "█" * max(1, round(40 * count / total)))
    console.print(table)
