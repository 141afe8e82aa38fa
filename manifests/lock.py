"""One writer per directory: a lock file with owner and heartbeat. The lock of a dead owner is taken over.

    lock.json    token, host, process and start time of the owner, and the time of its last heartbeat

On the same machine, an owner is dead if no process has its number and start time. On another host or in another
container, an owner is dead if it sent no heartbeat for `STALE_S` seconds. Clocks of hosts that share a store must
therefore agree to within a minute. The lock works on shared folders and in object stores.
"""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import SvgpipeError
from .filesystem import Location, create_exclusively, write_atomic

LOCK_NAME = "lock.json"
BEAT_S = 15.0
STALE_S = 120.0
HIDDEN = "hidden"
CLAIM_WAIT_S = 0.1


class BusyError(SvgpipeError):
    """Another process works in the directory."""


class Lock:
    """A lock that is held. `check` raises if it was lost."""

    def __init__(self, directory: Location) -> None:
        """Take the lock of an existing `directory`.

        Raises:
            BusyError: a live process holds it.
        """
        self.path = directory / LOCK_NAME
        self.token = uuid.uuid4().hex
        self._since = time.time()
        self._lost: str | None = None
        self._beat_at = self._since
        self._looking = threading.Lock()
        self._released = threading.Event()
        self._acquire()
        self._thread = threading.Thread(target=self._beat, name="svgpipe-lock", daemon=True)
        self._thread.start()

    def _mine(self) -> bytes:
        pid = os.getpid()
        entry = {
            "token": self.token,
            "host": socket.gethostname(),
            "user": _user(),
            "pid": pid,
            "process": _process(pid),
            "since": self._since,
            "beat_at": time.time(),
        }
        return json.dumps(entry, indent=2).encode() + b"\n"

    def _acquire(self) -> None:
        for _ in range(10):
            if create_exclusively(self.path, self._mine()):
                return
            owner = _read(self.path)
            if owner is None:
                continue  # released in the meantime
            if not is_dead(owner):
                raise BusyError(f"{self.path.parent}: {describe(owner)} Wait for it, or stop it and run this again.")
            if self._take_over(owner):
                return
        raise BusyError(f"{self.path}: several processes compete for this lock. Try again.")

    def _take_over(self, owner: dict[str, Any]) -> bool:
        """Replace the lock of a dead owner by ours, unless another process does so.

        A process first creates a claim file that is named after the token of the dead owner. A process that read the
        old lock too late finds another token when it reads the lock again, and gives up. If the process that made claim
        N died, the next one creates claim N + 1. It does not delete claim N, because that could be a live process's
        claim.

        Returns:
            Whether the lock is ours.
        """
        claims: list[Location] = []
        while True:
            claims.append(self.path.with_name(f".{LOCK_NAME}.{owner.get('token')}.claim-{len(claims)}"))
            if create_exclusively(claims[-1], self._mine()):
                break
            claimant = _read(claims[-1])
            if claimant is None or not is_dead(claimant):
                time.sleep(CLAIM_WAIT_S)
                return False
        replaced = False
        try:
            if (_read(self.path) or {}).get("token") == owner.get("token"):
                write_atomic(self.path, self._mine())
                replaced = True
        finally:
            for claim in claims if replaced else claims[-1:]:
                claim.unlink(missing_ok=True)
        return replaced

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S) and self._lost is None:
            self._sign_of_life()

    def _sign_of_life(self) -> None:
        """Send one heartbeat, or notice that the lock was lost."""
        # Every error is ignored here: a full disk or an unreachable store must not end the run at once. `check` ends it
        # when the heartbeat is too old.
        with self._looking, suppress(Exception):
            owner = _read(self.path)
            if owner is None or owner.get("token") != self.token:
                self._lost = "it was removed." if owner is None else describe(owner)
                return
            write_atomic(self.path, self._mine())
            self._beat_at = time.time()

    def check(self) -> None:
        """Check that the lock is still ours.

        A process that was frozen notices a lost lock here, before it writes again.

        Raises:
            BusyError: the lock was lost, or could not be renewed for so long that it may be lost.
        """
        if self._lost is None and time.time() - self._beat_at > STALE_S / 2:
            self._sign_of_life()
            if (silent := time.time() - self._beat_at) > STALE_S:
                self._lost = self._lost or f"it could not be renewed for {silent:.0f} s."
        if self._lost is not None:
            raise BusyError(
                f"{self.path}: this run has lost its lock: {self._lost} It stops, so that two do not write."
            )

    def release(self) -> None:
        """Release the lock. Does nothing if it is no longer ours."""
        self._released.set()
        self._thread.join()
        with suppress(Exception):  # an error of a client library must not hide the reason why the run ended
            owner = _read(self.path)
            if owner is not None and owner.get("token") == self.token:
                self.path.unlink()


@contextmanager
def locked(directory: Location) -> Iterator[Lock]:
    """Hold the lock of an existing `directory` during the block.

    Yields:
        The lock.

    Raises:
        BusyError: a live process holds it.
    """
    lock = Lock(directory)
    try:
        yield lock
    finally:
        lock.release()


def is_dead(owner: dict[str, Any]) -> bool:
    """Return whether the owner of a lock is dead, as far as this machine can know."""
    here = _process(os.getpid())
    theirs = owner.get("process") or {}
    if here["namespace"] == theirs.get("namespace"):
        process = _process(int(owner.get("pid", -1)))
        if process["started"] != HIDDEN:
            return bool(process != theirs)
    return time.time() - float(owner.get("beat_at", 0)) > STALE_S


def owner_of(directory: Location) -> dict[str, Any] | None:
    """Return the live owner of the lock of `directory`, or None."""
    owner = _read(directory / LOCK_NAME)
    return None if owner is None or is_dead(owner) else owner


def describe(owner: dict[str, Any]) -> str:
    """Return a sentence that says who holds a lock, and since when."""
    now = time.time()
    return (
        f"in use by process {owner.get('pid')} of {owner.get('user')} on {owner.get('host')} "
        f"for {now - float(owner.get('since', now)):.0f} s, last sign of life "
        f"{max(0.0, now - float(owner.get('beat_at', now))):.0f} s ago."
    )


def _read(path: Location) -> dict[str, Any] | None:
    for _ in range(20):
        try:
            entry = json.loads(path.read_bytes())
            return entry if isinstance(entry, dict) else {}
        except FileNotFoundError:
            return None
        except json.JSONDecodeError:
            time.sleep(0.05)  # the file exists, but its content is not written yet
    return {}  # truncated by a crash or a full disk: no owner


def _process(pid: int) -> dict[str, Any]:
    """Return the identity of a process: start time, because numbers are reused, and namespace of process numbers."""
    try:
        namespace = f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()} "
        namespace += str(Path("/proc/self/ns/pid").readlink())
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        state, started = fields[0], fields[19]
    except OSError:
        if not Path("/proc/self/stat").exists():
            return {"namespace": socket.gethostname(), "started": _alive(pid)}
        # The process is gone, or belongs to another user and /proc hides it: the start time is unknown.
        return {"namespace": namespace, "started": None if _alive(pid) is None else HIDDEN}
    return {"namespace": namespace, "started": None if state in "ZX" else started}


def _alive(pid: int) -> str | None:
    """Return whether the process exists, on systems without /proc."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "running"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user number without a name, as in many containers
        return str(os.getuid())
