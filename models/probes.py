"""Classifiers on fixed features: a linear map, or nearest neighbours.

Legend: n m rows, D dimensions, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 8192
STEPS = 200
KNN_TEMPERATURE = 0.07
CELLS = 2**27  # maximum size of a table of similarities in memory: half a gigabyte


def fit_linear(features_nD: Tensor, labels_n: Tensor, num_classes: int, decay: float) -> nn.Linear:
    """Fit a softmax regression with minimal mean cross-entropy + decay/2 |W|², by L-BFGS from zero.

    The problem is convex, so the result depends on neither a seed nor a learning rate. Rows are processed in blocks,
    because the logits of ImageNet would not fit into memory.

    Args:
        features_nD: float32, preferably standardised, on the device that computes.
        labels_n: int64 below `num_classes`.
        num_classes: number of classes.
        decay: weight decay; the bias has none.
    """
    linear = nn.Linear(features_nD.shape[1], num_classes, device=features_nD.device)
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    optimizer = torch.optim.LBFGS(
        linear.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe", tolerance_grad=1e-6, tolerance_change=1e-9
    )

    def loss() -> float:
        optimizer.zero_grad()
        penalty = 0.5 * decay * linear.weight.square().sum()
        penalty.backward()
        total = penalty.item()
        for x, y in zip(features_nD.split(BLOCK), labels_n.split(BLOCK), strict=True):
            part = F.cross_entropy(linear(x), y, reduction="sum") / len(features_nD)
            part.backward()
            total += part.item()
        return total

    optimizer.step(loss)
    return linear.requires_grad_(False)


def knn_votes(
    reference_mD: Tensor, reference_labels_m: Tensor, features_nD: Tensor, num_classes: int, neighbours: int
) -> Tensor:
    """Return (n,K) votes of the nearest reference rows by cosine, each with weight exp(cosine / 0.07).

    Source: DINO's evaluation, arXiv 2104.14294, appendix; the weights are those of arXiv 1805.01978.
    """
    normed = F.normalize(reference_mD, dim=1)
    votes = []
    for block in F.normalize(features_nD, dim=1).split(max(1, min(1024, CELLS // len(normed)))):
        near = (block @ normed.T).topk(min(neighbours, len(normed)), dim=1)
        weights = ((near.values - near.values[:, :1]) / KNN_TEMPERATURE).exp()  # scaled so that the largest is 1
        count = torch.zeros(len(block), num_classes, device=block.device)
        votes.append(count.scatter_add_(1, reference_labels_m[near.indices], weights))
    return torch.cat(votes)
