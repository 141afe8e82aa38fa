"""Units of work through a Ray Data pipeline: read on CPU tasks → worker actors → write on CPU tasks.

A unit is one outer Zarr shard (or one tar): read whole, computed by one worker, written whole by one writer.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from svgpipe.manifests.errors import SvgpipeError, UsageError, first_line

if TYPE_CHECKING:
    import torch

Row = dict[str, Any]
READ_CPUS, WRITE_CPUS = 0.3, 0.2


@dataclass(frozen=True)
class Resources:
    """How many workers, and what each of them asks Ray for."""

    num_workers: int = 1
    cpus_per_worker: float | None = None  # None: one, or less where the cluster is small
    gpus_per_worker: float = 0.0

    @property
    def threads(self) -> int:
        """Compute threads of one worker on the CPU: an even share of this machine's cores."""
        return max(1, (os.cpu_count() or 1) // self.num_workers)


def run_units(
    items: Sequence[Row],
    read: Callable[[Row], Row],
    worker: type,
    worker_args: Mapping[str, Any],
    write: Callable[[Row], Row],
    resources: Resources,
) -> Iterator[Row]:
    """Run `items` through read → worker → write on a connected Ray; yields what `write` returned, as it comes.

    Raises:
        UsageError: more CPUs or GPUs asked for than Ray has.
        SvgpipeError, OSError: raised by any of the three, unwrapped from Ray's own errors; or a worker died.
    """
    import ray

    if not items:
        return
    cpus = _cpus_per_worker(resources, ray.cluster_resources())
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # advice on memory hints, in the middle of the progress bar
    # The different fractions keep Ray from fusing the three into one actor, where reading would wait for encoding.
    dataset = (
        ray.data.from_items(list(items), override_num_blocks=len(items))
        .map(read, num_cpus=READ_CPUS)
        .map(
            worker,
            fn_constructor_kwargs=dict(worker_args),
            num_cpus=cpus,
            num_gpus=resources.gpus_per_worker or None,
            compute=ray.data.ActorPoolStrategy(size=resources.num_workers),
        )
        .map(write, num_cpus=WRITE_CPUS)
    )
    try:
        yield from dataset.iter_rows()
    except Exception as error:
        if (cause := _own_error(error)) is not None:
            raise cause from None
        if isinstance(error, ray.exceptions.RayError) and not isinstance(error, ray.exceptions.RayTaskError):
            raise SvgpipeError(
                f"a Ray worker died ({first_line(error)}). What was finished is kept; "
                "run the command again. If it was killed for memory, use fewer --num-workers or smaller units."
            ) from error
        raise


def _cpus_per_worker(resources: Resources, cluster: Mapping[str, float]) -> float:
    """CPUs that each actor may reserve so that reading and writing still find some; Ray would wait for ever."""
    total, count = cluster.get("CPU", 0.0), resources.num_workers
    spare = total - READ_CPUS - WRITE_CPUS
    cpus = resources.cpus_per_worker or max(0.1, min(1.0, spare / count))
    if cpus * count > spare + 1e-9:
        raise UsageError(
            f"{count} workers of {cpus:g} CPUs need {cpus * count + READ_CPUS + WRITE_CPUS:g} CPUs with reading and "
            f"writing, but Ray has {total:g}. Use fewer --num-workers or less --cpus-per-worker."
        )
    gpus = cluster.get("GPU", 0.0)
    if resources.gpus_per_worker * count > gpus:
        raise UsageError(
            f"{count} workers of {resources.gpus_per_worker:g} GPUs need {resources.gpus_per_worker * count:g}, "
            f"but Ray has {gpus:g}. Use fewer --num-workers or less --gpus-per-worker."
        )
    return cpus


def _own_error(error: BaseException | None) -> SvgpipeError | OSError | None:
    """What a person should be told, inside Ray's wrapping: svgpipe's error, or the system's (a full disk)."""
    import ray

    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, SvgpipeError | OSError) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def start_worker(threads: int) -> torch.device:
    """Called by every actor at its start: its device, and its share of the cores."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    torch.set_num_threads(threads)
    return torch.device("cpu")
