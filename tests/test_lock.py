"""The lock of a directory: one live owner; the lock of a dead owner is taken over."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from upath import UPath

from svgpipe.manifests import lock as module
from svgpipe.manifests.filesystem import Location, children, write_atomic
from svgpipe.manifests.lock import LOCK_NAME, BusyError, Lock, locked

HOLD = """
import sys, time
from pathlib import Path
from svgpipe.manifests.lock import Lock
lock = Lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[int]:
    """Yield the number of another process that holds the lock; it is killed at the end of the block."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "held"
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_lock_of_a_living_owner_is_kept_and_of_a_killed_one_is_taken(tmp_path: Path) -> None:
    with (
        held_elsewhere(tmp_path) as pid,
        pytest.raises(BusyError, match=rf"in use by process {pid} of .* last sign of life \d+ s ago"),
    ):
        Lock(tmp_path)
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK_NAME).read_text())["pid"] != pid
    assert not list(tmp_path.iterdir())


def test_an_owner_on_another_host_is_dead_only_after_its_lock_expires(tmp_path: Path) -> None:
    elsewhere = {"token": "t", "host": "far", "pid": 1, "process": {"namespace": "far", "started": "1"}, "since": 0}
    (tmp_path / LOCK_NAME).write_text(json.dumps({**elsewhere, "beat_at": time.time() - module.STALE_S / 2}))
    with pytest.raises(BusyError, match="on far"):
        Lock(tmp_path)
    (tmp_path / LOCK_NAME).write_text(json.dumps({**elsewhere, "beat_at": time.time() - module.STALE_S - 1}))
    with locked(tmp_path):
        pass


def test_a_reused_process_id_does_not_hold_a_lock(tmp_path: Path) -> None:
    mine = Lock(tmp_path)
    entry = json.loads((tmp_path / LOCK_NAME).read_text())
    mine.release()
    entry["process"]["started"] = "1"
    (tmp_path / LOCK_NAME).write_text(json.dumps(entry))
    with locked(tmp_path):
        pass


def test_signs_of_life_are_written_and_a_lost_lock_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    with locked(tmp_path) as mine:
        first = json.loads((tmp_path / LOCK_NAME).read_text())["beat_at"]
        deadline = time.monotonic() + 10
        while json.loads((tmp_path / LOCK_NAME).read_text())["beat_at"] == first:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        mine.check()
        (tmp_path / LOCK_NAME).write_text(json.dumps({"token": "other", "pid": 1, "host": "far"}))
        while time.monotonic() < deadline:
            try:
                mine.check()
            except BusyError as error:
                assert "lost its lock" in str(error)
                break
            time.sleep(0.01)
        else:
            pytest.fail("the loss was not noticed")
    assert json.loads((tmp_path / LOCK_NAME).read_text())["token"] == "other"  # not ours to remove


def test_a_process_that_was_suspended_checks_its_lock_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No heartbeat runs here, as on a suspended host: `check` must notice the lost lock."""
    monkeypatch.setattr(module, "STALE_S", 0.4)
    with locked(tmp_path) as mine:
        time.sleep(0.3)
        mine.check()
        (tmp_path / LOCK_NAME).write_text(json.dumps({"token": "other", "pid": 1, "host": "far"}))
        mine.check()  # looked a moment ago
        time.sleep(0.3)
        with pytest.raises(BusyError, match="lost its lock: in use by process 1 of None on far"):
            mine.check()


def test_an_unreachable_store_ends_the_run_only_after_the_lock_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(path: Path) -> None:
        raise RuntimeError("no route to the store")  # client libraries raise all kinds

    monkeypatch.setattr(module, "STALE_S", 0.4)
    monkeypatch.setattr(module, "BEAT_S", 0.05)
    with locked(tmp_path) as mine:
        monkeypatch.setattr(module, "_read", unreachable)
        time.sleep(0.25)
        mine.check()
        time.sleep(0.3)
        with pytest.raises(BusyError, match="could not be renewed"):
            mine.check()


def test_a_process_hidden_by_proc_is_not_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with held_elsewhere(tmp_path) as pid:
        real = Path.read_text

        def hidden(path: Path, *options: str) -> str:
            if str(path) == f"/proc/{pid}/stat":
                raise PermissionError
            return real(path, *options)

        monkeypatch.setattr(Path, "read_text", hidden)
        with pytest.raises(BusyError):
            Lock(tmp_path)
    with locked(tmp_path):
        pass


def test_a_truncated_lock_has_no_owner(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).write_text('{"token": "abc"')
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("remote", [False, True])
def test_one_of_two_processes_takes_the_lock_of_a_dead_owner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, remote: bool
) -> None:
    """The second one reads the dead owner's lock before the first one takes it over, and continues afterwards."""
    folder: Location = UPath(f"memory://{tmp_path.name}") if remote else tmp_path
    dead = {"token": "t", "host": "far", "pid": 1, "process": {"namespace": "far"}, "since": 0, "beat_at": 0}
    (folder / LOCK_NAME).write_bytes(json.dumps(dead).encode())
    first: list[Lock] = []
    real = module.is_dead

    def first_comes_in_between(owner: dict[str, Any]) -> bool:
        if owner.get("token") == "t" and not first:
            monkeypatch.setattr(module, "is_dead", real)
            first.append(Lock(folder))
        return real(owner)

    monkeypatch.setattr(module, "is_dead", first_comes_in_between)
    with pytest.raises(BusyError, match="in use by process"):
        Lock(folder)
    first[0].check()
    assert json.loads((folder / LOCK_NAME).read_bytes())["token"] == first[0].token
    first[0].release()
    assert children(folder) == []


def test_a_claim_of_a_dead_process_is_ignored(tmp_path: Path) -> None:
    dead = {"token": "t", "host": "far", "pid": 1, "process": {"namespace": "far"}, "since": 0, "beat_at": 0}
    (tmp_path / LOCK_NAME).write_text(json.dumps(dead))
    (tmp_path / f".{LOCK_NAME}.t.claim-0").write_text(json.dumps(dead))
    with locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_one_of_two_processes_takes_a_dead_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is about to write the lock when the second one, which also saw the dead claim, continues."""
    dead = {"token": "t", "host": "far", "pid": 1, "process": {"namespace": "far"}, "since": 0, "beat_at": 0}
    (tmp_path / LOCK_NAME).write_text(json.dumps(dead))
    (tmp_path / f".{LOCK_NAME}.t.claim-0").write_text(json.dumps({**dead, "token": "claimant"}))
    about_to_write, go_on = threading.Event(), threading.Event()
    first: list[Lock] = []
    thread = threading.Thread(target=lambda: first.append(Lock(tmp_path)))
    real_is_dead, real_write = module.is_dead, write_atomic

    def write_later(path: Location, content: bytes) -> None:
        if threading.current_thread() is thread and not about_to_write.is_set():
            about_to_write.set()
            assert go_on.wait(60)
        real_write(path, content)

    def first_comes_in_between(owner: dict[str, Any]) -> bool:
        if owner.get("token") == "claimant" and not thread.ident:
            thread.start()
            assert about_to_write.wait(60)
        return real_is_dead(owner)

    monkeypatch.setattr(module, "write_atomic", write_later)
    monkeypatch.setattr(module, "is_dead", first_comes_in_between)
    with pytest.raises(BusyError, match="Try again"):
        Lock(tmp_path)
    go_on.set()
    thread.join()
    first[0].check()
    first[0].release()
    assert not list(tmp_path.iterdir())
