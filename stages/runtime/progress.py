"""Interface for the progress of a stage."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.progress_file import ProgressEntry, append_log

# Minimum seconds between two entries on disk, because writes to an object store cost time and money.
LOCAL_EVERY_S, REMOTE_EVERY_S, LOG_EVERY_S = 1.0, 30.0, 60.0
SAID = 5


class Progress(Protocol):
    """Receives the progress of a stage."""

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        """Start a task of `total` items, in the plural `unit`. An earlier run finished `done` of them."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count finished items; `note` is a short text next to the bar."""

    def say(self, text: str) -> None:
        """Print one line."""


class Silent:
    """Shows nothing."""

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None: ...

    def advance(self, count: int = 1, note: str = "") -> None: ...

    def say(self, text: str) -> None: ...


class Recorded:
    """Passes progress on, and writes it to the directory of the stage: for `svgpipe status`, and to run.log."""

    def __init__(self, progress: Progress | None, directory: Location) -> None:
        self.progress, self.directory = progress or Silent(), directory
        self._every_s = LOCAL_EVERY_S if isinstance(directory, Path) else REMOTE_EVERY_S
        self._logged_at = now = time.time()
        self.entry = ProgressEntry("", 0, "", 0, now, 0, now)

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        now = time.time()
        self.entry = ProgressEntry(task, total, unit, done, now, done, now, said=self.entry.said)
        self.entry.write(self.directory)
        append_log(self.directory, f"{task}: {total} {unit}, {done} done before")
        self.progress.begin(task, total, unit, done)

    def advance(self, count: int = 1, note: str = "") -> None:
        now, before = time.time(), self.entry.updated_at
        self.entry.done += count
        self.entry.note = note or self.entry.note
        last = self.entry.done >= self.entry.total
        if now - before >= self._every_s or last:
            self.entry.updated_at = now
            self.entry.write(self.directory)
        if now - self._logged_at >= LOG_EVERY_S or last:
            self._logged_at = now
            entry = self.entry
            append_log(self.directory, f"{entry.task}: {entry.done}/{entry.total} {entry.unit}  {entry.note}".rstrip())
        self.progress.advance(count, note)

    def say(self, text: str) -> None:
        self.entry.said, self.entry.updated_at = [*self.entry.said, text][-SAID:], time.time()
        self.entry.write(self.directory)
        append_log(self.directory, text)
        self.progress.say(text)
