"""Runs units of work on the workers of a Ray cluster, as a Ray Data pipeline with a pool of actors.

Readers and writers are Ray tasks. Workers are actors that are built once. Ray retries a unit when its process or node
dies.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from svgpipe.manifests.errors import SvgpipeError, compile_error, first_line, memory_error

from .resources import Resources
from .runner import Computed, Loaded, Steps, Unit, Written

READ_CPUS, WRITE_CPUS = 0.3, 0.2
# Ray Data's default is to retry forever, even a unit that kills every process.
RETRIES = 10
# Units per actor. On a GPU, one is computed while the next one arrives. On a CPU, two would compute at the same time,
# each with its own thread pool, which costs about 5 % of the encoder's rate.
CALLS_PER_ACTOR_ON_GPU, CALLS_PER_ACTOR_ON_CPU = 2, 1

Row = dict[str, Any]
RECORD = "record"  # column of Ray Data with the record of a unit; Ray serialises it


class RayRunner:
    """Runs units on a connected Ray."""

    def __init__(self, resources: Resources | None = None) -> None:
        """Reserve workers.

        Raises:
            UsageError: the cluster has too few CPUs or GPUs.
        """
        import ray

        cluster = ray.cluster_resources()
        self.reserved = (resources or Resources()).resolved(cluster)
        self.cpus = self.reserved.require(cluster, beside=READ_CPUS + WRITE_CPUS)

    @property
    def computes_on_cpu(self) -> bool:
        return not self.reserved.gpus_per_worker

    def run(self, units: Sequence[Unit], steps: Steps[Unit, Loaded, Computed, Written]) -> Iterator[Written]:
        """Run units; see `Runner.run`.

        Yields:
            Results, in any order.

        Raises:
            SvgpipeError: a user error of a step, or a worker died repeatedly.
            ray.exceptions.RayTaskError: a bug in a step.
        """
        import ray

        if not units:
            return
        try:
            for row in self._dataset(units, steps).iter_rows():
                result = row[RECORD]
                if isinstance(result, _Failure):
                    raise result.error
                yield result
        except ray.exceptions.RayTaskError:
            raise  # a bug in a step: the traceback is needed
        except ray.exceptions.RayError as error:
            # The frames of the traceback hold the actor pool, which would keep its CPUs as long as the error exists.
            traceback.clear_frames(error.__traceback__)
            raise SvgpipeError(
                f"a Ray worker died ({first_line(error)}). Finished work is kept; "
                "run the command again. If it was killed for memory, use fewer --workers or smaller units."
            ) from error

    def _dataset(self, units: Sequence[Unit], steps: Steps[Unit, Loaded, Computed, Written]) -> Any:
        import ray

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.issue_detectors_config.detectors = []  # their advice would interrupt the progress bar
        rows = [{RECORD: unit} for unit in units]
        calls = CALLS_PER_ACTOR_ON_CPU if self.computes_on_cpu else CALLS_PER_ACTOR_ON_GPU
        workers = ray.data.ActorPoolStrategy(size=self.reserved.num_workers, max_concurrent_calls_per_actor=calls)
        with warnings.catch_warnings():
            # Ray deprecates the limit of retries, but has no replacement yet.
            warnings.simplefilter("ignore", DeprecationWarning)
            # Different CPU fractions keep Ray from fusing the three steps into one actor.
            return (
                ray.data.from_items(rows, override_num_blocks=len(rows))
                .map(_Guarded(steps.read), num_cpus=READ_CPUS, ray_remote_args_fn=lambda: {"max_retries": RETRIES})
                .map(
                    _GuardedWorker,
                    fn_constructor_args=(steps.make_worker, bool(self.reserved.gpus_per_worker), self.reserved.threads),
                    num_cpus=self.cpus,
                    num_gpus=self.reserved.gpus_per_worker or None,
                    ray_remote_args_fn=lambda: {"max_task_retries": RETRIES},
                    compute=workers,
                )
                .map(_Guarded(steps.write), num_cpus=WRITE_CPUS, ray_remote_args_fn=lambda: {"max_retries": RETRIES})
            )


@dataclass(frozen=True)
class _Failure:
    """A user error. It is passed on as the result of the unit, because Ray's own wrapping loses its type."""

    error: SvgpipeError | OSError


def _user_error(error: Exception) -> SvgpipeError | OSError | None:
    """Return the error if it is a user error; None for a bug."""
    return error if isinstance(error, SvgpipeError | OSError) else memory_error(error) or compile_error(error)


class _Guarded:
    """A step on rows of records. User errors become the result of the unit."""

    def __init__(self, step: Callable[[Any], Any]) -> None:
        self.step = step

    def __call__(self, row: Row) -> Row:
        record = row[RECORD]
        if isinstance(record, _Failure):
            return row
        try:
            return {RECORD: self.step(record)}
        except Exception as error:
            if (user_error := _user_error(error)) is None:
                raise
            return {RECORD: _Failure(user_error)}


class _GuardedWorker:
    """The same for an actor. A user error of its constructor becomes the result of all its units."""

    def __init__(self, make_worker: Callable[[Any], Callable[[Any], Any]], on_gpu: bool, threads: int) -> None:
        import torch

        # An actor that reserves no GPU still sees all GPUs, and must not use one.
        device = torch.device("cuda" if on_gpu else "cpu")
        self.threads = None if on_gpu else threads
        self._set_threads()
        try:
            self.step: Callable[[Row], Row] = _Guarded(make_worker(device))
        except Exception as error:
            if (user_error := _user_error(error)) is None:
                raise
            failure = {RECORD: _Failure(user_error)}
            self.step = lambda row: failure

    def _set_threads(self) -> None:
        """Set the number of threads: Ray calls from several threads, and torch keeps the number per calling thread."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)

    def __call__(self, row: Row) -> Row:
        self._set_threads()
        return self.step(row)
