"""Which rows are trained on at which step: a pure function of (seed, step), with no state to save.

The stream is one permutation of all rows after the other, without a gap: nothing is dropped at an epoch's end,
and a batch may span two epochs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..runtime.device import seed_of


@dataclass(frozen=True)
class Batch:
    """Rows of one step: positions among the training rows, and the view of each."""

    rows: NDArray[np.int64]
    views: NDArray[np.int64]


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_rows: int, num_views: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    rng = np.random.Generator(np.random.Philox(seed_of(seed, "epoch", epoch)))
    return rng.permutation(num_rows), rng.integers(num_views, size=num_rows)


def batch_at(step: int, *, seed: int, batch_size: int, num_rows: int, num_views: int) -> Batch:
    """Rows of step `step` (from 0), each in range(num_rows), with a view in range(num_views).

    Every row occurs once in every `num_rows` consecutive positions that begin an epoch.
    Raises ValueError if there are no rows.
    """
    if num_rows < 1:
        raise ValueError(f"expected at least one row to train on, found {num_rows}")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows, views = np.empty_like(positions), np.empty_like(positions)
    epochs, offsets = np.divmod(positions, num_rows)
    for epoch in np.unique(epochs):
        here = epochs == epoch
        order, view_of = _epoch(seed, int(epoch), num_rows, num_views)
        rows[here], views[here] = order[offsets[here]], view_of[offsets[here]]
    return Batch(rows, views)
