"""Runs jobs in processes on this machine."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from svgpipe.manifests.errors import SvgpipeError

WATCH_S = 0.5
Job = TypeVar("Job")
Result = TypeVar("Result")


def _live_with(parent: int) -> None:
    """End this worker at Ctrl-C, without a traceback, and when its parent was killed."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="svgpipe-parent").start()


def map_in_processes(function: Callable[[Job], Result], jobs: Sequence[Job], processes: int) -> Iterator[Result]:
    """Yield `function(job)` for every job, in order. One worker means this process.

    After an error, queued jobs are cancelled and running jobs finish.

    Raises:
        SvgpipeError: a process was killed.
    """
    workers = min(processes, len(jobs))
    if workers <= 1:
        yield from map(function, jobs)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_live_with, initargs=(os.getpid(),)) as pool:
        futures = [pool.submit(function, job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        except BrokenProcessPool as error:
            raise SvgpipeError(
                "a worker process was killed (out of memory?). Finished work is kept; run the command again, "
                "with fewer workers if it happens again."
            ) from error
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
