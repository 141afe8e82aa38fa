"""Commands in processes of their own, started to be killed.

A fork server imports the heavy libraries once; every command is a fork of it, so that it starts in milliseconds
instead of seconds. It leads a session of its own, so that all its processes can be killed, by real signals.
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
# What commands import: nothing that starts threads, which a fork would lose. Ray, which does, loads where it is used.
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
    """In the fork: a session of its own, output to the log, then what the console script does."""
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
        """Start it; both of its output streams go to the end of `log`."""
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
        """What it has printed."""
        return self.log.read_text()

    def wait(self, timeout_s: float = DEADLINE_S) -> int:
        """Its exit code, once it has ended."""
        self._process.join(timeout_s)
        assert self.returncode is not None, f"still running after {timeout_s:.0f} s: {self.text()}"
        return self.returncode

    def wait_for(self, ready: Callable[[], bool]) -> None:
        """Until `ready()` is true of it; it may take long on a busy machine."""
        deadline = time.monotonic() + DEADLINE_S
        while not ready():
            assert self.returncode is None, f"ended too early: {self.text()}"
            assert time.monotonic() < deadline, f"never became ready: {self.text()}"
            time.sleep(0.002)

    def send(self, number: signal.Signals) -> None:
        """A signal to the command alone."""
        os.kill(self.pid, number)

    def kill_all(self) -> None:
        """SIGKILL to every process of its session's group."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.wait()


def run_and_kill(arguments: Sequence[object], ready: Callable[[], bool]) -> None:
    """Start a command, and kill all of it once `ready()` is true."""
    with tempfile.TemporaryDirectory() as folder:
        command = Command(arguments, Path(folder) / "log")
        command.wait_for(ready)
        command.kill_all()
