"""Mean-pooled features of a cache, and its groups of channels: what probes and plots look at."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache

from ..runtime.progress import Progress, Silent

BLOCK_ROWS = 128
READERS = 3
# A channel that does not vary is left as it is: divided by next to nothing, it would be all that other rows show.
MIN_SPREAD = 1e-6
BACKBONE, RESIDUAL, BOTH = "backbone", "residual", "both"


def channel_groups(cache: FeatureCache) -> dict[str, slice]:
    """Backbone, residual and both; of a cache without a residual, the backbone alone."""
    frozen, channels = cache.manifest.frozen_channels, cache.shape[-1]
    if frozen == channels:
        return {BACKBONE: slice(0, frozen)}
    return {BACKBONE: slice(0, frozen), RESIDUAL: slice(frozen, channels), BOTH: slice(0, channels)}


def pooled(cache: FeatureCache, rows: Sequence[int], progress: Progress | None = None) -> NDArray[np.float32]:
    """(n,C) means over the grid, denormalised, so that caches of other statistics compare; read by several threads.

    Raises:
        ArtifactError: a shard that is missing or damaged.
    """
    progress = progress or Silent()
    progress.begin("read", len(rows))
    blocks = [rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS)]
    means: list[NDArray[np.float32]] = []
    with ThreadPoolExecutor(READERS) as readers:
        for part in readers.map(lambda block: cache.read(block).mean(axis=(1, 2), dtype=np.float32), blocks):
            means.append(part)
            progress.advance(len(part))
    return cache.denormalize(np.concatenate(means)) if means else np.zeros((0, cache.shape[-1]), np.float32)


def spread(features_nD: Tensor) -> Tensor:
    """(D,) standard deviations to divide (n,D) rows by; 1 for what does not vary."""
    std = features_nD.std(0)
    return std.where(std > MIN_SPREAD, 1.0)
