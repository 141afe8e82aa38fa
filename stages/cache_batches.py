"""Training batches out of a cache, several reads ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.manifests.store import PendingRead
from svgpipe.stages.batches import batch_at


class CacheBatches:
    """One process's share of every batch, several reads in flight: tokens (B,T,C) as stored and labels (B,)."""

    def __init__(
        self, cache: FeatureCache, rows: NDArray[np.int64], config: DiffusionSection, start: int, share: range
    ) -> None:
        """`rows` are the cache rows to train on; `start` is the first step; `share` are places in the batch."""
        self.cache, self.rows, self.config, self.share = cache, rows, config, np.asarray(share)
        self.num_views = len(cache.views) if config.use_flips else 1
        self.next_step = start
        self.in_flight: deque[tuple[NDArray[np.int64], PendingRead]] = deque()

    def _request(self) -> None:
        config = self.config
        batch = batch_at(
            self.next_step,
            seed=config.seed,
            batch_size=config.batch_size,
            num_rows=len(self.rows),
            num_views=self.num_views,
        )
        rows = self.rows[batch.rows[self.share]]
        self.in_flight.append((rows, self.cache.read_async(rows, batch.views[self.share])))
        self.next_step += 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            while len(self.in_flight) < self.config.read_ahead:
                self._request()
            rows, pending = self.in_flight.popleft()
            features = pending.stored()
            labels = torch.from_numpy(self.cache.labels[rows].astype(np.int64))
            yield torch.from_numpy(features).flatten(1, 2), labels
