"""Training on several workers with Ray Train, which connects them and restarts them after a failure.

The driver is the process that started the run. It holds the lock and shows progress. Worker 0 writes all files. Events
go from worker 0 to the driver through a small actor, the event queue. The actor ends with the driver, and the
workers end with the actor.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from svgpipe.manifests.errors import InterruptedRunError, SvgpipeError, UsageError, first_line
from svgpipe.manifests.filesystem import client_error
from svgpipe.manifests.lock import STALE_S

from ..runtime.device import pick_device
from ..runtime.progress import Progress
from ..runtime.resources import Reserved, Resources
from .distributed import ProcessGroup
from .supervisor import LocalSupervisor, StopFlag, Supervisor, stop_on_signal

if TYPE_CHECKING:
    import ray

R = TypeVar("R")
Job = Callable[[ProcessGroup, Supervisor], R]
"""What every worker runs, from the last checkpoint to the end. The result of worker 0 counts. Must be picklable."""

START_WARNING_S = 60.0
POLL_S = 0.2
GRACE_S = 5.0  # in which worker 0 may report an error before another worker does
MAX_FAILURES = 10  # restarts of workers in one run


def run_job(job: Job[R], resources: Resources | None, progress: Progress, check: Callable[[], None]) -> R:
    """Run `job` in this process, or on workers of a connected Ray.

    Args:
        job: the training.
        resources: workers; None: this process.
        progress: receives the progress.
        check: raises if this run must not write any more.

    Returns:
        The result of the job.

    Raises:
        UsageError: Ray has too few CPUs or GPUs.
        SvgpipeError: raised by the job on any worker; or workers died repeatedly.
        OSError: raised by the job on any worker; or workers died repeatedly.
    """
    if resources is None:
        return job(ProcessGroup(pick_device()), LocalSupervisor(progress, check))
    return _Launch(job, resources, progress, check).run()


class _Launch(Generic[R]):
    """One run on workers. Ray Train replaces workers that die; training continues from the last checkpoint."""

    def __init__(self, job: Job[R], resources: Resources, progress: Progress, check: Callable[[], None]) -> None:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        cluster = ray.cluster_resources()
        reserved = resources.resolved(cluster)
        if 0 < reserved.gpus_per_worker < 1 and reserved.num_workers > 1:
            raise UsageError(f"--gpus-per-worker {reserved.gpus_per_worker:g}: workers cannot share a GPU in training.")
        self.job, self.progress, self.check = job, progress, check
        self.reserved = _with_threads(reserved)
        self.cpus = self.reserved.require(cluster)
        # On the driver's node, so that the failure of another node does not affect it.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.event_queue = ray.remote(num_cpus=0, scheduling_strategy=here)(EventQueue).remote()
        self.result: list[R] = []
        self.starts, self.left = 0, 0  # starts of the workers, remaining steps

    def run(self) -> R:
        """Relay events until the training has ended.

        Returns:
            The result of worker 0.
        """
        import ray

        ended: list[BaseException | None] = []
        try:
            with (
                stop_on_signal() as stop,
                tempfile.TemporaryDirectory(prefix="svgpipe-train-", ignore_cleanup_errors=True) as scratch,
            ):
                trainer = self._trainer(scratch)
                # fit runs in another thread, because in the main thread Ray would handle Ctrl-C.
                thread = threading.Thread(target=lambda: ended.append(_outcome(trainer.fit)), daemon=True)
                thread.start()
                self._watch(thread, stop)
                self._relay(ray.get(self.event_queue.take.remote(stop.seen)))
        finally:
            self.event_queue.close.remote()
        if self.result:
            return self.result[0]
        raise self._explained(ended[0])

    def _watch(self, thread: threading.Thread, stop: StopFlag) -> None:
        """Relay events while Ray Train runs. Raises errors of workers.

        Raises:
            InterruptedRunError: the user stopped the run before its first step.
        """
        import ray

        warn_at = time.monotonic() + START_WARNING_S
        while thread.is_alive():
            thread.join(POLL_S)
            self.check()
            stopping = stop.seen
            events = ray.get(self.event_queue.take.remote(stopping))
            self._relay(events)  # first, because workers may have begun in the meantime
            if stopping and not self.left:  # no step is running that could finish and save
                raise InterruptedRunError("stopped. Saved checkpoints are kept; the same command resumes.")
            if events:
                warn_at = math.inf
            elif time.monotonic() > warn_at:
                warn_at = math.inf
                self.progress.say(f"still waiting for Ray to start {self._count} with {self.cpus:g} CPUs each")

    @property
    def _count(self) -> str:
        return f"{self.reserved.num_workers} worker" + "s" * (self.reserved.num_workers > 1)

    def _explained(self, failure: BaseException | None) -> BaseException:
        """Return the error for workers that failed repeatedly; a bug is returned as it is, for its traceback."""
        import ray

        causes = list(getattr(failure, "worker_failures", {}).values())
        if failure is not None and not any(isinstance(cause, ray.exceptions.RayError) for cause in causes):
            return failure
        why = first_line(causes[0]) if causes else "no reason was given"
        return SvgpipeError(
            f"workers died {MAX_FAILURES + 1} times, the last time: {why}. Saved checkpoints are kept. "
            "If they were killed for memory, use a smaller batch, a larger accumulate, or fewer --workers on one "
            "machine."
        )

    def _trainer(self, scratch: str) -> Any:
        # By default Ray moves workers to another directory, where relative paths of a recipe are wrong.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = self.reserved.gpus_per_worker
        return TorchTrainer(
            work,
            train_loop_config={"job": self.job, "event_queue": self.event_queue},
            # Hosts communicate with gloo, also if gradients use NCCL.
            torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=self.reserved.num_workers,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": self.cpus} | ({"GPU": gpus} if gpus else {}),
            ),
            run_config=RunConfig(storage_path=scratch, failure_config=FailureConfig(max_failures=MAX_FAILURES)),
        )

    def _relay(self, events: list[tuple[str, Any]]) -> None:
        for name, arguments in events:
            if name == "begin":
                _, total, _, done = arguments
                self.left = total - done
            elif name == "advance":
                self.left -= arguments[0]
            if name == "start":
                self.starts += 1
                if self.starts > 1:
                    self.progress.say(f"a worker died; {self._count} continue from the last checkpoint")
            elif name == "result":
                self.result.append(arguments)
            elif name == "error":
                raise arguments
            else:
                getattr(self.progress, name)(*arguments)


def _with_threads(resources: Reserved) -> Reserved:
    """Return the resources with CPUs: without GPUs, each worker gets an even share of a single machine's cores."""
    import ray

    count = resources.num_workers
    if (
        resources.cpus_per_worker is not None
        or resources.gpus_per_worker
        or sum(node["Alive"] for node in ray.nodes()) > 1
    ):
        return resources
    each = ray.cluster_resources().get("CPU", 0.0) // count
    return dataclasses.replace(resources, cpus_per_worker=each) if each >= 1 else resources


