"""Who watches a training run and may ask it to stop; the run itself does not know where they sit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from ..runtime.device import stop_on_signal
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


class Here:
    """The person at this process: a progress bar and Ctrl-C."""

    def __init__(self, progress: Progress, check: Callable[[], None]) -> None:
        self.begin, self.advance, self.say = progress.begin, progress.advance, progress.say
        self.check = check

    def stop_requests(self) -> AbstractContextManager[StopFlag]:
        return stop_on_signal()
