"""The GPU suite runs on a CPU as far as a CPU goes: `python -m tests.gpu --device cpu --small`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .gpu.checks import Check


@pytest.mark.parametrize(
    ("part", "measured"), [("parity", "one step, flow, float32: weights"), ("pipeline", "samples are finite")]
)
def test_parts_of_the_gpu_suite(part: str, measured: str, tmp_path: Path) -> None:
    options = ["--device", "cpu", "--small", "--only", part, "--out", str(tmp_path)]
    command = [sys.executable, "-m", "tests.gpu", *options]
    found = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    summary = json.loads(found.stdout.splitlines()[-1])
    assert summary["failed"] == summary["errors"] == []
    assert measured in summary
    assert (tmp_path / "gpu.log").read_text() == found.stdout


@pytest.mark.parametrize(
    ("check", "holds"),
    [
        (Check("a", 1.0), True),
        (Check("a", float("nan")), False),
        (Check("a", 1.0, at_most=0.9), False),
        (Check("a", 1.0, at_least=1.1), False),
        (Check("a", 1.0, at_least=0.5, at_most=2.0), True),
    ],
)
def test_a_check_fails_outside_its_limits_and_for_nan(check: Check, holds: bool) -> None:
    assert check.holds == holds
