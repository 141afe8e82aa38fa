"""Rectified flow: time runs from noise (0) to data (1).

Legend: B batch, T tokens, C channels; z0 noise, x1 data, z_t = (1-t) z0 + t x1, target x1 - z0.
Source: official rectified_flow/rectified_flow.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B,T,C) latents, (B,) times, (B,) labels → (B,T,C)."""


def shift_time(u: Tensor, shift: float) -> Tensor:
    """t = s u / (1 + (s-1) u): times in [0,1], ends fixed; s < 1 moves them towards noise.

    s = 1 is the identity, and so is s <= 0, as in the official code.
    Source: official sample_t; arXiv 2403.03206, eq. 23 with time reversed.
    """
    return u if shift <= 0 else shift * u / (1 + (shift - 1) * u)


@dataclass(frozen=True)
class FlowLoss:
    """Loss of one batch: its mean and the per-sample mean squared errors (B,)."""

    mean: Tensor
    per_sample: Tensor


def flow_loss(velocity: Velocity, x1_BTC: Tensor, z0_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> FlowLoss:
    """Mean squared error of the predicted velocity against x1 - z0, in float32, unweighted.

    Args:
        velocity: the model.
        x1_BTC: data latents.
        z0_BTC: standard normal noise of the same shape.
        t_B: times in [0,1], already shifted.
        y_B: labels after label dropout.
    """
    t_B11 = t_B[:, None, None]
    predicted = velocity((1 - t_B11) * z0_BTC + t_B11 * x1_BTC, t_B, y_B)
    per_sample = (predicted.float() - (x1_BTC - z0_BTC)).square().flatten(1).mean(dim=1)
    return FlowLoss(per_sample.mean(), per_sample)


def drop_labels(y_B: Tensor, u_B: Tensor, probability: float, null_label: int) -> Tensor:
    """Replace each label by the null label where its uniform draw is below `probability`."""
    return torch.where(u_B < probability, torch.full_like(y_B, null_label), y_B)
