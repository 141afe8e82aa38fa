"""Both runners: the same results, errors as raised, and an end if a process dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.exc import InternalTorchDynamoError

from svgpipe.manifests.errors import ArtifactError, SvgpipeError, UsageError
from svgpipe.stages.runtime import ray_runner
from svgpipe.stages.runtime import runner as runner_module
from svgpipe.stages.runtime.ray_runner import RayRunner
from svgpipe.stages.runtime.resources import Resources
from svgpipe.stages.runtime.runner import READERS, WRITERS, LocalRunner, Runner, Steps

Failures = dict[tuple[str, int], Callable[[], object]]


@dataclass(frozen=True)
class Record:
    """Passed between the steps: an array and other values."""

    unit: int
    values: np.ndarray
    words: tuple[str, ...] = ()


def steps_with(failures: Failures, seen: list[str] | None = None) -> Steps[int, Record, Record, Record]:
    """Steps that multiply a unit's number and record their name; some fail.

    Nested functions, so that Ray pickles them.
    """

    def fail(step: str, unit: int) -> None:
        if seen is not None:
            seen.append(f"{step} {unit}")
        if (failure := failures.get((step, unit))) is not None:
            failure()

    def read(unit: int) -> Record:
        fail("read", unit)
        return Record(unit, np.full(1000, unit))

    def make_worker(device: torch.device) -> Callable[[Record], Record]:
        fail("make", -1)

        def compute(record: Record) -> Record:
            fail("compute", record.unit)
            return Record(record.unit, record.values * 2, (device.type,))

        return compute

    def write(record: Record) -> Record:
        fail("write", record.unit)
        return Record(record.unit, record.values + 1, (*record.words, "written"))

    return Steps(read, make_worker, write)


def raising(error: Exception) -> Callable[[], object]:
    def throw() -> object:
        raise error

    return throw


def raising_with(error: Exception) -> Callable[[Any], Any]:
    throw = raising(error)
    return lambda record: throw()


def kill() -> object:
    os.kill(os.getpid(), signal.SIGKILL)
    return None


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def runner(request: pytest.FixtureRequest) -> Runner:
    if request.param == "local":
        return LocalRunner()
    request.getfixturevalue("ray_session")
    return RayRunner()


def test_all_units_come_through(runner: Runner) -> None:
    found = sorted(runner.run(range(7), steps_with({})), key=lambda record: record.unit)
    assert [record.unit for record in found] == list(range(7))
    for record in found:
        np.testing.assert_array_equal(record.values, np.full(1000, record.unit * 2 + 1))
        assert record.words == ("cuda" if torch.cuda.is_available() else "cpu", "written")
    assert list(runner.run([], steps_with({("make", -1): raising(AssertionError("no unit, no worker"))}))) == []


@pytest.mark.parametrize("step", ["read", "make", "compute", "write"])
def test_an_error_of_any_step_is_raised(step: str) -> None:
    place = (step, -1 if step == "make" else 1)
    with pytest.raises(ArtifactError, match="unit 1 is damaged"):
        list(LocalRunner().run(range(3), steps_with({place: raising(ArtifactError("unit 1 is damaged"))})))


@pytest.mark.slow
@pytest.mark.parametrize("step", ["make", "write"])
def test_an_error_on_ray_arrives_as_it_was_raised(ray_session: None, step: str) -> None:
    place = (step, -1 if step == "make" else 1)
    with pytest.raises(OSError, match="No space left") as full:
        list(RayRunner().run(range(3), steps_with({place: raising(OSError(28, "No space left", "/a/file"))})))
    assert (full.value.errno, full.value.filename) == (28, "/a/file")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ArtifactError("unit 1 is damaged"), "unit 1 is damaged"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "2.00 GiB.* smaller batch_size"),
        (InternalTorchDynamoError("no g++"), r"torch.compile failed .*no g\+\+.*extract.compile=false"),
    ],
)
def test_errors_for_a_person_travel_with_the_unit(error: Exception, told: str) -> None:
    """Through all later steps, as Ray calls them."""
    failed = ray_runner._Guarded(raising_with(error))({ray_runner.RECORD: Record(1, np.zeros(3))})
    passed_on = ray_runner._Guarded(raising_with(AssertionError("not called")))(failed)
    found = passed_on[ray_runner.RECORD]
    assert isinstance(found, ray_runner._Failure) and isinstance(found.error, SvgpipeError)
    assert re.search(told, str(found.error))
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        ray_runner._Guarded(lambda record: 1 / 0)({ray_runner.RECORD: 1})


@pytest.mark.slow
@pytest.mark.parametrize("deadly", ["read", "compute"])
def test_a_unit_that_kills_its_process_ends_the_run(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, deadly: str
) -> None:
    monkeypatch.setattr(ray_runner, "RETRIES", 1)
    with pytest.raises(SvgpipeError, match=r"a Ray worker died .* Finished work is kept"):
        list(RayRunner().run(range(2), steps_with({(deadly, 1): kill})))


def test_local_units_in_flight_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even with a slow writer, few units are in memory."""
    seen: list[str] = []
    slow: Failures = {("write", unit): lambda: time.sleep(0.01) for unit in range(20)}
    steps, ahead = steps_with(slow, seen), []
    for record in LocalRunner().run(range(20), steps):
        reads = sum(name.startswith("read") for name in seen)
        ahead.append(reads - record.unit)
    assert max(ahead) <= READERS + 2 * WRITERS + 3


