"""What a person sees while a stage runs: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table

LINE_EVERY_S = 15.0


class ConsoleProgress:
    """Implements the stages' Progress on stderr. Use as a context manager."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._done, self._last = "", 0, 0, 0.0

    def __enter__(self) -> ConsoleProgress:
        if self.console.is_terminal:
            self._bars = RichProgress(
                TextColumn("{task.description:<18}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, task: str, total: int, done: int = 0) -> None:
        """A new task; see stages.progress."""
        self._name, self._total, self._done, self._last = task, total, done, time.monotonic()
        if self._bars is not None:
            self._task = self._bars.add_task(task, total=total, completed=done, note="")
        else:
            resumed = f" ({done} done before)" if done else ""
            self.console.print(f"{task}: {total}{resumed}")

    def advance(self, count: int = 1, note: str = "") -> None:
        """More is done; see stages.progress."""
        self._done += count
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, count)
            if note:
                self._bars.update(self._task, note=note)
        elif self._done >= self._total or time.monotonic() - self._last > LINE_EVERY_S:
            self._last = time.monotonic()
            self.console.print(f"{self._name}: {self._done}/{self._total}  {note}".rstrip())

    def say(self, text: str) -> None:
        """One line that stays."""
        self.console.print(text, markup=False)


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


def show_price(price: Mapping[str, Any]) -> None:
    """Print what `requantize` saved and lost."""
    table = Table(title="price of the smaller cache", title_justify="left", box=None, show_header=False, pad_edge=False)
    sizes = f"{price['small_bytes'] / 1e6:.1f} of {price['reference_bytes'] / 1e6:.1f} MB: {price['bytes_ratio']:.3f}"
    table.add_row("bytes", sizes)
    for group in ("backbone", "residual"):
        if (value := price[f"{group}_snr"]) is not None:
            table.add_row(f"signal to noise, {group} channels", f"{value:.1f} dB")
    if price["decoded_psnr"] is not None:
        table.add_row("decoded images against those of the larger cache", f"{price['decoded_psnr']:.1f} dB PSNR")
    if price["psnr_change"] is not None:
        pair = f"{price['source_psnr_reference']:.3f} → {price['source_psnr_small']:.3f} dB"
        table.add_row("decoded images against their sources", f"{pair}: {-price['psnr_change']:+.3f} dB")
    if price["loss_change"] is not None:
        pair = f"{price['heldout_loss_reference']:.5f} → {price['heldout_loss_small']:.5f}"
        table.add_row("held-out loss of the trained model", f"{pair}: {price['loss_change']:+.3%}")
    console = Console(highlight=False)
    console.print(table)
    for reason in price["not_measured"]:
        console.print(f"not measured: {reason}", markup=False, soft_wrap=True)
