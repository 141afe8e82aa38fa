"""Training on several workers under Ray Train, which connects them, notices a death and starts them anew.

What a run shows and is told goes through one small actor, the event queue: worker 0 posts, this process reads.
Files are written by worker 0 alone; this process holds the lock. When it ends, so does the event queue, and with it the
workers.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
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
# Deaths of workers one after the other, without a checkpoint between, that are not bad luck any more.
LOST_IN_A_ROW = 3
# Names of what Ray and torch.distributed raise for it.
LOSSES = re.compile("Actor|HealthCheck|Controller|Preemption|^Dist")


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
    """One run on workers, started anew whenever one of them dies."""

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
        self.begun_at, self.saves, self.left = -1, 0, 0

    def run(self) -> R:
        import ray

        lost, reached = 0, self.begun_at
        try:
            with stop_on_signal() as stop:
                while True:
                    failure = self._attempt(stop)
                    if self.result:
                        return self.result[0]
                    if failure is not None and not any(map(_is_loss, _causes(failure))):
                        raise failure  # a bug: its traceback is what helps
                    # The second save of an attempt begins when the first one is on disk.
                    lost = 1 if self.begun_at > reached or self.saves > 1 else lost + 1
                    reached = self.begun_at
                    if lost >= LOST_IN_A_ROW:
                        raise SvgpipeError(
                            f"workers died {lost} times without reaching another checkpoint; the last time: "
                            f"{_why(failure)}. What was saved is kept. If they were killed for memory, use a smaller "
                            "batch, a larger accumulate, or fewer --num-workers on one machine."
                        ) from failure
                    self.progress.say(
                        f"a worker died ({_why(failure)}); starting {self._count} from the last checkpoint"
                    )
        finally:
            ray.kill(self.event_queue)

    @property
    def _count(self) -> str:
        return f"{self.reserved.num_workers} worker" + "s" * (self.reserved.num_workers > 1)

    def _attempt(self, stop: StopFlag) -> BaseException | None:
        """Workers until they have all ended, well (None) or not."""
        import ray

        ended: list[BaseException | None] = []
        self.saves, self.left = 0, 0
        with tempfile.TemporaryDirectory(prefix="svgpipe-train-", ignore_cleanup_errors=True) as scratch:
            trainer = self._trainer(scratch)
            # Ctrl-C stays with this process: elsewhere than in the main thread, Ray leaves the signal alone.
            thread = threading.Thread(target=lambda: ended.append(_outcome(trainer.fit)), daemon=True)
            thread.start()
            patience = time.monotonic() + START_WARNING_S
            while thread.is_alive():
                thread.join(POLL_S)
                self.check()
                stopping = stop.seen
                events = ray.get(self.event_queue.take.remote(stopping))
                self._relay(events)  # first: workers may have begun since the last look
                if stopping and not self.left:  # nothing is at work that could finish a step and save
                    raise InterruptedRunError("stopped. What was saved is kept; the same command resumes.")
                if events:
                    patience = math.inf
                elif time.monotonic() > patience:
                    patience = math.inf
                    self.progress.say(f"still waiting for Ray to start {self._count} of {self.cpus:g} CPUs each")
            self._relay(ray.get(self.event_queue.take.remote(stop.seen)))
        return ended[0]

    def _trainer(self, scratch: str) -> Any:
        # Workers would be moved to a folder of their own, where relative paths of a recipe lead nowhere.
        os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"
        from ray.train import RunConfig, ScalingConfig
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
            run_config=RunConfig(storage_path=scratch),
        )

    def _relay(self, events: list[tuple[str, Any]]) -> None:
        for name, arguments in events:
            if name == "begin":
                self.begun_at, self.left = arguments[2], arguments[1] - arguments[2]
            elif name == "advance":
                self.left -= arguments[0]
            if name == "saving":
                self.saves += 1
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
    except BaseException as error:  # whatever it is, the main thread decides
        return error
    return None


def _causes(failure: BaseException | None) -> list[BaseException]:
    """What each worker that failed says; one's death makes the others fail too."""
    workers: dict[int, BaseException] = getattr(failure, "worker_failures", {})
    return list(workers.values()) or ([] if failure is None else [failure])


def _is_loss(cause: BaseException) -> bool:
    """Whether a worker, its host or their connection went away, as against an error in what they compute."""
    return bool(LOSSES.search(type(cause).__name__)) or bool(re.search(r"\bgloo\b|\bNCCL\b", str(cause)))


def _why(failure: BaseException | None) -> str:
    """The most telling line of it."""
    causes = _causes(failure)
    if any(re.search("Actor|HealthCheck", type(cause).__name__) for cause in causes):
        return "its process ended unexpectedly"
    return first_line(causes[0]) if causes else "no reason was given"
