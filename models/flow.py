"""Rectified flow: time runs from noise (0) to data (1).

Legend: B batch, T tokens, C channels; z0 noise, x1 data, z_t = (1-t) z0 + t x1, target x1 - z0.
Source: official rectified_flow/rectified_flow.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B,T,C) latents, (B,) times, (B,) labels → (B,T,C)."""


FROM_DIMENSION: Literal["from-dimension"] = "from-dimension"
MIN_LEFT = 0.05  # of the time to the data, where a model predicts data; JiT's t_eps
BASE_DIMENSION = 4096  # values of a latent that needs no shift


def shift_of(shift: float | Literal["from-dimension"], cells: int, channels: int) -> float:
    """Return a time shift as it is, or `from-dimension` as a number: sqrt(4096 / (cells · channels)).

    A latent with more values needs more noise to lose as much of its content, so times move towards the noise.
    Source: arXiv 2510.11690 (RAE); its time runs the other way, so its shift is the inverse.
    """
    return math.sqrt(BASE_DIMENSION / (cells * channels)) if shift == FROM_DIMENSION else shift


def shift_time(u: Tensor, shift: float) -> Tensor:
    """t = s u / (1 + (s-1) u): times in [0,1], ends fixed; s < 1 moves them towards noise.

    s = 1 is the identity, and so is s <= 0, as in the official code.
    Source: official sample_t; arXiv 2403.03206, eq. 23 with time reversed.
    """
    return u if shift <= 0 else shift * u / (1 + (shift - 1) * u)


def logit_normal(u: Tensor) -> Tensor:
    """Uniform values in [0,1) → times in [0,1] whose logit is standard normal: sigmoid(Φ⁻¹(u)).

    Source: arXiv 2403.03206, section 3.1; LightningDiT samples the normal value itself.
    """
    return torch.special.ndtri(u).sigmoid()


def velocity_of_data(data_BTC: Tensor, z_BTC: Tensor, t_B: Tensor) -> Tensor:
    """Return the velocity (B,T,C) float32 from z at time t towards predicted data: (data - z) / (1 - t).

    At most `1 / MIN_LEFT` of the way per unit of time: near the data, errors of the prediction would become infinite.
    Source: arXiv 2511.13720 (JiT).
    """
    left_B11 = (1 - t_B.float()).clamp_min(MIN_LEFT)[:, None, None]
    return (data_BTC.float() - z_BTC.float()) / left_B11


@dataclass(frozen=True)
class FlowLoss:
    """Loss of one batch: per-sample mean squared errors (B,), and cosine losses (B,), which are 0 if not asked for."""

    per_sample: Tensor
    cosine: Tensor

    @property
    def mean(self) -> Tensor:
        """() the loss to minimise."""
        return (self.per_sample + self.cosine).mean()


def flow_loss(
    velocity: Velocity,
    x1_BTC: Tensor,
    z0_BTC: Tensor,
    t_B: Tensor,
    y_B: Tensor,
    *,
    cosine: bool = False,
    of_data: bool = False,
) -> FlowLoss:
    """Mean squared error of the predicted velocity against x1 - z0, in float32, unweighted.

    With `cosine`, also 1 - cosine of both over the channels, averaged over the tokens (LightningDiT).

    Args:
        velocity: the model.
        x1_BTC: data latents.
        z0_BTC: standard normal noise of the same shape.
        t_B: times in [0,1], already shifted.
        y_B: labels after label dropout.
        cosine: also compute the cosine loss.
        of_data: the model predicts data: the velocities of prediction and target are bounded near the data alike.
    """
    t_B11 = t_B[:, None, None]
    z_BTC = (1 - t_B11) * z0_BTC + t_B11 * x1_BTC
    predicted = velocity(z_BTC, t_B, y_B).float()
    target = velocity_of_data(x1_BTC, z_BTC, t_B) if of_data else x1_BTC - z0_BTC
    per_sample = (predicted - target).square().flatten(1).mean(dim=1)
    angle = 1 - F.cosine_similarity(predicted, target, dim=-1).mean(dim=1) if cosine else torch.zeros_like(per_sample)
    return FlowLoss(per_sample, angle)


def drop_labels(y_B: Tensor, u_B: Tensor, probability: float, null_label: int) -> Tensor:
    """Replace each label by the null label where its uniform draw is below `probability`."""
    return torch.where(u_B < probability, torch.full_like(y_B, null_label), y_B)