def _outcome(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except BaseException as error:  # the main thread raises it
        return error
    return None


class EventQueue:
    """Passes events from worker 0 to the driver."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.taken_at = time.monotonic()
        self.stop = self.ended = False

    def post(self, name: str, arguments: Any) -> bool:
        """Add an event.

        Returns:
            Whether the run should stop.
        """
        self.events.append((name, arguments))
        self.ended |= name == "error"
        return self.stop

    def has_ended(self) -> bool:
        """Return whether a worker has reported an error, or the driver has ended the run."""
        return self.ended

    def close(self) -> None:
        """End the run: workers that are started later return at once."""
        self.ended = True

    def take(self, stop: bool) -> list[tuple[str, Any]]:
        """Return all events since the last call."""
        self.stop, self.taken_at = stop, time.monotonic()
        events, self.events = self.events, []
        return events

    def require_reader(self) -> None:
        """Check that the driver reads events: a frozen driver may have lost its lock.

        Raises:
            TimeoutError: the run was ended, or the driver has not read for too long.
        """
        if self.ended:
            raise TimeoutError("this training was ended")
        if (silent := time.monotonic() - self.taken_at) > STALE_S / 2:
            raise TimeoutError(f"the process that started this training has not answered for {silent:.0f} s")


def work(config: dict[str, Any]) -> None:
    """Run the job on this worker. Ray Train calls it.

    Raises:
        SvgpipeError: the job failed; the driver is told.
        OSError: the job failed; the driver is told.
    """
    import ray
    import ray.train.torch
    import torch

    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    group = ProcessGroup(ray.train.torch.get_device(), rank, size)
    event_queue = config["event_queue"]
    if ray.get(event_queue.has_ended.remote()):
        return  # Ray Train restarts workers also after an error that ends the run
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
    """The Supervisor of a worker. Only worker 0 sends events."""

    def __init__(self, event_queue: ray.actor.ActorHandle, group: ProcessGroup) -> None:
        self.event_queue, self.group = event_queue, group
        self._answer: Any = None
        self.seen = False

    def _post(self, name: str, *arguments: object) -> None:
        if self.group.is_main:
            self.event_queue.post.remote(name, arguments)

    def start(self) -> None:
        """Report that the workers have started."""
        self._post("start")

    def begin(self, task: str, total: int, unit: str, done: int = 0) -> None:
        self._post("begin", task, total, unit, done)

    def say(self, text: str) -> None:
        self._post("say", text)

    def advance(self, count: int = 1, note: str = "") -> None:
        """Report finished items. Also checks for a stop request, without waiting for the answer."""
        if not self.group.is_main:
            return
        import ray

        answer = self.event_queue.post.remote("advance", (count, note))
        if self._answer is None:
            self._answer = answer
        elif ray.wait([self._answer], timeout=0)[0]:
            self.seen = ray.get(self._answer)  # raises if the driver is gone
            self._answer = answer

    def fail(self, error: Exception) -> None:
        """Report an error. If worker 0 fails too, its report counts, because it knows what was saved."""
        import ray

        deadline = time.monotonic() + (0 if self.group.is_main else GRACE_S)
        while time.monotonic() < deadline:
            if ray.get(self.event_queue.has_ended.remote()):
                return
            time.sleep(POLL_S)
        self.deliver("error", error)

    def deliver(self, name: str, content: object) -> None:
        """Send an event that must not be lost, and wait until it has arrived."""
        import ray

        ray.get(self.event_queue.post.remote(name, content))

    def check(self) -> None:
        """Check that the driver is alive. If it is gone or frozen, Ray raises an error: it may have lost its lock."""
        import ray

        ray.get(self.event_queue.require_reader.remote())

    def stop_requests(self) -> AbstractContextManager[StopFlag]:
        return nullcontext(self)
