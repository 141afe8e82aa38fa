"""Distances between two sets of features, and distance to the class means.

Legend: n m rows, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 4096  # rows; a table of distances between two blocks has 64 MB


class FrechetTarget:
    """A Gaussian that sets of features are compared with: |μ1 − μ2|² + tr(C1 + C2 − 2 (C1 C2)^½).

    In float64, with unbiased covariances. (C1 C2)^½ has the eigenvalues of the symmetric (C1^½ C2 C1^½)^½, so there is
    no complex part to drop, and sets smaller than their dimension need no regularisation.
    Source: arXiv 1706.08500, eq. 6.
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        """(D,) and (D,D)."""
        self.mean, self.trace = mean.double(), covariance.double().trace()
        values, vectors = torch.linalg.eigh(covariance.double())
        self.root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T

    @classmethod
    def of(cls, features: Tensor, device: torch.device | None = None) -> FrechetTarget:
        """Of (m,D) rows, computed and kept on `device`.

        Raises:
            ValueError: fewer than two.
        """
        return cls(*_moments(features, device or features.device))

    def distance(self, features: Tensor) -> float:
        """Of (n,D) rows, never below 0.

        Raises:
            ValueError: fewer than two.
        """
        if len(features) <= features.shape[1]:
            return self.distances(features, [torch.arange(len(features))])[0]
        mean, covariance = _moments(features, self.mean.device)
        return self._distance(mean, covariance, torch.linalg.eigvalsh(self.root @ covariance @ self.root))

    def _distance(self, mean: Tensor, covariance: Tensor, values: Tensor) -> float:
        """Of a Gaussian, with the eigenvalues (D,) of C1^½ C2 C1^½."""
        apart, trace = (mean - self.mean).square().sum(), covariance.trace()
        return max(0.0, float(apart + self.trace + trace - 2 * values.clamp_min(0).sqrt().sum()))

    def distances(self, features: Tensor, picks: list[Tensor]) -> list[float]:
        """The same for several choices of few rows, each (k,) row numbers that may repeat.

        Raises:
            ValueError: fewer than two rows.
        """
        if len(features) < 2:
            raise ValueError(f"Fréchet distance: expected at least two rows, found {len(features)}")
        values = features.to(self.mean.device).double()
        turned = values @ self.root  # the covariance of these is C1^½ C2 C1^½
        distances = []
        for pick in picks:
            # A resampled set contains two thirds of the rows: weighting rows by their counts costs less than repeating
            # them.
            rows, counts = pick.unique(return_counts=True)
            weights = (counts.double() / len(pick)).to(values.device)[:, None]
            unbiased = len(pick) / (len(pick) - 1)
            mean, centred = _centred(values[rows], weights)
            apart = (mean - self.mean).square().sum()
            trace = unbiased * centred.square().sum()
            root_trace = unbiased**0.5 * _root_trace(_centred(turned[rows], weights)[1])
            distances.append(max(0.0, float(apart + self.trace + trace - 2 * root_trace)))
        return distances

    def distance_and_influences(self, features: Tensor) -> tuple[float, Tensor]:
        """The distance of (n,D) rows, and the contribution of each of them to it, up to a constant; n must be above D.

        To first order, the distance of a set changes by the mean of these values, (n,) float64, over its rows:
        2 (x − μ2)·(μ2 − μ1) + |x − μ2|² − yᵀ S^-½ y, with y = C1^½ (x − μ2) and S the covariance of y, because the
        derivative of tr S^½ is ½ tr(S^-½ dS). Its gap to a plain bootstrap is a few per cent from n = 4 D on.
        """
        mean, covariance = _moments(features, self.mean.device)
        values, axes = torch.linalg.eigh(self.root @ covariance @ self.root)
        varies = values > len(features) * torch.finfo(torch.float64).eps * values.max()
        to_axes = self.root @ (axes[:, varies] / values[varies] ** 0.25)
        influences = []
        for block in features.split(BLOCK):
            centred = block.to(mean.device).double() - mean
            of_root = (centred @ to_axes).square().sum(1)
            influences.append(2 * centred @ (mean - self.mean) + centred.square().sum(1) - of_root)
        return self._distance(mean, covariance, values), torch.cat(influences)


def _moments(features: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """(D,) mean and (D,D) unbiased covariance of (n,D) rows, float64 on `device`.

    In blocks: in float64 and centred, all of ImageNet would take 40 GB.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(features) < 2:
        raise ValueError(f"Fréchet distance: expected at least two rows, found {len(features)}")
    blocks = features.split(BLOCK)
    mean = torch.stack([block.to(device).double().sum(0) for block in blocks]).sum(0) / len(features)
    scatter = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=device)
    for block in blocks:
        centred = block.to(device).double() - mean
        scatter += centred.T @ centred
    return mean, scatter / (len(features) - 1)


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Between (n,D) and (m,D), see `FrechetTarget`.

    Raises:
        ValueError: a set of fewer than two rows.
    """
    return FrechetTarget.of(second).distance(first)


def _centred(values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(D,) mean of (n,D) rows by (n,1) weights of sum 1, and the (n,D) factor of their biased covariance."""
    mean = (weights * values).sum(0)
    return mean, (values - mean) * weights.sqrt()


def _root_trace(factor: Tensor) -> Tensor:
    """() trace of (AᵀA)^½ of (n,D) A, by whichever Gram matrix is smaller."""
    gram = factor.T @ factor if len(factor) > factor.shape[1] else factor @ factor.T
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().sum()


def kernel_influences(rows: Tensor, places: Tensor, reference: Tensor) -> Tensor:
    """(n,) float64: contribution of each row to the kernel distance to a reference, up to a constant.

    To first order, the distance of a set changes by the mean of these values over its rows:
    2 (E k(x,x') − E k(x,y)), with k(a,b) = (a·b/D + 1)³ as of KID, arXiv 1801.01401. Products are float32, sums
    float64.

    Args:
        rows: (n,D) features.
        places: (m,) rows that represent all as x', m > 1; no row is compared with itself.
        reference: (l,D) y.
    """
    rows, others, reference = rows.float(), rows[places].float(), reference.float()
    influences = []
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        own = places == torch.arange(start, start + len(part))[:, None]
        kernel = _cubic_kernel(part, others).masked_fill(own, 0)
        among = kernel.sum(1, dtype=torch.float64) / (~own).sum(1)
        influences.append(2 * (among - _cubic_kernel(part, reference).mean(1, dtype=torch.float64)))
    return torch.cat(influences)


def _cubic_kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def nearest_class_hits(reference: Tensor, reference_labels: Tensor, features: Tensor, labels: Tensor) -> Tensor | None:
    """(n,) bool: whose nearest class mean of the (m,D) reference is their own class.

    None if the reference has fewer than two classes.
    """
    classes, position = reference_labels.unique(return_inverse=True)
    if len(classes) < 2:
        return None
    sums = torch.zeros(len(classes), reference.shape[1], dtype=reference.dtype).index_add_(0, position, reference)
    means = sums / torch.bincount(position)[:, None]
    return classes[torch.cdist(features, means).argmin(1)] == labels


def nearest_class_accuracy(
    reference: Tensor, reference_labels: Tensor, features: Tensor, labels: Tensor
) -> float | None:
    """Share of `nearest_class_hits`."""
    hits = nearest_class_hits(reference, reference_labels, features, labels)
    return None if hits is None else float(hits.double().mean())
