"""Units of work on the workers of a Ray cluster, as a Ray Data pipeline with a pool of actors.

Readers and writers are Ray tasks, workers are actors that are built once. Ray tries a unit again when its process or
node died.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from svgpipe.manifests.errors import SvgpipeError, first_line, memory_error

from .resources import Resources
from .runner import Computed, Loaded, Steps, Unit, Written

READ_CPUS, WRITE_CPUS = 0.3, 0.2
# Ray Data's own default is to retry without end, also a unit that kills every process it meets.
RETRIES = 10
# Units that an actor holds at a time. On a GPU one is computed while the next one arrives. On a CPU the second call
# computes beside the first, each with a pool of threads of its own, which costs about 5 % of the encoder's rate.
CALLS_PER_ACTOR_ON_GPU, CALLS_PER_ACTOR_ON_CPU = 2, 1

Row = dict[str, Any]
RECORD = "record"  # the column of Ray Data that holds the record of a unit; Ray serialises it


class RayRunner:
    """Units on a connected Ray."""

    def __init__(self, resources: Resources | None = None) -> None:
        """Raises UsageError if the cluster has fewer CPUs or GPUs than asked for."""
        import ray

        cluster = ray.cluster_resources()
        self.reserved = (resources or Resources()).resolved(cluster)
        self.cpus = self.reserved.require(cluster, beside=READ_CPUS + WRITE_CPUS)

    @property
    def computes_on_cpu(self) -> bool:
        return not self.reserved.gpus_per_worker

    def run(self, units: Sequence[Unit], steps: Steps[Unit, Loaded, Computed, Written]) -> Iterator[Written]:
        """See `Runner.run`.

        Raises:
            SvgpipeError: also where a worker died again and again.
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
            raise  # a bug in a step: its traceback is what helps
        except ray.exceptions.RayError as error:
            # Its frames hold the pool, which would keep its CPUs for as long as anybody keeps the error.
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
        context.issue_detectors_config.detectors = []  # advice on memory hints, in the middle of the progress bar
        rows = [{RECORD: unit} for unit in units]
        calls = CALLS_PER_ACTOR_ON_CPU if self.computes_on_cpu else CALLS_PER_ACTOR_ON_GPU
        workers = ray.data.ActorPoolStrategy(size=self.reserved.num_workers, max_concurrent_calls_per_actor=calls)
        with warnings.catch_warnings():
            # Ray deprecates what limits retries before there is anything in its place.
            warnings.simplefilter("ignore", DeprecationWarning)
            # The different fractions keep Ray from fusing the three into one actor, where reading would wait.
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
    """A user error. It travels with the unit, because Ray's own wrapping loses its type."""

    error: SvgpipeError | OSError


def _user_error(error: Exception) -> SvgpipeError | OSError | None:
    """The error, if its message is one; None for a bug."""
    return error if isinstance(error, SvgpipeError | OSError) else memory_error(error)


class _Guarded:
    """A step on rows of records whose user errors travel with the unit."""

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
    """The same for an actor. A user error of its constructor becomes the result of every unit that it receives."""

    def __init__(self, make_worker: Callable[[Any], Callable[[Any], Any]], on_gpu: bool, threads: int) -> None:
        import torch

        # An actor that reserves no GPU still sees all of them, and must not compute on one.
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
        """Ray calls from several threads, and torch keeps the number of compute threads per calling thread."""
        if self.threads is not None:
            import torch

            torch.set_num_threads(self.threads)

    def __call__(self, row: Row) -> Row:
        self._set_threads()
        return self.step(row)
