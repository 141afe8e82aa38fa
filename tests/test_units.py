"""Units through Ray: one that kills every process it meets ends the run with a message, not never."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from svgpipe.manifests.errors import SvgpipeError
from svgpipe.stages import units
from svgpipe.stages.units import Resources, run_units


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
    monkeypatch.setattr(units, "RETRIES", 1)
    read, worker, write = _steps(deadly)
    items = [{"unit": unit} for unit in range(2)]
    with pytest.raises(SvgpipeError, match=r"a Ray worker died .* What was finished is kept"):
        list(run_units(items, read, worker, {}, write, Resources()))


@pytest.mark.slow
def test_without_it_all_units_come_through(ray_session: None) -> None:
    read, worker, write = _steps("nobody")
    found = run_units([{"unit": unit} for unit in range(3)], read, worker, {}, write, Resources())
    assert sorted(row["unit"] for row in found) == [0, 1, 2]
