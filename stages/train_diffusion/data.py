"""Training batches from a cache, read ahead of the steps."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.models.seeds import seed_of

from ..runtime.retry import call_with_retries


class CacheBatches:
    """This process's slice of every batch, read ahead by a thread: tokens (B,T,C) as stored, and labels (B,)."""

    def __init__(
        self,
        cache: FeatureCache,
        rows: NDArray[np.int64],
        config: DiffusionSection,
        start: int,
        local_slice: range,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Prepare batches from step `start` on.

        Args:
            cache: finished cache.
            rows: cache rows to train on.
            config: section `diffusion` of a recipe.
            start: first step.
            local_slice: places of this process in the batch.
            say: receives messages about retries.
        """
        self.cache, self.rows, self.config, self.local_slice, self.say = (
            cache,
            rows,
            config,
            np.asarray(local_slice),
            say,
        )
        self.num_views = len(cache.views) if config.use_flips else 1
        self.start = start

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        ahead: deque[tuple[int, Future[tuple[Tensor, Tensor]]]] = deque()
        reader = ThreadPoolExecutor(1, thread_name_prefix="svgpipe-read")
        try:
            for step in itertools.count(self.start):
                ahead.append((step, reader.submit(self._read, step)))
                if len(ahead) >= self.config.read_ahead:
                    yield self._result(*ahead.popleft())
        finally:
            reader.shutdown(cancel_futures=True)

    def _result(self, step: int, reading: Future[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return what the thread has read; it is read again if that failed."""
        calls = iter([reading.result])
        return call_with_retries(lambda: next(calls, partial(self._read, step))(), self.say)

    def _read(self, step: int) -> tuple[Tensor, Tensor]:
        config = self.config
        batch = batch_at(
            step,
            seed=config.seed,
            batch_size=config.batch_size,
            num_rows=len(self.rows),
            num_views=self.num_views,
        )
        rows, views = self.rows[batch.rows[self.local_slice]], batch.views[self.local_slice]
        features = torch.from_numpy(self.cache.read_stored(rows, views)).flatten(1, 2)
        return features, torch.from_numpy(self.cache.labels[rows].astype(np.int64))


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
        here = epochs == epoch
        order, view_of = _epoch(seed, int(epoch), num_rows, num_views)
        rows[here], views[here] = order[offsets[here]], view_of[offsets[here]]
    return Batch(rows, views)
