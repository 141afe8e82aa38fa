"""Runs units of work: read on CPU threads → compute on a device → write on CPU threads.

A unit is one outer Zarr shard or one tar. It is read completely, computed by one worker, and written by one writer.
Each step passes a frozen record of its own type to the next one.

Two runners do the same steps and write the same bytes: `LocalRunner` in threads of this process, `RayRunner`
(ray_runner.py) on the workers of a Ray cluster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from .resources import cpu_count

if TYPE_CHECKING:
    import torch

Unit = TypeVar("Unit")
Loaded = TypeVar("Loaded")
Computed = TypeVar("Computed")
Written = TypeVar("Written")

# Threads that read and write. A CPU has little time for them beside the computation, which they would slow down; a GPU
# waits for them. As many units are read ahead as there are readers, and two per writer wait to be written: that limits
# the memory.
READERS, WRITERS = 2, 1
GPU_READERS, GPU_WRITERS = 16, 8  # at most; not more than the cores


@dataclass(frozen=True)
class Steps(Generic[Unit, Loaded, Computed, Written]):
    """The three steps of every unit. Steps and records must be picklable.

    Attributes:
        read: runs on CPU threads. Must not need torch.
        make_worker: builds the compute step, once per worker, on the worker's device.
        write: runs on CPU threads. Must not need torch.
    """

    read: Callable[[Unit], Loaded]
    make_worker: Callable[[torch.device], Callable[[Loaded], Computed]]
    write: Callable[[Computed], Written]


class Runner(Protocol):
    """Runs units through steps."""

    def run(self, units: Sequence[Unit], steps: Steps[Unit, Loaded, Computed, Written]) -> Iterator[Written]:
        """Run `units` through `steps`.

        Yields:
            Results of `write`, in any order.

        Raises:
            SvgpipeError: a step failed. Other units in flight may or may not have been written.
            OSError: a step failed. Other units in flight may or may not have been written.
        """

    @property
    def computes_on_cpu(self) -> bool:
        """Whether workers have no GPU."""


class LocalRunner:
    """One worker, in this process: readers and writers are threads; the calling thread computes.

    JPEG decoding, torch and tensorstore release the GIL, so the threads run in parallel with the computation.
    """

    def __init__(self, *, use_gpu: bool = True, threads: int | None = None) -> None:
        """Compute on the GPU if there is one and `use_gpu`; on a CPU with `threads`, default: torch's number."""
        import torch  # not above, because readers and writers on a Ray cluster need not load it

        self.device = torch.device("cuda" if use_gpu and torch.cuda.is_available() else "cpu")
        self.threads = threads
        cores = cpu_count()
        self.readers = READERS if self.computes_on_cpu else max(READERS, min(GPU_READERS, cores - 1))
        self.writers = WRITERS if self.computes_on_cpu else max(WRITERS, min(GPU_WRITERS, cores // 2))

    @property
    def computes_on_cpu(self) -> bool:
        return self.device.type == "cpu"

    def run(self, units: Sequence[Unit], steps: Steps[Unit, Loaded, Computed, Written]) -> Iterator[Written]:
        """Run units; see `Runner.run`.

        Yields:
            Results, in order.
        """
        if not units:
            return
        with self._compute_threads():
            yield from self._run(units, steps)

    def _run(self, units: Sequence[Unit], steps: Steps[Unit, Loaded, Computed, Written]) -> Iterator[Written]:
        readers = ThreadPoolExecutor(self.readers, thread_name_prefix="svgpipe-read")
        writers = ThreadPoolExecutor(self.writers, thread_name_prefix="svgpipe-write")
        waiting = iter(units)
        reading: deque[Future[Loaded]] = deque()
        writing: deque[Future[Written]] = deque()

        def read_next() -> None:
            for unit in waiting:
                reading.append(readers.submit(steps.read, unit))
                return

        try:
            for _ in range(self.readers):
                read_next()
            compute = steps.make_worker(self.device)
            while reading:
                loaded = reading.popleft().result()
                read_next()
                writing.append(writers.submit(steps.write, compute(loaded)))
                while writing and (writing[0].done() or len(writing) > 2 * self.writers):
                    yield writing.popleft().result()
            while writing:
                yield writing.popleft().result()
        finally:
            readers.shutdown(cancel_futures=True)
            writers.shutdown(cancel_futures=True)

    @contextmanager
    def _compute_threads(self) -> Iterator[None]:
        """Set torch's number of threads during the block.

        Yields:
            Nothing.
        """
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)
