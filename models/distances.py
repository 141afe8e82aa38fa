"""How far two sets of features are apart, and whether features lie near their class.

Legend: n m rows, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|μ1 − μ2|² + tr(C1 + C2 − 2 (C1 C2)^½) of (n,D) and (m,D), in float64, with unbiased covariances.

    (C1 C2)^½ has the eigenvalues of the symmetric (C1^½ C2 C1^½)^½, so there is no complex part to drop, and sets
    smaller than their dimension need no regularisation. Never below 0.
    Raises ValueError for a set of fewer than two rows.
    Source: arXiv 1706.08500, eq. 6.
    """
    (mean1, covariance1), (mean2, covariance2) = _gaussian(first), _gaussian(second)
    values, vectors = torch.linalg.eigh(covariance1)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance2 @ root).clamp_min(0).sqrt().sum()
    apart = (mean1 - mean2).square().sum()
    return max(0.0, float(apart + covariance1.trace() + covariance2.trace() - 2 * cross))


def _gaussian(features: Tensor) -> tuple[Tensor, Tensor]:
    if len(features) < 2:
        raise ValueError(f"Fréchet distance: expected at least two rows, found {len(features)}")
    values = features.double()
    return values.mean(0), torch.cov(values.T).reshape(values.shape[1], values.shape[1])


def nearest_class_accuracy(
    reference: Tensor, reference_labels: Tensor, features: Tensor, labels: Tensor
) -> float | None:
    """Share of (n,D) rows whose nearest class mean of the (m,D) reference is their own class.

    None if the reference has fewer than two classes.
    """
    classes, position = reference_labels.unique(return_inverse=True)
    if len(classes) < 2:
        return None
    sums = torch.zeros(len(classes), reference.shape[1], dtype=reference.dtype).index_add_(0, position, reference)
    means = sums / torch.bincount(position)[:, None]
    nearest = classes[torch.cdist(features, means).argmin(1)]
    return float((nearest == labels).double().mean())
