"""Units through Ray: one that kills every process it meets ends the run with a message, not never."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

import pytest
import torch

from svgpipe.manifests.errors import SvgpipeError
from svgpipe.stages.runtime import runner
from svgpipe.stages.runtime.heap import keep_freed_memory
from svgpipe.stages.runtime.runner import Resources, run_units


def _steps(deadly: str) -> tuple[Any, Any, Any]:
    """Read, worker and write, of which one kills its process at unit 1. Nested, so that Ray takes them along."""

    def step(name: str, row: dict[str, Any]) -> dict[str, Any]:
        if name == deadly and row["unit"] == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    class Worker:
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            return step("worker", row)

    return (lambda row: step("read", row)), Worker, (lambda row: step("write", row))


@pytest.mark.parametrize("deadly", ["read", "worker"])
def test_a_deadly_unit_is_not_tried_for_ever(ray_session: None, monkeypatch: pytest.MonkeyPatch, deadly: str) -> None:
    monkeypatch.setattr(runner, "RETRIES", 1)
    read, worker, write = _steps(deadly)
    items = [{"unit": unit} for unit in range(2)]
    with pytest.raises(SvgpipeError, match=r"a Ray worker died .* What was finished is kept"):
        list(run_units(items, read, worker, {}, write, Resources()))


def test_a_worker_out_of_memory_is_told_without_a_traceback(ray_session: None) -> None:
    class Worker:
        def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    step = _steps("nobody")[0]
    with pytest.raises(SvgpipeError, match=r"out of memory .*2.00 GiB.* smaller batch_size needs less"):
        list(run_units([{"unit": 0}], step, Worker, {}, step, Resources()))


@pytest.mark.skipif(not keep_freed_memory(), reason="this C library keeps what it likes")
@pytest.mark.parametrize("megabytes", [24, 200])
def test_a_worker_keeps_the_memory_of_tensors_that_are_gone(megabytes: int) -> None:
    """Rounds of twelve tensors, after which the heap's end is free: without it, every page of the next is a fault."""
    code = f"""
import resource, torch
from svgpipe.stages.runtime.runner import start_worker
start_worker(1)
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones({megabytes * 250_000}) for _ in range(12)]
    tensors.clear()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000


@pytest.mark.slow
def test_without_it_all_units_come_through(ray_session: None) -> None:
    read, worker, write = _steps("nobody")
    found = run_units([{"unit": unit} for unit in range(3)], read, worker, {}, write, Resources())
    assert sorted(row["unit"] for row in found) == [0, 1, 2]
