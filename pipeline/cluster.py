"""Chooses where work runs: in this process, or on Ray."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING

from svgpipe.manifests.errors import SvgpipeError, UsageError, first_line

CONNECT_S = 10.0

if TYPE_CHECKING:
    from svgpipe.stages.runtime.resources import Resources
    from svgpipe.stages.runtime.runner import Computed, Loaded, Runner, Steps, Unit, Written


def training_cluster(resources: Resources | None, address: str | None) -> AbstractContextManager[None]:
    """Connect Ray during the block if training uses workers; otherwise do nothing.

    Returns:
        A context manager.
    """
    return nullcontext() if resources is None else connected(address)


@contextmanager
def runner_for(resources: Resources, address: str | None) -> Iterator[Runner]:
    """Choose the runner: this process, or Ray for several workers, several GPUs or a cluster.

    Ray starts when the first unit runs, so a finished stage does not start it.

    Yields:
        The runner.

    Raises:
        UsageError: nothing answers at the address.
    """
    from svgpipe.stages.runtime.runner import LocalRunner

    if address is None and "RAY_ADDRESS" not in os.environ and _fits_this_process(resources):
        cpus = resources.cpus_per_worker
        threads = None if cpus is None else max(1, int(cpus))
        yield LocalRunner(use_gpu=resources.gpus_per_worker != 0, threads=threads)
        return
    if address is not None:
        _require_reachable(address)

    def start() -> Runner:
        stack.enter_context(connected(address))
        from svgpipe.stages.runtime.ray_runner import RayRunner

        return RayRunner(resources)

    with ExitStack() as stack:
        yield RunnerOnDemand(start)


class RunnerOnDemand:
    """A runner that is made when the first unit runs."""

    def __init__(self, make: Callable[[], Runner]) -> None:
        self._make = make

    @cached_property
    def _runner(self) -> Runner:
        return self._make()

    @property
    def computes_on_cpu(self) -> bool:
        return self._runner.computes_on_cpu

    def run(self, units: Sequence[Unit], steps: Steps[Unit, Loaded, Computed, Written]) -> Iterator[Written]:
        """Return the results of units; see `Runner.run`."""
        return self._runner.run(units, steps) if units else iter(())


def _fits_this_process(resources: Resources) -> bool:
    """Return whether one worker on at most one GPU is enough. Ray reports resources that this machine lacks."""
    import torch

    gpus = torch.cuda.device_count()
    if resources.num_workers is None and resources.gpus_per_worker != 0 and gpus > 1:
        return False
    return resources.num_workers in (None, 1) and (resources.gpus_per_worker or 0) <= min(gpus, 1)


def stop_on_sigterm() -> None:
    """Handle SIGTERM, which schedulers send, like Ctrl-C."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def _require_reachable(address: str) -> None:
    """Check the address of a cluster. Ray itself tries a closed port for minutes, without a message.

    Raises:
        UsageError: it is no address, or nothing answers there.
    """
    if address in ("auto", "local"):
        return
    parts = re.fullmatch(r"(?:ray://)?([^:/\s]+):([0-9]{1,5})", address)
    if parts is None:
        raise UsageError(
            f"--address {address}: expected auto, local, HOST:PORT or ray://HOST:PORT. The address of Ray's dashboard "
            "(http://…) is another one."
        )
    try:
        socket.create_connection((parts[1], int(parts[2])), timeout=CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UsageError(
            f"--address {address}: nothing answers there ({first_line(error)}). `ray start --head` prints the address "
            "of a cluster; its usual port is 6379."
        ) from error


@contextmanager
def _without_native_output() -> Iterator[None]:
    """Discard what native code writes to stderr during the block: Ray prints a line about its own log level.

    Yields:
        Nothing.
    """
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Connect Ray during the block. An existing connection is used and kept.

    Yields:
        Nothing.

    Raises:
        UsageError: see `_require_reachable`.
        SvgpipeError: Ray does not start.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's log lines would interfere with the progress bars; its errors still arrive as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray
    import ray.data  # noqa: F401

    # Without an address, Ray would silently join the last cluster that was started on this machine.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _require_reachable(address)
    if ray.is_initialized():
        yield
        return
    try:
        with _without_native_output():
            ray.init(
                address=address,
                include_dashboard=False,
                configure_logging=True,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise SvgpipeError(
            f"Ray did not start or connect ({first_line(error)}). It needs space in "
            f"{tempfile.gettempdir()} and /dev/shm, "
            "and a writable home directory; with `--address auto`, a cluster that was started with `ray start --head`."
        ) from error
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    stop_on_sigterm()  # again, because Ray has installed a handler that ends the process with native stack dumps
    try:
        yield
    finally:
        ray.shutdown()
