"""The order of training rows. It depends on seed and step alone, so a resume and any number of workers repeat it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from svgpipe.models.seeds import seed_of

COUNTED_BATCHES = 256


@dataclass(frozen=True)
class Batch:
    """Rows of one step: positions among the training rows, and the view of each."""

    rows: NDArray[np.int64]
    views: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Blocks:
    """Shuffle within blocks: in every epoch, `size` files of the cache at a time, in random order.

    A local copy then needs only the files of two blocks. Rows of one file meet in a batch more often than if all rows
    were shuffled, see `pairs_in_one_file`.
    """

    units: NDArray[np.int64]  # (n,) file of every training row, ascending
    size: int

    @cached_property
    def _groups(self) -> list[NDArray[np.int64]]:
        """Positions of the rows of each file."""
        return np.split(np.arange(len(self.units)), np.flatnonzero(np.diff(self.units)) + 1)

    def shuffled(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], list[tuple[int, NDArray[np.int64]]]]:
        """Return a permutation of all positions, and for each block its first place and its files."""
        files = rng.permutation(len(self._groups))
        order, blocks, start = [], [], 0
        for first in range(0, len(files), self.size):
            chosen = files[first : first + self.size]
            rows = rng.permutation(np.concatenate([self._groups[file] for file in chosen]))
            blocks.append((start, self.units[[self._groups[file][0] for file in chosen]]))
            order.append(rows)
            start += len(rows)
        return np.concatenate(order), blocks


@dataclass(frozen=True)
class _Epoch:
    order: NDArray[np.int64]  # positions among the training rows
    views: NDArray[np.int64]  # of every position
    blocks: list[tuple[int, NDArray[np.int64]]]


@functools.lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, num_rows: int, num_views: int, blocks: Blocks | None) -> _Epoch:
    rng = np.random.Generator(np.random.Philox(seed_of(seed, "epoch", epoch)))
    order, files = (rng.permutation(num_rows), []) if blocks is None else blocks.shuffled(rng)
    return _Epoch(order, rng.integers(num_views, size=num_rows), files)


def batch_at(
    step: int, *, seed: int, batch_size: int, num_rows: int, num_views: int, blocks: Blocks | None = None
) -> Batch:
    """Return the rows of step `step` (from 0), each in range(num_rows), with a view in range(num_views).

    Every row occurs once in every epoch of `num_rows` consecutive positions.

    Raises:
        ValueError: there are no rows.
    """
    if num_rows < 1:
        raise ValueError(f"expected at least one row to train on, found {num_rows}")
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    rows, views = np.empty_like(positions), np.empty_like(positions)
    epochs, offsets = np.divmod(positions, num_rows)
    for epoch in np.unique(epochs):
        here, shuffled = epochs == epoch, _epoch(seed, int(epoch), num_rows, num_views, blocks)
        rows[here], views[here] = shuffled.order[offsets[here]], shuffled.views[offsets[here]]
    return Batch(rows, views)


def files_ahead(
    step: int, *, seed: int, batch_size: int, num_rows: int, num_views: int, blocks: Blocks
) -> tuple[int, ...]:
    """Return the files of the block in which step `step` begins, then those of the next block."""
    epoch, offset = divmod(step * batch_size, num_rows)
    here = _epoch(seed, epoch, num_rows, num_views, blocks).blocks
    number = int(np.searchsorted([start for start, _ in here], offset, side="right")) - 1
    following = here[number + 1 :] or _epoch(seed, epoch + 1, num_rows, num_views, blocks).blocks
    return tuple(dict.fromkeys([*here[number][1].tolist(), *following[0][1].tolist()]))


def pairs_in_one_file(
    files: NDArray[np.int64], *, seed: int, batch_size: int, num_views: int, blocks: Blocks | None
) -> float:
    """Return the fraction of pairs of rows of a batch that lie in one file, over the first batches of an epoch.

    Args:
        files: (n,) file of every training row.
        seed: of the order.
        batch_size: rows per batch.
        num_views: of the cache.
        blocks: that are shuffled; None: all rows are shuffled.
    """
    where = {"seed": seed, "batch_size": batch_size, "num_rows": len(files), "num_views": num_views}
    counted = range(min(COUNTED_BATCHES, -(-len(files) // batch_size)))
    same = [np.unique(files[batch_at(step, blocks=blocks, **where).rows], return_counts=True)[1] for step in counted]
    pairs = batch_size * (batch_size - 1) / 2
    return float(np.mean([(counts * (counts - 1) / 2).sum() for counts in same])) / max(1.0, pairs)
