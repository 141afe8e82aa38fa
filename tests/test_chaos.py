"""Kills at any time and full disks: the same command ends with the same bytes."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from svgpipe.manifests import FeatureCache

from .commands import Command
from .conftest import SMALL_UNITS, STORE, Finished, Outcome, begin_calibrated, extract_args, tree_bytes, units_done

KILLS = int(os.environ.get("SVGPIPE_KILLS", "5"))
SEED = 20261122
ON_RAY = ("--workers", 2, "--cpus-per-worker", 0.7)


def require_undisturbed(out: Path, undisturbed: Path) -> None:
    """Check that a cache has the same bytes as an uninterrupted one."""
    assert FeatureCache(out).manifest.content == FeatureCache(undisturbed).manifest.content
    assert tree_bytes(out, *STORE) == tree_bytes(undisturbed, *STORE)
    assert not list(out.rglob("*.partial"))


def test_kills_at_random_moments(
    finished: Finished, undisturbed: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Seeded: every second kill comes at a random moment before a unit is written, the others after some units."""
    rng = random.Random(SEED)
    out, arguments = tmp_path / "cache", extract_args(finished, tmp_path / "cache", *SMALL_UNITS)
    for number in range(KILLS):
        command = Command(arguments, tmp_path / "log")
        early, before = number % 2 == 0, units_done(out)
        goal, moment = before + (1 if early else rng.randint(1, 10)), time.monotonic() + rng.uniform(0.0, 1.0)

        def is_time(early: bool = early, goal: int = goal, moment: float = moment) -> bool:
            return units_done(out) >= goal or (early and time.monotonic() > moment)

        command.wait_for(is_time)
        command.kill_all()
        print(f"kill {number}: at {units_done(out)} units")
    assert not (out / "manifest.json").exists()
    ended = svgpipe(*arguments)
    assert ended.code == 0, ended.err
    assert svgpipe("verify", out, "--deep").code == 0
    require_undisturbed(out, undisturbed)


def ray_workers(session: int) -> list[int]:
    """Return the processes of actors in the session of a command."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session and (entry / "cmdline").read_bytes().startswith(b"ray::MapW"):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
def test_extraction_on_ray_survives_a_killed_worker_and_a_killed_driver(
    finished: Finished, undisturbed: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """The run continues without the worker. One process without Ray finishes what the driver leaves."""
    out = begin_calibrated(undisturbed, tmp_path / "cache")
    command = Command(extract_args(finished, out, *SMALL_UNITS, *ON_RAY), tmp_path / "log")
    command.wait_for(lambda: units_done(out) >= 1 and bool(ray_workers(command.pid)))
    os.kill(ray_workers(command.pid)[0], signal.SIGKILL)
    done = units_done(out)
    command.wait_for(lambda: units_done(out) >= done + 3)
    command.send(signal.SIGKILL)
    command.wait()
    command.kill_all()
    assert "logging.cc" not in command.text()  # no line of Ray's native code
    assert not (out / "manifest.json").exists()
    assert svgpipe(*extract_args(finished, out, *SMALL_UNITS)).code == 0
    require_undisturbed(out, undisturbed)


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs: a disk that really runs full."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("mounting a small tmpfs needs privileges that this user has not")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_loses_nothing(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    size = sum(path.stat().st_size for path in (finished.root / "cache").rglob("*")) // 1024
    with small_disk(tmp_path / "disk", size * 2) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * (size * 1650))
        out = disk / "cache"
        full = svgpipe(*extract_args(finished, out))
        assert full.code == 1
        assert "no space left on the device" in full.err
        assert "run the command again" in full.err
        assert not (out / "manifest.json").exists()
        done = {path.name: path.stat().st_mtime_ns for path in (out / "journal").glob("unit-*.json")}
        assert done, "the disk was too small to show that something is kept"
        assert len(done) < 5
        ballast.unlink()
        assert svgpipe(*extract_args(finished, out)).code == 0
        assert {name: (out / "journal" / name).stat().st_mtime_ns for name in done} == done
        assert svgpipe("verify", out, "--deep").code == 0
        assert FeatureCache(out).manifest.content == finished.cache.manifest.content


def test_a_second_extract_on_a_cache_in_use_is_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "cache"
    process = Command(extract_args(finished, out), tmp_path / "log")
    try:
        process.wait_for((out / "plan.json").exists)
        assert f"in use by process {process.pid}" in " ".join(svgpipe("inspect", out, "--json").out.split())
        second = svgpipe(*extract_args(finished, out))
        assert second.code == 1
        assert f"in use by process {process.pid} of " in second.err
        assert "last sign of life" in second.err
    finally:
        process.kill_all()
    assert json.loads((out / "lock.json").read_text())["pid"] == process.pid
    shutil.rmtree(out / "journal", ignore_errors=True)
    assert svgpipe(*extract_args(finished, out)).code == 0
    assert not (out / "lock.json").exists()
    assert FeatureCache(out).manifest.content == finished.cache.manifest.content
