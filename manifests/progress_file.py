"""Progress of a stage, in its directory. Resume does not use it, and failed writes are ignored.

progress.json    of a running stage, for `svgpipe status`; deleted when the stage is finished
run.log          messages and errors of all runs, with their time; not in an object store, which cannot append
"""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from .filesystem import Location

PROGRESS_NAME, LOG_NAME = "progress.json", "run.log"


def append_log(directory: Location, text: str) -> None:
    """Append lines to run.log."""
    path = directory / LOG_NAME
    if isinstance(path, Path):
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        with suppress(OSError), path.open("a", encoding="utf-8", errors="replace") as file:
            file.writelines(f"{now} {line}\n" for line in text.splitlines())


@dataclass
class ProgressEntry:
    """Progress of the current task. Times are seconds since 1970."""

    task: str
    total: int
    unit: str  # what is counted, in the plural
    done: int
    began_at: float
    began_done: int  # done by earlier runs
    updated_at: float
    note: str = ""
    said: list[str] = field(default_factory=list)

    @property
    def per_second(self) -> float | None:
        """Items per second since the task began; None before the first item."""
        seconds, items = self.updated_at - self.began_at, self.done - self.began_done
        return items / seconds if seconds > 0 and items > 0 else None

    @property
    def seconds_left(self) -> float | None:
        """Estimate at this pace; None if unknown."""
        pace = self.per_second
        return None if pace is None else (self.total - self.done) / pace

    def write(self, directory: Location) -> None:
        """Write the entry to the directory of a stage. Errors are ignored."""
        path, content = directory / PROGRESS_NAME, json.dumps(asdict(self)).encode()
        with suppress(Exception):  # client libraries of object stores raise many kinds
            if isinstance(path, Path):
                partial = path.with_name(f".{PROGRESS_NAME}.{os.getpid()}.partial")
                partial.write_bytes(content)
                partial.replace(path)
            else:
                path.write_bytes(content)


def read_progress(directory: Location) -> ProgressEntry | None:
    """Return the entry of a stage's directory; None if there is no readable one."""
    try:
        return ProgressEntry(**json.loads((directory / PROGRESS_NAME).read_bytes()))
    except (OSError, ValueError, TypeError):
        return None
