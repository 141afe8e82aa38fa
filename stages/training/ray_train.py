"""Training on several workers under Ray Train, which connects them, notices a death and starts them anew.

What a run shows and is told goes through one small actor, the event queue: worker 0 posts, this process reads.
Files are written by worker 0 alone; this process holds the lock. When it ends, so does the event queue, and with it the
workers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from svgpipe.manifests.errors import InterruptedRunError, SvgpipeError, UsageError, first_line

from ..runtime.device import pick_device
from ..runtime.progress import Progress
from ..runtime.resources import Reserved, Resources
from .distributed import ProcessGroup
from .supervisor import LocalSupervisor, StopFlag, Supervisor, stop_on_signal
from .worker import POLL_S, EventQueue, work

R = TypeVar("R")
Job = Callable[[ProcessGroup, Supervisor], R]
"""What every worker runs, from the last checkpoint to the end. Worker 0's result counts. Must be picklable."""

START_WARNING_S = 60.0
MAX_FAILURES = 10  # times in one run that Ray Train starts workers anew


def run_job(job: Job[R], resources: Resources | None, progress: Progress, check: Callable[[], None]) -> R:
    """Run `job` in this process, or on the workers that `resources` asks a connected Ray for.

    Args:
        check: raises if this run must not write any more.
    Raises:
        UsageError: more CPUs or GPUs asked for than Ray has.
        SvgpipeError, OSError: raised by the job on any worker; or workers died again and again.
    """
    if resources is None:
        return job(ProcessGroup(pick_device()), LocalSupervisor(progress, check))
    return _Launch(job, resources, progress, check).run()


class _Launch(Generic[R]):
    """One run on workers. Ray Train replaces those that die; all go on from the last checkpoint."""

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
        # Beside this process: the death of another node is none of its concern.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.event_queue = ray.remote(num_cpus=0, scheduling_strategy=here)(EventQueue).remote()
        self.result: list[R] = []
        self.starts, self.left = 0, 0  # times that workers were started, steps to go

    def run(self) -> R:
        """Relay events until the training has ended, and return what worker 0 returned."""
        import ray

        ended: list[BaseException | None] = []
        try:
            with (
                stop_on_signal() as stop,
                tempfile.TemporaryDirectory(prefix="svgpipe-train-", ignore_cleanup_errors=True) as scratch,
            ):
                trainer = self._trainer(scratch)
                # Ctrl-C stays with this process: elsewhere than in the main thread, Ray leaves the signal alone.
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
        """Relay events while Ray Train is at work. Raises what a worker has told of, or that a stop was asked for."""
        import ray

        warn_at = time.monotonic() + START_WARNING_S
        while thread.is_alive():
            thread.join(POLL_S)
            self.check()
            stopping = stop.seen
            events = ray.get(self.event_queue.take.remote(stopping))
            self._relay(events)  # first: workers may have begun since the last look
            if stopping and not self.left:  # nothing is at work that could finish a step and save
                raise InterruptedRunError("stopped. Saved checkpoints are kept; the same command resumes.")
            if events:
                warn_at = math.inf
            elif time.monotonic() > warn_at:
                warn_at = math.inf
                self.progress.say(f"still waiting for Ray to start {self._count} of {self.cpus:g} CPUs each")

    @property
    def _count(self) -> str:
        return f"{self.reserved.num_workers} worker" + "s" * (self.reserved.num_workers > 1)

    def _explained(self, failure: BaseException | None) -> BaseException:
        """What to raise for workers that failed again and again; a bug is raised as it is, for its traceback."""
        import ray

        causes = list(getattr(failure, "worker_failures", {}).values())
        if failure is not None and not any(isinstance(cause, ray.exceptions.RayError) for cause in causes):
            return failure
        why = first_line(causes[0]) if causes else "no reason was given"
        return SvgpipeError(
            f"workers died {MAX_FAILURES + 1} times, the last time: {why}. Saved checkpoints are kept. "
            "If they were killed for memory, use a smaller batch, a larger accumulate, or fewer --num-workers on one "
            "machine."
        )

    def _trainer(self, scratch: str) -> Any:
        # Workers would be moved to a folder of their own, where relative paths of a recipe lead nowhere.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer

        gpus = self.reserved.gpus_per_worker
        return TorchTrainer(
            work,
            train_loop_config={"job": self.job, "event_queue": self.event_queue},
            # Hosts agree through gloo also where gradients go through NCCL.
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
                self.left = arguments[1] - arguments[2]
            elif name == "advance":
                self.left -= arguments[0]
            if name == "start":
                self.starts += 1
                if self.starts > 1:
                    self.progress.say(f"a worker died; {self._count} go on from the last checkpoint")
            elif name == "result":
                self.result.append(arguments)
            elif name == "error":
                raise arguments
            else:
                getattr(self.progress, name)(*arguments)


def _with_threads(resources: Reserved) -> Reserved:
    """Without a GPU a worker computes with the CPUs that it reserves: all of a single machine's, if none are named."""
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
