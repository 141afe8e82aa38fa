"""Progress of a running stage: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

LINE_EVERY_S = 15.0


class ConsoleProgress:
    """Implements `stages.runtime.Progress` on stderr. Use it as a context manager."""

    def __init__(self) -> None:
        self.console = Console(file=sys.stderr, highlight=False, soft_wrap=True)
        self._bars: RichProgress | None = None
        self._task: TaskID | None = None
        self._name, self._total, self._done, self._last = "", 0, 0, 0.0
        self._unit, self._began_at, self._began_done, self._note = "", 0.0, 0, ""

    def __enter__(self) -> ConsoleProgress:
        if self.console.is_terminal:
            self._bars = RichProgress(
                TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=15)),
                BarColumn(bar_width=10),
                MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
                TextColumn("{task.fields[unit]}", table_column=Column(no_wrap=True, min_width=5)),
                TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
                TextColumn("left", table_column=Column(no_wrap=True, min_width=4)),
                # The only column that is shortened on a narrow terminal.
                TextColumn("{task.fields[note]}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
                expand=True,
                console=self.console,
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        """Start a task of `total` items, in the plural `unit`. An earlier run finished `done` of them."""
        again = task == self._name
        self._name, self._total, self._done, self._last = task, total, done, time.monotonic()
        self._unit, self._began_at, self._began_done, self._note = unit, self._last, done, ""
        if self._bars is not None and self._task is not None and again:
            self._bars.reset(self._task, total=total, completed=done)  # training went back to a checkpoint
        elif self._bars is not None:
            self._task = self._bars.add_task(task, total=total, completed=done, unit=unit, note="")
        else:
            resumed = f" ({done} done before)" if done else ""
            self._line(f"{task}: {total} {unit}{resumed}")

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished items, and show a short note."""
        self._done += count
        self._note = note or self._note
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, count)
            if note:
                self._bars.update(self._task, note=note)
        elif self._done >= self._total or time.monotonic() - self._last > LINE_EVERY_S:
            self._last = time.monotonic()
            self._line(f"{self._name}: {self._done}/{self._total} {self._unit}  {self._note}{self._left()}".rstrip())

    def _left(self) -> str:
        """Return the remaining time at the current pace."""
        seconds, items = self._last - self._began_at, self._done - self._began_done
        if items <= 0 or self._done >= self._total:
            return ""
        return f"  left {timedelta(seconds=round(seconds / items * (self._total - self._done)))}"

    def say(self, text: str) -> None:
        """Print one line that stays."""
        self._line(text)

    def _line(self, text: str) -> None:
        clock = "" if self.console.is_terminal else f"{time.strftime('%H:%M:%S')} "
        self.console.print(f"{clock}{text}", markup=False)