@pytest.mark.parametrize(("cores", "threads"), [(1, (2, 1)), (4, (3, 2)), (64, (16, 8))])
def test_a_gpu_gets_more_readers_and_writers(
    monkeypatch: pytest.MonkeyPatch, cores: int, threads: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner_module, "cpu_count", lambda: cores)
    runner = LocalRunner()
    assert (runner.readers, runner.writers) == threads
    runner = LocalRunner(use_gpu=False)
    assert (runner.readers, runner.writers) == (READERS, WRITERS)


def test_several_readers_and_writers_keep_the_order() -> None:
    """As beside a GPU. Every second unit is slow to read, and every third to write."""
    slow: Failures = {("read", unit): lambda: time.sleep(0.02) for unit in range(0, 20, 2)}
    slow |= {("write", unit): lambda: time.sleep(0.03) for unit in range(0, 20, 3)}
    runner = LocalRunner()
    runner.readers, runner.writers = 4, 3
    assert [record.unit for record in runner.run(range(20), steps_with(slow))] == list(range(20))


def test_local_steps_overlap_and_the_caller_computes() -> None:
    threads: dict[str, set[int]] = {"read": set(), "compute": set(), "write": set()}
    notes: Failures = {
        (step, unit): (lambda step=step: threads[step].add(threading.get_ident()))  # type: ignore[misc]
        for step in threads
        for unit in range(8)
    }
    list(LocalRunner().run(range(8), steps_with(notes)))
    assert threads["compute"] == {threading.get_ident()}
    assert not threads["read"] & threads["write"] and threading.get_ident() not in threads["read"] | threads["write"]


def test_a_local_run_that_fails_leaves_no_thread() -> None:
    before = threading.active_count()
    with pytest.raises(ArtifactError):
        list(LocalRunner().run(range(50), steps_with({("compute", 3): raising(ArtifactError("damaged"))})))
    assert threading.active_count() == before
    first = LocalRunner().run(range(50), steps_with({}))
    next(first)
    first.close()  # type: ignore[attr-defined]  # a consumer that stops half-way
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("asked", "cluster", "expected"),
    [
        (Resources(), {"CPU": 2}, (1, 0.0)),
        (Resources(), {"CPU": 64, "GPU": 8}, (8, 1.0)),  # also where the driver has none
        (Resources(gpus_per_worker=0.5), {"CPU": 8, "GPU": 2}, (4, 0.5)),
        (Resources(num_workers=3), {"CPU": 8, "GPU": 4}, (3, 1.0)),
        (Resources(gpus_per_worker=0), {"CPU": 8, "GPU": 4}, (1, 0.0)),
    ],
)
def test_default_workers_follow_the_resources_of_the_cluster(
    asked: Resources, cluster: dict[str, float], expected: tuple[int, float]
) -> None:
    found = asked.resolved(cluster)
    assert (found.num_workers, found.gpus_per_worker) == expected


def test_resources_that_the_cluster_lacks_are_refused() -> None:
    with pytest.raises(UsageError, match=r"500 workers of 1 CPUs need 500\.5 CPUs"):
        Resources(500, 1.0).resolved({"CPU": 2.0}).require({"CPU": 2.0}, beside=0.5)
    with pytest.raises(UsageError, match="2 workers of 1 GPUs need 2, but Ray has 1"):
        Resources(2).resolved({"CPU": 8.0, "GPU": 1.0}).require({"CPU": 8.0, "GPU": 1.0})


def test_a_worker_without_a_gpu_computes_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """An actor that reserves no GPU sees all of the machine's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices: list[Any] = []

    def make_worker(device: torch.device) -> Callable[[Any], Any]:
        devices.append(device)
        return lambda record: record

    ray_runner._GuardedWorker(make_worker, False, torch.get_num_threads())
    assert devices == [torch.device("cpu")]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _is_worker(pid: int) -> bool:
    with suppress(OSError):
        return b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def test_workers_end_when_their_parent_is_killed() -> None:
    script = (
        "import time; from svgpipe.stages.runtime.processes import map_in_processes\n"
        "if __name__ == '__main__': list(map_in_processes(time.sleep, [60, 60], 2))"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while len(workers := [pid for pid in _children(parent.pid) if _is_worker(pid)]) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)  # until they sleep
    parent.kill()
    parent.wait()
    while any(_is_worker(pid) for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
