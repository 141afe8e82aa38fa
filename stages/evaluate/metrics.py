"""Metrics of a set of images, from its features: FID, KID, Inception Score, accuracy, and those of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.nearest_images import NearestImages
from svgpipe.manifests.selection import evenly_spread
from svgpipe.models.feature_distances import FrechetTarget, kernel_influences, nearest_class_hits

from ..runtime.device import pick_device
from .intervals import estimate, picks, share_estimate
from .neighbour_metrics import NeighbourMetrics

KERNEL_SUBSETS = 50
KERNEL_SUBSET_SIZE = 1000
# KID subsets overlap, so their spread underestimates the error. The interval comes from the contributions of single
# images instead, estimated against at most this many images of each set.
KERNEL_ROWS = 10_000
# With this many images per dimension, the interval of a Fréchet distance comes from contributions of single images too:
# it needs one decomposition of a matrix instead of one per resampling.
FIRST_ORDER = 3
INCEPTION_SPLITS = 10
ADM_SPLIT = 5000  # images
FIDELITY_SEED = 2020  # of torch-fidelity's splits
MIN_TO_SPLIT = 100


@dataclass(frozen=True)
class Features:
    """Features of a set of images."""

    pooled: Tensor  # (n,D) float32
    logits: Tensor | None = None  # (n,K) float32, Inception only
    spatial: Tensor | None = None  # (n,D') float32, Inception only, of sFID
    labels: Tensor | None = None  # (n,) int64, if the images have labels of the reference's classes
    names: Sequence[str] = ()  # (n,) of the images, for messages


@dataclass(frozen=True)
class FrechetMetric:
    """The Fréchet distance of sets to one target, with its interval, computed on a GPU if there is one."""

    target: FrechetTarget
    replicates: int
    seed: int

    @classmethod
    def to_rows(cls, rows: Tensor, replicates: int, seed: int) -> FrechetMetric:
        """Return the distance to (m,D) features of real images."""
        return cls(FrechetTarget.of(rows, pick_device()), replicates, seed)

    def measure(self, rows: Tensor) -> Estimate:
        """Return the distance of (n,D) features. With many images, the interval is to first order, see FIRST_ORDER."""
        resampled = picks(len(rows), self.replicates, self.seed)
        if resampled and len(rows) >= FIRST_ORDER * rows.shape[1]:
            value, influences = self.target.distance_and_influences(rows)
            influences = influences.cpu()
            replicates = [float(influences[pick].mean()) for pick in resampled]
        elif resampled:
            value, *replicates = self.target.distances(rows, [torch.arange(len(rows)), *resampled])
        else:
            value, replicates = self.target.distance(rows), []
        return estimate(value, replicates, len(rows), least=0.0)


@dataclass(frozen=True)
class Comparison:
    """The reference, and the number of bootstrap resamplings (0: no intervals).

    Without features of reference images, only the Fréchet distances to the targets are measured.

    Attributes:
        target: statistics that replace those of the reference images.
        spatial_target: the same of spatial features.
        new: (k,D) features of images that the model has not seen, for near-copies.
        in_order: split images for the Inception Score in their order, as ADM.
    """

    reference: Features | None
    replicates: int
    seed: int
    target: FrechetTarget | None = None
    spatial_target: FrechetTarget | None = None
    new: Tensor | None = None
    in_order: bool = False

    @cached_property
    def _frechet(self) -> FrechetMetric:
        if self.target is not None:
            return FrechetMetric(self.target, self.replicates, self.seed)
        assert self.reference is not None, "the reference is either images or statistics"
        return FrechetMetric.to_rows(self.reference.pooled, self.replicates, self.seed)

    @cached_property
    def _spatial(self) -> FrechetMetric | None:
        if self.spatial_target is not None:
            return FrechetMetric(self.spatial_target, self.replicates, self.seed)
        if self.reference is None or self.reference.spatial is None:
            return None
        return FrechetMetric.to_rows(self.reference.spatial, self.replicates, self.seed)

    @cached_property
    def neighbours(self) -> NeighbourMetrics | None:
        """Return what compares sets with the reference image by image; None: it has no images."""
        real = self.reference
        if real is None:
            return None
        return NeighbourMetrics(real.pooled, real.names, self.new, self.replicates, self.seed)

    def measure(self, features: Features) -> dict[str, Estimate | NearestImages | None]:
        """Return the fields of `Measured`; None if there are too few images, or no logits or labels."""
        by_neighbours = dict.fromkeys(("precision", "recall", "density", "coverage", "nearest"))
        return {
            **(by_neighbours if self.neighbours is None else self.neighbours.measure(features.pooled)),
            "frechet_distance": self.frechet(features.pooled),
            "spatial_distance": self._spatial_distance(features),
            "kernel_distance": self.kernel(features.pooled),
            "inception_score": None if features.logits is None else self.inception(features.logits),
            "class_accuracy": self._class_accuracy(features),
        }

    def frechet(self, pooled: Tensor) -> Estimate:
        """Return the Fréchet distance of (n,D) features to the reference."""
        return self._frechet.measure(pooled)

    def kernel(self, pooled: Tensor) -> Estimate | None:
        """Return the kernel distance of (n,D) features to the reference; interval to first order, see KERNEL_ROWS."""
        if self.reference is None:
            return None
        value = float(kernel_distances(pooled, self.reference.pooled).mean())
        if not self.replicates:
            return estimate(value, [], len(pooled))
        places = torch.tensor(evenly_spread(len(pooled), KERNEL_ROWS))
        influences = kernel_influences(pooled, places, _at_most(self.reference.pooled, KERNEL_ROWS))
        moved = [float(influences[pick].mean()) for pick in picks(len(pooled), self.replicates, self.seed)]
        return estimate(value, moved, len(pooled))

    def inception(self, logits: Tensor) -> Estimate:
        """Return the Inception Score of (n,K) logits."""
        chosen = picks(len(logits), self.replicates, self.seed)
        resampled = inception_scores(logits, chosen, in_order=self.in_order)
        whole = [torch.arange(len(logits))]
        value = inception_scores(logits, whole, in_order=True)[0] if self.in_order else inception_score(logits)
        return estimate(value, resampled, len(logits), least=1.0)

    def _spatial_distance(self, features: Features) -> Estimate | None:
        if features.spatial is None or self._spatial is None:
            return None
        return self._spatial.measure(features.spatial)

    def _class_accuracy(self, features: Features) -> Estimate | None:
        if features.labels is None or self.reference is None or self.reference.labels is None:
            return None
        hits = nearest_class_hits(self.reference.pooled, self.reference.labels, features.pooled, features.labels)
        return None if hits is None else share_estimate(hits, interval=bool(self.replicates))


def _at_most(rows: Tensor, count: int) -> Tensor:
    return rows if len(rows) <= count else rows[evenly_spread(len(rows), count)]


def kernel_distances(first: Tensor, second: Tensor) -> Tensor:
    """Return (subsets,) polynomial MMD² of random subsets of (n,D) and (m,D), by torch-fidelity; mean: KID."""
    size = min(KERNEL_SUBSET_SIZE, len(first), len(second))
    values = []
    for subset in range(KERNEL_SUBSETS):
        # Drawn as in torch-fidelity, but here, so that only these rows are float64: a reference may be all of ImageNet.
        rng = np.random.RandomState(subset)
        one, two = (rows[rng.choice(len(rows), size, replace=False)].double() for rows in (first, second))
        metric = kid_features_to_metric(one, two, kid_subsets=1, kid_subset_size=size, rng_seed=0, verbose=False)
        values.append(metric[KEY_METRIC_KID_MEAN])
    return torch.from_numpy(np.asarray(values, np.float64))


def inception_score(logits: Tensor) -> float:
    """Return exp(mean KL(p(y|x) ‖ p(y))), mean over ten splits, by torch-fidelity; below 100 images: one split.

    A split with one image scores 1.
    """
    return float(isc_features_to_metric(logits, splits=_splits(logits))[KEY_METRIC_ISC_MEAN])


def _splits(logits: Tensor) -> int:
    return INCEPTION_SPLITS if len(logits) >= MIN_TO_SPLIT else 1


def inception_scores(logits: Tensor, chosen: Sequence[Tensor], *, in_order: bool = False) -> list[float]:
    """Return `inception_score` of several choices of rows, each (n,) row numbers of (n,K) logits that may repeat.

    A split's mean KL is the mean of Σ p log p over its rows, minus Σ q log q of its mean q. So one product with the
    counts of the rows gives all splits of a choice, instead of a softmax of every choice. `in_order`: ADM's score, the
    mean over splits of 5,000 rows in their order. Source: guided-diffusion evaluations/evaluator.py.
    """
    if not chosen:
        return []
    count, splits = len(logits), _splits(logits)
    if in_order:
        splits = -(-count // ADM_SPLIT)
        order, split_of = torch.arange(count), torch.arange(count) // ADM_SPLIT
    else:  # rows are shuffled as in torch-fidelity, then split
        order = torch.from_numpy(np.random.RandomState(FIDELITY_SEED).permutation(count))
        split_of = (torch.arange(1, count + 1) * splits - 1).div(count, rounding_mode="floor")
    p = logits.double().softmax(1)
    negative_entropy = torch.special.entr(p).sum(1).neg()
    p, scores = p.float(), []
    for pick in chosen:
        counts = torch.zeros(splits, count)
        counts.index_put_((split_of, pick[order]), torch.ones(count), accumulate=True)
        sizes = counts.sum(1, keepdim=True)
        mean = (counts @ p / sizes).double()
        divergence = (counts.double() @ negative_entropy) / sizes[:, 0] + torch.special.entr(mean).sum(1)
        scores.append(float(divergence.exp().mean()))
    return scores
