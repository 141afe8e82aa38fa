"""Whatever is killed and whenever, and whatever runs full: the same command ends in the same bytes."""

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

from .conftest import (
    DEADLINE_S,
    SMALL_UNITS,
    STORE,
    Finished,
    Outcome,
    extract_args,
    start,
    tree_bytes,
    units_done,
    wait_for,
)

KILLS = int(os.environ.get("SVGPIPE_KILLS", "5"))
SEED = 20261122
TARGETS = ("everything", "worker", "driver")


def ray_workers(session: int) -> list[int]:
    """Processes of the pipeline's tasks and actors in the session of a command; Ray's agents are a node's death."""
    ours = (b"ray::MapWorker", b"ray::Map(", b"ray::IDLE")
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if os.getsid(int(entry.name)) == session and (entry / "cmdline").read_bytes().startswith(ours):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


def kill_group(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_kills_at_random_moments(
    finished: Finished, undisturbed: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Seeded: each kill takes the driver, one worker, or everything, before or after some units were written."""
    rng = random.Random(SEED)
    out, log = tmp_path / "cache", tmp_path / "log"
    arguments = extract_args(finished, out, *SMALL_UNITS)
    story = []
    process: subprocess.Popen[bytes] | None = None
    for number in range(KILLS):
        target = TARGETS[number] if number < len(TARGETS) else rng.choice(TARGETS)
        # Every other kill comes while Ray is starting, when nothing was written yet by this run.
        early, more = number % 2 == 1, rng.randint(1, 2)
        if process is None:
            process = start(arguments, log)
        before, deadline = units_done(out), time.monotonic() + DEADLINE_S
        pause = rng.uniform(0.5, 6.0)
        began = time.monotonic()
        while process.poll() is None and time.monotonic() < deadline:
            if (early and time.monotonic() - began > pause) or units_done(out) >= before + more:
                break
            time.sleep(0.002)
        if process.poll() is not None:
            assert (out / "manifest.json").exists(), log.read_text()
            break
        if target == "worker" and (workers := ray_workers(process.pid)):
            victim = rng.choice(workers)
            os.kill(victim, signal.SIGKILL)
            story.append(f"kill {number}: worker {victim} at {units_done(out)} units")
            continue  # the same run goes on without it
        if target == "worker":
            target = "everything, as no worker was there yet"
        if target == "driver":
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        story.append(f"kill {number}: {target} at {units_done(out)} units")
        kill_group_quietly(process)
        process = None
    if process is not None:
        process.wait(timeout=300)
    ended = svgpipe(*arguments)
    assert ended.code == 0, ended.err
    assert svgpipe("verify", out, "--deep").code == 0
    print("\n".join(story))
    assert len(story) >= KILLS, story
    assert FeatureCache(out).manifest.content == FeatureCache(undisturbed).manifest.content
    assert tree_bytes(out, *STORE) == tree_bytes(undisturbed, *STORE)
    assert not list(out.rglob("*.partial"))


def kill_group_quietly(process: subprocess.Popen[bytes]) -> None:
    """Whatever is left of a command: Ray's own processes outlive a killed driver for a moment."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


@contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    """A tmpfs of its own: a disk that really runs full."""
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


@pytest.mark.slow
def test_a_full_disk_loses_nothing(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    size = sum(path.stat().st_size for path in (finished.root / "cache").rglob("*")) // 1024
    with small_disk(tmp_path / "disk", size * 2) as disk:
        ballast = disk / "ballast"
        ballast.write_bytes(b"x" * (size * 1400))
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


@pytest.mark.slow
def test_a_second_extract_on_a_cache_in_use_is_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "cache"
    process = start(extract_args(finished, out), tmp_path / "log")
    try:
        wait_for((out / "lock.json").exists, process, tmp_path / "log")
        assert f"in use by process {process.pid}" in " ".join(svgpipe("inspect", out, "--json").out.split())
        second = svgpipe(*extract_args(finished, out))
        assert second.code == 1
        assert f"in use by process {process.pid} of " in second.err
        assert "last sign of life" in second.err
    finally:
        kill_group(process)
    assert json.loads((out / "lock.json").read_text())["pid"] == process.pid
    shutil.rmtree(out / "journal", ignore_errors=True)
    assert svgpipe(*extract_args(finished, out)).code == 0
    assert not (out / "lock.json").exists()
    assert FeatureCache(out).manifest.content == finished.cache.manifest.content
