"""Receives the progress of a training run, and passes stop requests. Restarts of workers are in ray_train.py."""

from __future__ import annotations

import signal
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from ..runtime.progress import Progress


class StopFlag(Protocol):
    """Whether the run was asked to stop."""

    @property
    def seen(self) -> bool: ...


class Supervisor(Progress, Protocol):
    """Receives progress, passes stop requests, and prevents two runs from writing to one directory."""

    def stop_requests(self) -> AbstractContextManager[StopFlag]:
        """Return a context manager in which a stop request only sets the flag, so that a step can be finished."""

    def check(self) -> None:
        """Raise an error if this run must not write any more; called before every checkpoint."""


class LocalSupervisor:
    """Progress bar and Ctrl-C of this process."""

    def __init__(self, progress: Progress, check: Callable[[], None]) -> None:
        self.begin, self.advance, self.say = progress.begin, progress.advance, progress.say
        self.check = check

    def stop_requests(self) -> AbstractContextManager[StopFlag]:
        return stop_on_signal()


class StopRequest:
    """Flag that Ctrl-C (or SIGTERM) sets; the second one stops at once."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        if self.seen:
            signal.default_int_handler(number, frame)
        self.seen = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Let the first SIGINT or SIGTERM in the block only set a flag, so that a step can finish and be saved.

    Yields:
        The flag.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals only reach the main thread
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
