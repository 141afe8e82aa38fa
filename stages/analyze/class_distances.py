"""Distances between images of one class and of different classes, and a t-SNE map."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.manifest import FrozenModel

from ..evaluate.intervals import estimate, picks

MIN_MAP = 5


class Distances(FrozenModel):
    """Mean Euclidean distances between pooled, standardised features of one group of channels."""

    group: str
    within: Estimate = Field(description="Two images of one class.")
    between: Estimate = Field(description="Two images of different classes.")
    ratio: Estimate = Field(description="between / within; 1: classes do not matter.")


def class_distances(group: str, features_nD: Tensor, labels_n: Tensor, replicates: int, seed: int) -> Distances:
    """Measure (n,D) rows with (n,) labels.

    Intervals are by resampling images; pairs of an image with itself are excluded.

    Returns:
        Mean distances within and between classes.

    Raises:
        ValueError: no two rows of one class, fewer than two classes, or all rows of a class are equal.
    """
    apart, n = torch.cdist(features_nD.double(), features_nD.double()), len(features_nD)
    within, between = _means(apart, labels_n, torch.arange(n))
    if not (np.isfinite(within) and np.isfinite(between)):
        raise ValueError(f"distances of {group}: expected two classes, and two rows of one class")
    if within == 0:
        raise ValueError(f"distances of {group}: the images of a class are all equal")
    means = [_means(apart, labels_n, pick) for pick in picks(n, replicates, seed)]
    resampled = [pair for pair in means if np.isfinite(pair).all() and pair[0] > 0]
    return Distances(
        group=group,
        within=estimate(within, [w for w, _ in resampled], n),
        between=estimate(between, [b for _, b in resampled], n),
        ratio=estimate(between / within, [b / w for w, b in resampled], n),
    )


def _means(apart: Tensor, labels: Tensor, pick: Tensor) -> tuple[float, float]:
    chosen, y = apart[pick][:, pick], labels[pick]
    other = pick[:, None] != pick
    same = (y[:, None] == y) & other
    different = (y[:, None] != y) & other
    return float(chosen[same].mean()), float(chosen[different].mean())


def tsne(features_nD: Tensor, seed: int) -> NDArray[np.float64] | None:
    """Return the (n,2) t-SNE of (n,D) rows by scikit-learn, on principal components; None below 5 rows or 2 columns."""
    from sklearn.manifold import TSNE

    n = len(features_nD)
    if n < MIN_MAP or features_nD.shape[1] < 2:
        return None
    perplexity = min(30.0, (n - 1) / 3)
    embedding = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=-1).fit_transform(features_nD.numpy())
    return np.asarray(embedding, np.float64)
