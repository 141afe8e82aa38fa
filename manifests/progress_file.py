"""progress.json: how far a stage has come, for whoever looks from outside; gone when the stage is finished.

It decides nothing: a resume goes by journals and checkpoints. So it is written without waiting for the disk, and a
failure to write it ends no run.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .filesystem import Location

PROGRESS_NAME = "progress.json"


@dataclass
class ProgressEntry:
    """Of the task that a stage is at. Times are seconds since 1970."""

    task: str
    total: int
    done: int
    began_at: float
    began_done: int  # what an earlier run had done
    updated_at: float
    note: str = ""
    said: list[str] = field(default_factory=list)

    @property
    def per_second(self) -> float | None:
        """Items per second since the task began; None before there is one."""
        seconds, items = self.updated_at - self.began_at, self.done - self.began_done
        return items / seconds if seconds > 0 and items > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """At that pace."""
        pace = self.per_second
        return None if pace is None else (self.total - self.done) / pace

    def write(self, directory: Location) -> None:
        """Replace the entry of a stage's directory; what goes wrong is not told."""
        path, content = directory / PROGRESS_NAME, json.dumps(asdict(self)).encode()
        with suppress(Exception):  # an object store's client library raises whatever it likes
            if isinstance(path, Path):
                partial = path.with_name(f".{PROGRESS_NAME}.{os.getpid()}.partial")
                partial.write_bytes(content)
                partial.replace(path)
            else:
                path.write_bytes(content)


def read_progress(directory: Location) -> ProgressEntry | None:
    """The entry of a stage's directory; None where there is none that can be read."""
    try:
        return ProgressEntry(**json.loads((directory / PROGRESS_NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
