"""What a training run reports to, and what may ask it to stop. Restarts of workers are in ray_train.py."""

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
    """Is told of progress, may ask for a stop, and forbids writing to a run that is no longer the only one."""

    def stop_requests(self) -> AbstractContextManager[StopFlag]:
        """Within the block a request to stop only sets the flag, so that a step can be finished and saved."""

    def check(self) -> None:
        """Raise if this run must not write any more; called before every checkpoint."""


class LocalSupervisor:
    """The person at this process: a progress bar and Ctrl-C."""

    def __init__(self, progress: Progress, check: Callable[[], None]) -> None:
        self.begin, self.advance, self.say = progress.begin, progress.advance, progress.say
        self.check = check

    def stop_requests(self) -> AbstractContextManager[StopFlag]:
        return stop_on_signal()


class StopRequest:
    """Whether Ctrl-C (or SIGTERM) was seen; the second one stops at once."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        if self.seen:
            signal.default_int_handler(number, frame)
        self.seen = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM only sets a flag, so that a step can be finished and saved."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals only reach the main thread; a stage run elsewhere is stopped by its caller
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
