"""Spatially averaged features of a cache, and its groups of channels."""

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
# A channel with less variation is not rescaled: it would dominate the other channels.
MIN_SPREAD = 1e-6
BOTH = "both"


def channel_groups(cache: FeatureCache) -> dict[str, slice]:
    """Return the slices of the groups of channels; if there are several, also of both together."""
    groups = cache.manifest.channel_groups
    return groups | ({BOTH: slice(0, cache.manifest.latent_shape[-1])} if len(groups) > 1 else {})


def pooled(cache: FeatureCache, rows: Sequence[int], progress: Progress | None = None) -> NDArray[np.float32]:
    """Return (n,C) means over the grid, denormalised, so that caches with other statistics are comparable.

    Raises:
        ArtifactError: a shard is missing or damaged.
    """
    progress = progress or Silent()
    progress.begin("read", len(rows), "images")
    blocks = [rows[start : start + BLOCK_ROWS] for start in range(0, len(rows), BLOCK_ROWS)]
    means: list[NDArray[np.float32]] = []
    with ThreadPoolExecutor(READERS) as readers:
        for part in readers.map(lambda block: cache.read_latents(block).mean(axis=(1, 2), dtype=np.float32), blocks):
            means.append(part)
            progress.advance(len(part))
    return (
        cache.denormalize(np.concatenate(means))
        if means
        else np.zeros((0, cache.manifest.latent_shape[-1]), np.float32)
    )


def spread(features_nD: Tensor) -> Tensor:
    """Return (D,) standard deviations to divide (n,D) rows by; 1 for constant columns."""
    std = features_nD.std(0)
    return std.where(std > MIN_SPREAD, 1.0)
