"""Units of work through a Ray Data pipeline: read on CPU tasks → worker actors → write on CPU tasks.

A unit is one outer Zarr shard (or one tar): read whole, computed by one worker, written whole by one writer.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from svgpipe.manifests.errors import SvgpipeError, UsageError, first_line, memory_error

from .heap import keep_freed_memory

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
READ_CPUS, WRITE_CPUS = 0.3, 0.2
# Times that a unit is tried again after its process or node died. Ray Data's own default is for ever, also for a
# unit that kills every process it meets.
RETRIES = 10


@dataclass(frozen=True)
class Resources:
    """How many workers, and what each of them asks Ray for."""

    num_workers: int = 1
    cpus_per_worker: float | None = None  # None: one, or less where the cluster is small
    gpus_per_worker: float = 0.0

    @property
    def threads(self) -> int:
        """Compute threads of one worker on the CPU: what it reserves, else an even share of this machine's cores."""
        if self.cpus_per_worker is not None:
            return max(1, int(self.cpus_per_worker))
        return max(1, (os.cpu_count() or 1) // self.num_workers)


def run_units(
    items: Sequence[Row],
    read: Callable[[Row], Row],
    worker: type,
    worker_args: Mapping[str, Any],
    write: Callable[[Row], Row],
    resources: Resources,
    *,
    calls_per_actor: int = 1,
) -> Iterator[Row]:
    """Run `items` through read → worker → write on a connected Ray; yields what `write` returned, as it comes.

    Args:
        calls_per_actor: units that one worker is handed at a time; it computes one, while others come and go.
    Raises:
        UsageError: more CPUs or GPUs asked for than Ray has.
        SvgpipeError, OSError: raised by any of the three; or a worker died.
    """
    import ray

    if not items:
        return
    cpus = require_resources(resources, ray.cluster_resources(), beside=READ_CPUS + WRITE_CPUS)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # advice on memory hints, in the middle of the progress bar
    # The different fractions keep Ray from fusing the three into one actor, where reading would wait for encoding.
    with warnings.catch_warnings():
        # Ray deprecates what limits retries before there is anything in its place.
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = (
            ray.data.from_items(list(items), override_num_blocks=len(items))
            .map(_Guarded(read), num_cpus=READ_CPUS, ray_remote_args_fn=lambda: {"max_retries": RETRIES})
            .map(
                _GuardedWorker,
                fn_constructor_kwargs={"worker": worker, "args": dict(worker_args)},
                num_cpus=cpus,
                num_gpus=resources.gpus_per_worker or None,
                ray_remote_args_fn=lambda: {"max_task_retries": RETRIES},
                compute=ray.data.ActorPoolStrategy(
                    size=resources.num_workers, max_concurrent_calls_per_actor=calls_per_actor
                ),
            )
            .map(_Guarded(write), num_cpus=WRITE_CPUS, ray_remote_args_fn=lambda: {"max_retries": RETRIES})
        )
    try:
        for row in dataset.iter_rows():
            if "error" in row:
                raise _from_json(row["error"])
            yield row
    except ray.exceptions.RayTaskError:
        raise  # a bug in a step: its traceback is what helps
    except ray.exceptions.RayError as error:
        raise SvgpipeError(
            f"a Ray worker died ({first_line(error)}). What was finished is kept; "
            "run the command again. If it was killed for memory, use fewer --num-workers or smaller units."
        ) from error


def require_resources(resources: Resources, cluster: Mapping[str, float], *, beside: float = 0.0) -> float:
    """CPUs that each worker reserves, so that `beside` are left for other tasks.

    Raises:
        UsageError: the cluster does not have so many CPUs or GPUs; Ray would wait for them for ever.
    """
    total, count = cluster.get("CPU", 0.0), resources.num_workers
    spare = total - beside
    cpus = resources.cpus_per_worker or max(0.1, min(1.0, spare / count))
    if cpus * count > spare + 1e-9:
        others = " with reading and writing" if beside else ""
        raise UsageError(
            f"{count} workers of {cpus:g} CPUs need {cpus * count + beside:g} CPUs{others}, but Ray has {total:g}. "
            "Use fewer --num-workers or less --cpus-per-worker."
        )
    gpus = cluster.get("GPU", 0.0)
    if resources.gpus_per_worker * count > gpus:
        raise UsageError(
            f"{count} workers of {resources.gpus_per_worker:g} GPUs need {resources.gpus_per_worker * count:g}, "
            f"but Ray has {gpus:g}. Use fewer --num-workers or less --gpus-per-worker."
        )
    return cpus


def _to_json(error: SvgpipeError | OSError) -> str:
    """An error as text that can travel with a unit."""
    if isinstance(error, OSError):
        return json.dumps(
            {
                "errno": error.errno,
                "strerror": error.strerror or str(error),
                "filename": error.filename and str(error.filename),
            }
        )
    return json.dumps({"kind": type(error).__name__, "message": str(error)})


def _from_json(text: str) -> SvgpipeError | OSError:
    """Inverse of `_to_json`; a kind that this process does not know becomes a plain SvgpipeError."""
    entry = json.loads(text)
    if "errno" in entry:
        return OSError(entry["errno"], entry["strerror"], entry["filename"])
    kinds = [SvgpipeError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return next((kind for kind in kinds if kind.__name__ == entry["kind"]), SvgpipeError)(entry["message"])


def _for_a_person(error: Exception) -> SvgpipeError | OSError | None:
    """The error, if its message is one; None for a bug."""
    return error if isinstance(error, SvgpipeError | OSError) else memory_error(error)


class _Guarded:
    """A step whose errors, if they are meant for a person, travel with the unit: Ray's own wrapping loses them."""

    def __init__(self, step: Callable[[Row], Row]) -> None:
        self.step = step

    def __call__(self, row: Row) -> Row:
        if "error" in row:
            return row
        try:
            return self.step(row)
        except Exception as error:
            if (told := _for_a_person(error)) is None:
                raise
            return {"unit": row["unit"], "error": _to_json(told)}


class _GuardedWorker:
    """The same for an actor: what goes wrong while it is built is told by the first unit that it gets."""

    def __init__(self, worker: type, args: Mapping[str, Any]) -> None:
        self.failure: str | None = None
        try:
            self.run = _Guarded(worker(**args))
        except Exception as error:
            if (told := _for_a_person(error)) is None:
                raise
            self.failure = _to_json(told)

    def __call__(self, row: Row) -> Row:
        return self.run(row) if self.failure is None else {"unit": row["unit"], "error": self.failure}


def start_worker(threads: int) -> torch.device:
    """Called by every actor at its start: its device, and its share of the cores."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(threads)
    keep_freed_memory()
    return torch.device("cpu")
