"""Training batches from a cache, read ahead of the steps."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.local_copy import LocalCopy

from ..runtime.retry import call_with_retries
from .alignment_target import AlignmentTarget
from .order import Blocks, batch_at, files_ahead


class CacheBatch(NamedTuple):
    """This process's slice of a batch, as stored: float16 or int8.

    Attributes:
        tokens: (B,T,C) latents.
        labels: (B,) int64.
        features: (B,N,Z) features to align with, if there is a target.
    """

    tokens: Tensor
    labels: Tensor
    features: Tensor | None = None


class CacheBatches:
    """This process's slice of every batch, read ahead by threads."""

    def __init__(
        self,
        cache: FeatureCache,
        rows: NDArray[np.int64],
        config: DiffusionSection,
        start: int,
        local_slice: range,
        say: Callable[[str], None] = lambda text: None,
        copy: LocalCopy | None = None,
        target: AlignmentTarget | None = None,
        target_copy: LocalCopy | None = None,
    ) -> None:
        """Prepare batches from step `start` on.

        Args:
            cache: finished cache.
            rows: cache rows to train on.
            config: section `diffusion` of a recipe.
            start: first step.
            local_slice: places of this process in the batch.
            say: receives messages about retries.
            copy: local copy of the cache's files; None: rows are read from the cache.
            target: features to align with; of another cache, they are read at the same time.
            target_copy: local copy of that cache's files.
        """
        self.cache, self.rows, self.config, self.target = cache, rows, config, target
        self.local_slice, self.say, self.copy, self.target_copy = np.asarray(local_slice), say, copy, target_copy
        self.num_views = len(cache.views) if config.use_flips else 1
        self.start = start
        self.blocks, self._files = blocks_of(cache, rows, config), files_of(cache, rows)
        # Requests to an object store take long, and many run at once: several batches are read concurrently.
        self.readers = 1 if isinstance(cache.path, Path) else config.read_ahead

    def __iter__(self) -> Iterator[CacheBatch]:
        ahead: deque[tuple[int, Future[CacheBatch]]] = deque()
        reader = ThreadPoolExecutor(self.readers, thread_name_prefix="svgpipe-read")
        try:
            for step in itertools.count(self.start):
                ahead.append((step, reader.submit(self._read, step)))
                if len(ahead) >= self.config.read_ahead:
                    yield self._result(*ahead.popleft())
        finally:
            reader.shutdown(cancel_futures=True)

    def _result(self, step: int, reading: Future[CacheBatch]) -> CacheBatch:
        """Return what the thread has read; it is read again if that failed."""
        calls = iter([reading.result])
        return call_with_retries(lambda: next(calls, partial(self._read, step))(), self.say)

    def _read(self, step: int) -> CacheBatch:
        where = {
            "seed": self.config.seed,
            "batch_size": self.config.batch_size,
            "num_rows": len(self.rows),
            "num_views": self.num_views,
        }
        batch = batch_at(step, blocks=self.blocks, **where)
        rows, views = self.rows[batch.rows[self.local_slice]], batch.views[self.local_slice]
        for copy in (self.copy, self.target_copy):
            if copy is not None:
                copy.keep(self._files if self.blocks is None else files_ahead(step, blocks=self.blocks, **where))
        tokens = torch.from_numpy((self.copy or self.cache).read_stored(rows, views)).flatten(1, 2)
        labels = torch.from_numpy(self.cache.labels[rows].astype(np.int64))
        return CacheBatch(tokens, labels, self._features(tokens, rows, views))

    def _features(self, tokens: Tensor, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Tensor | None:
        if self.target is None:
            return None
        if not self.target.own:
            names = np.asarray(self.cache.views)[views]  # the other cache may hold its views in another order
            there = np.asarray([self.target.cache.views.index(name) for name in names])
            stored = (self.target_copy or self.target.cache).read_stored(rows, there)
            tokens = torch.from_numpy(stored).flatten(1, 2)
        return tokens[..., self.target.group].contiguous()


def files_of(cache: FeatureCache, rows: NDArray[np.int64]) -> list[int]:
    """Return the files of a cache that hold some of the rows."""
    return np.unique(rows // cache.store.spec.unit_rows).tolist()


def blocks_of(cache: FeatureCache, rows: NDArray[np.int64], config: DiffusionSection) -> Blocks | None:
    """Return the blocks that rows are shuffled in; None: all rows are shuffled."""
    if config.shuffle_files is None:
        return None
    return Blocks(rows // cache.store.spec.unit_rows, config.shuffle_files)
