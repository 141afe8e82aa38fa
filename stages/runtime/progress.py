"""How a stage reports what it is doing. It does not know who looks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Protocol

from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.progress_file import ProgressEntry

# Seconds between two entries on disk: an object store asks for money and time.
LOCAL_EVERY_S, REMOTE_EVERY_S = 1.0, 30.0
SAID = 5


class Progress(Protocol):
    """What a stage reports to. The caller of a stage passes one."""

    def begin(self, task: str, total: int, done: int = 0) -> None:
        """A new task of `total` items, `done` of which were finished by an earlier run."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """`count` more items are done; `note` is a short text beside the bar."""

    def say(self, text: str) -> None:
        """One line that stays."""


class Silent:
    """Shows nothing."""

    def begin(self, task: str, total: int, done: int = 0) -> None: ...

    def advance(self, count: int = 1, note: str = "") -> None: ...

    def say(self, text: str) -> None: ...


class Recorded:
    """Tells another Progress, and leaves in a stage's directory how far it has come, for `svgpipe status`."""

    def __init__(self, progress: Progress | None, directory: Location) -> None:
        self.progress, self.directory = progress or Silent(), directory
        self._every_s = LOCAL_EVERY_S if isinstance(directory, Path) else REMOTE_EVERY_S
        now = time.time()
        self.entry = ProgressEntry("", 0, 0, now, 0, now)

    def begin(self, task: str, total: int, done: int = 0) -> None:
        now = time.time()
        self.entry = ProgressEntry(task, total, done, now, done, now, said=self.entry.said)
        self.entry.write(self.directory)
        self.progress.begin(task, total, done)

    def advance(self, count: int = 1, note: str = "") -> None:
        now, before = time.time(), self.entry.updated_at
        self.entry.done += count
        self.entry.note = note or self.entry.note
        if now - before >= self._every_s or self.entry.done >= self.entry.total:
            self.entry.updated_at = now
            self.entry.write(self.directory)
        self.progress.advance(count, note)

    def say(self, text: str) -> None:
        self.entry.said, self.entry.updated_at = [*self.entry.said, text][-SAID:], time.time()
        self.entry.write(self.directory)
        self.progress.say(text)
