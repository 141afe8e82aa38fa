"""The training job on a Ray worker, and the event queue between worker 0 and the starting process."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from svgpipe.manifests.errors import SvgpipeError
from svgpipe.manifests.filesystem import client_error
from svgpipe.manifests.lock import STALE_S

from .distributed import ProcessGroup
from .supervisor import StopFlag

if TYPE_CHECKING:
    import ray

POLL_S = 0.2
GRACE_S = 5.0


class EventQueue:
    """Between worker 0 and the process that started it."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.taken_at = time.monotonic()
        self.stop = self.failed = False

    def post(self, name: str, arguments: Any) -> bool:
        """Leave an event; returns whether the run is asked to stop."""
        self.events.append((name, arguments))
        self.failed |= name == "error"
        return self.stop

    def has_failed(self) -> bool:
        """Whether a worker has reported an error, or the starting process has ended the run."""
        return self.failed

    def close(self) -> None:
        """End the run: workers that are started from now on return at once."""
        self.failed = True

    def take(self, stop: bool) -> list[tuple[str, Any]]:
        """All events since the last call."""
        self.stop, self.taken_at = stop, time.monotonic()
        events, self.events = self.events, []
        return events

    def require_reader(self) -> None:
        """Raise if the run was ended, or if the starting process has not read for long: it may have lost its lock."""
        if self.failed:
            raise TimeoutError("this training was ended")
        if (silent := time.monotonic() - self.taken_at) > STALE_S / 2:
            raise TimeoutError(f"the process that started this training has not answered for {silent:.0f} s")


def work(config: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    import ray
    import ray.train.torch
    import torch

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = ProcessGroup(ray.train.torch.get_device(), rank, size)
    event_queue = config["event_queue"]
    if ray.get(event_queue.has_failed.remote()):
        return  # Ray Train starts workers anew also after an error that ends the run
    supervisor = _RemoteSupervisor(event_queue, group)
    supervisor.start()
    try:
        result = config["job"](group, supervisor)
    except (SvgpipeError, OSError) as error:
        supervisor.fail(error)
        raise
    except Exception as error:
        if (refused := client_error(error)) is not None:
            supervisor.fail(SvgpipeError(refused))
        raise
    if group.is_main:
        supervisor.deliver("result", result)


class _RemoteSupervisor:
    """The Supervisor of a worker: worker 0 tells, the others are silent."""

    def __init__(self, event_queue: ray.actor.ActorHandle, group: ProcessGroup) -> None:
        self.event_queue, self.group = event_queue, group
        self._answer: Any = None
        self.seen = False

    def _post(self, name: str, *arguments: object) -> None:
        if self.group.is_main:
            self.event_queue.post.remote(name, arguments)

    def start(self) -> None:
        """Tell that workers are there, for the first time or again."""
        self._post("start")

    def begin(self, task: str, total: int, done: int = 0) -> None:
        self._post("begin", task, total, done)

    def say(self, text: str) -> None:
        self._post("say", text)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Also looks whether a stop was asked for, without waiting for the answer."""
        if not self.group.is_main:
            return
        import ray

        answer = self.event_queue.post.remote("advance", (count, note))
        if self._answer is None:
            self._answer = answer
        elif ray.wait([self._answer], timeout=0)[0]:
            self.seen = ray.get(self._answer)  # raises when the starting process is gone
            self._answer = answer

    def fail(self, error: Exception) -> None:
        """Tell what went wrong. Worker 0, which also knows what was saved, speaks for all if it fails too."""
        import ray

        deadline = time.monotonic() + (0 if self.group.is_main else GRACE_S)
        while time.monotonic() < deadline:
            if ray.get(self.event_queue.has_failed.remote()):
                return
            time.sleep(POLL_S)
        self.deliver("error", error)

    def deliver(self, name: str, content: object) -> None:
        """Post what must not be lost, and wait until it has arrived."""
        import ray

        ray.get(self.event_queue.post.remote(name, content))

    def check(self) -> None:
        """Raises a Ray error when the starting process is gone or frozen: another run may have taken the lock."""
        import ray

        ray.get(self.event_queue.require_reader.remote())

    def stop_requests(self) -> AbstractContextManager[StopFlag]:
        return nullcontext(self)
