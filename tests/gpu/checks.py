"""A check: a measured value, its limit, and whether it holds."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Setup:
    """What the suite runs on, and whether sizes are small, for a trial on a CPU."""

    device: torch.device
    small: bool

    def finish(self) -> None:
        """Wait for the device: on a GPU, work ends later than its call."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Check:
    """One line of the table. Without a limit, it is a figure that cannot fail."""

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def holds(self) -> bool:
        low = self.at_least is None or self.value >= self.at_least
        high = self.at_most is None or self.value <= self.at_most
        return low and high and self.value == self.value  # NaN never holds

    def __str__(self) -> str:
        bound = "" if self.at_most is None else f"at most {self.at_most:g}"
        bound = bound if self.at_least is None else f"at least {self.at_least:g}"
        state = "" if not bound else "ok" if self.holds else "FAILED"
        return f"{self.name:58}{self.value:12.4g} {self.unit:12}{bound:16}{state}"


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |found - expected| / |expected|."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def seconds_per_call(setup: Setup, function: object, calls: int, warm_up: int = 2) -> float:
    """Return the mean wall time of `function()`, which may return before the device is done."""
    assert callable(function)
    for _ in range(warm_up):
        function()
    setup.finish()
    started = time.perf_counter()
    for _ in range(calls):
        function()
    setup.finish()
    return (time.perf_counter() - started) / calls
