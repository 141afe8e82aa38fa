"""Detects NaN and infinity without making a step wait for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svgpipe.manifests.errors import DivergedError
from svgpipe.manifests.filesystem import Location

LOSSES_KEPT, NAMED = 5, 3


@dataclass(frozen=True)
class _Watched:
    step: int
    values: Tensor  # (1 + parameters,) on the CPU: loss, gradient norms
    arrived: torch.cuda.Event | None


class DivergenceGuard:
    """Watches the loss and the gradient norm of every parameter.

    On the CPU a step is checked before it is applied. On CUDA the values are copied asynchronously and checked in the
    next call of `watch`. One bad update may therefore be applied, but `settle` checks all values before anything is
    saved.
    """

    def __init__(
        self, names: Sequence[str], last_good: Callable[[], Location | None], *, what: str = "the loss"
    ) -> None:
        """Watch `what`, and parameters with `names`, in the order of the norms.

        `last_good` returns the last checkpoint.
        """
        self.names, self.last_good, self.what = list(names), last_good, what
        self._finite: deque[tuple[int, float]] = deque(maxlen=LOSSES_KEPT)
        self._pending: _Watched | None = None

    def watch(self, step: int, loss: Tensor, norms: Tensor) -> None:
        """Take the () loss and the (parameters,) gradient norms of `step`, counted from 1.

        Raises:
            DivergedError: this step's values, or on CUDA the last one's, are not finite.
        """
        values = torch.cat([loss.detach().reshape(1).float(), norms.detach().float()])
        self.settle()
        if values.device.type != "cuda":
            self._pending = _Watched(step, values, None)
            self.settle()
            return
        landing = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
        landing.copy_(values, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending = _Watched(step, landing, arrived)

    def settle(self) -> None:
        """Check all pending values.

        Raises:
            DivergedError: a value is not finite.
        """
        watched, self._pending = self._pending, None
        if watched is None:
            return
        if watched.arrived is not None:
            watched.arrived.synchronize()
        finite = torch.isfinite(watched.values).tolist()
        loss = float(watched.values[0])
        if all(finite):
            self._finite.append((watched.step, loss))
            return
        bad = [name for name, good in zip(self.names, finite[1:], strict=True) if not good]
        raise DivergedError(
            f"training diverged at step {watched.step}: {self.what} is {loss:.4g}{self._gradients(bad)}. "
            f"{self._history()}{self._saved()} Lower the learning rate, clip gradients, or train in float32, "
            "in a new --out."
        )

    def _gradients(self, bad: list[str]) -> str:
        if not bad:
            return ""
        more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        names = ", ".join(bad[:NAMED]) + more
        return f", and {len(bad)} of {len(self.names)} parameters have no finite gradient: {names}"

    def _history(self) -> str:
        if not self._finite:
            return "No step before it was finite. "
        return "The last finite losses: " + ", ".join(f"{loss:.4g} (step {step})" for step, loss in self._finite) + ". "

    def _saved(self) -> str:
        newest = self.last_good()
        return "There is no checkpoint yet." if newest is None else f"The last good checkpoint is {newest}."
