"""Heads that predict a label map from a grid of features, their losses and their measures.

Legend: B images, C channels, h w the grid, K outputs per cell, S labels per side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UPSAMPLED = 4  # DINOv2's heads predict at four times the resolution of the grid
BIN_OFFSET = 0.1  # added to every bin, so that no image has all bins empty
LOG_OFFSET, MEAN_WEIGHT = 1e-3, 0.15


class LinearHead(nn.Conv2d):
    """A linear map per grid cell, bilinearly upsampled: (B,C,h,w) → (B,K,4h,4w).

    The features are normalised, so the batch norm of DINOv2's linear head has nothing to do.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__(channels, outputs, 1)
        nn.init.normal_(self.weight, std=0.01)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return upsample(super().forward(features), UPSAMPLED * features.shape[2], UPSAMPLED * features.shape[3])


class PyramidHead(nn.Module):
    """Convolutions at 1, 2 and 4 times the resolution of the grid: (B,C,h,w) → (B,K,4h,4w), as a small FPN."""

    def __init__(self, channels: int, outputs: int, width: int) -> None:
        super().__init__()
        self.lateral = nn.Conv2d(channels, width, 1)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(1, width), nn.ReLU()) for _ in range(3)
        )
        self.last = nn.Conv2d(width, outputs, 1)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        x = self.lateral(features)
        for level, convolve in enumerate(self.levels):
            x = convolve(upsample(x, 2**level * features.shape[2], 2**level * features.shape[3]))
        predicted: Tensor = self.last(x)
        return predicted


def upsample(values: Tensor, rows: int, columns: int) -> Tensor:
    """(B,K,h,w) → (B,K,rows,columns), bilinear."""
    return F.interpolate(values, (rows, columns), mode="bilinear", align_corners=False)


def depth_of_bins(logits_BKhw: Tensor, min_depth: float, max_depth: float) -> Tensor:
    """(B,1,h,w) depths: the mean of K equally spaced depths, weighted by max(logit, 0) + 0.1.

    Source: DINOv2's depth head with linear normalisation, after AdaBins (arXiv 2011.14141).
    """
    weights = logits_BKhw.relu() + BIN_OFFSET
    bins_K = torch.linspace(min_depth, max_depth, logits_BKhw.shape[1], device=logits_BKhw.device)
    return torch.einsum("bkhw,k->bhw", weights / weights.sum(1, keepdim=True), bins_K)[:, None]


def depth_loss(predicted: Tensor, true: Tensor) -> Tensor:
    """Scale-invariant loss of depths of one shape; NaN in `true` is unknown. 0 if nothing is known.

    sqrt(var g + 0.15 (mean g)²), g = log(predicted + 0.001) − log(true + 0.001).
    Source: DINOv2's SigLoss, after AdaBins (arXiv 2011.14141, eq. 5).
    """
    known = true.isfinite()
    if int(known.sum()) < 2:
        return predicted.sum() * 0
    g = (predicted[known] + LOG_OFFSET).log() - (true[known] + LOG_OFFSET).log()
    return (g.var() + MEAN_WEIGHT * g.mean().square()).clamp_min(1e-12).sqrt()


def overlaps(predicted: Tensor, true: Tensor, classes: int) -> Tensor:
    """(n,3,K) intersections, unions and cells of `true`, int64, of (n,S,S) class indexes.

    Cells of `true` with others than 0..K−1 are not counted. Summed over images, intersections over unions are the IoU.
    """
    known = (true >= 0) & (true < classes)
    image = torch.arange(len(true), device=true.device)[:, None, None].expand_as(true)[known]
    found, wanted = predicted[known], true[known]

    def count(where: Tensor, labels: Tensor) -> Tensor:
        return torch.bincount(where * classes + labels, minlength=len(true) * classes).reshape(len(true), classes)

    hit = found == wanted
    both, cells = count(image[hit], wanted[hit]), count(image, wanted)
    return torch.stack([both, count(image, found) + cells - both, cells], dim=1)


def depth_errors(predicted: Tensor, true: Tensor) -> Tensor:
    """(n,3) per image over its known depths: RMSE, mean relative error, share within a factor of 1.25.

    Both (n,S,S); NaN in `true` is unknown. An image without a known depth has NaN.
    """
    known = true.isfinite()
    error, ratio = predicted - true, torch.maximum(predicted / true, true / predicted)
    per_pixel = torch.stack([error.square(), error.abs() / true, (ratio < 1.25).to(true.dtype)], dim=-1)
    means = per_pixel.where(known[..., None], 0.0).sum((1, 2)) / known.sum((1, 2))[:, None]
    return torch.cat([means[:, :1].sqrt(), means[:, 1:]], dim=1)
