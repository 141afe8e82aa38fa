"""Commands in their own processes, started to be killed.

A fork server imports the heavy libraries once. Every command is a fork of it and starts in milliseconds instead of
seconds. It leads its own session, so that all its processes can be killed with real signals.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

DEADLINE_S = 300.0
# Imports of the commands that start no threads, which a fork would lose. Ray starts threads and is imported later.
PRELOADED = [
    "svgpipe.pipeline.run",
    "svgpipe.pipeline.stage_commands",
    "svgpipe.stages.artifacts.verify",
    "svgpipe.stages.extract.encoder_actor",
    "svgpipe.stages.evaluate.stage",
    "svgpipe.stages.train_autoencoder.run",
    "svgpipe.stages.train_diffusion.run",
]
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(PRELOADED)


def _run(arguments: Sequence[str], log: str, environment: dict[str, str]) -> None:
    """Run a command in the fork: own session, output to the log, then the console script."""
    os.setsid()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["svgpipe", *arguments]
    from svgpipe.pipeline.cli import entry

    entry()


class Command:
    """A running command."""

    def __init__(self, arguments: Sequence[object], log: Path) -> None:
        """Start it; both output streams are appended to `log`."""
        self.log = log
        log.touch()
        self._process = _server.Process(target=_run, args=(list(map(str, arguments)), str(log), dict(os.environ)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code; negative for the signal that ended it, None while it runs."""
        return self._process.exitcode

    def text(self) -> str:
        """Return its output."""
        return self.log.read_text()

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Wait until it has ended; return its exit code."""
        self._process.join(timeout_s)
        assert self.returncode is not None, f"still running after {timeout_s:.0f} s: {self.text()}"
        return self.returncode

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Wait until `ready()` is true; on a busy machine this may take long."""
        deadline = time.monotonic() + DEADLINE_S
        while not ready():
            assert self.returncode is None, f"ended too early: {self.text()}"
            assert time.monotonic() < deadline, f"never became ready: {self.text()}"
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the command alone."""
        os.kill(self.pid, number)

    def kill_all(self) -> None:
        """Send SIGKILL to all processes of its session's group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.wait()


def run_and_kill(arguments: Sequence[object], ready: Callable[[], bool]) -> None:
    """Start a command, and kill all its processes once `ready()` is true."""
    with tempfile.TemporaryDirectory() as folder:
        command = Command(arguments, Path(folder) / "log")
        command.wait_for(ready)
        command.kill_all()
