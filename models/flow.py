"""Rectified flow: time runs from noise (0) to data (1).

Legend: B batch, T tokens, C channels; z0 noise, x1 data, z_t = (1-t) z0 + t x1, target x1 - z0.
Source: official rectified_flow/rectified_flow.py; FACTS §3.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

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


def time_grid(steps: int, shift: float) -> Tensor:
    """(steps+1,) float32 times from exactly 0 to exactly 1.

    float32 linspace, shifted in float64, stored as float32, as the official prepare_t_seq computes it.
    Raises ValueError if `steps` is not positive.
    """
    if steps < 1:
        raise ValueError(f"sampling steps: expected at least 1, found {steps}")
    return shift_time(torch.linspace(0, 1, steps + 1).double(), shift).float()


@dataclass(frozen=True)
class FlowLoss:
    """Loss of one batch: its mean and the per-sample mean squared errors (B,)."""

    mean: Tensor
    per_sample: Tensor


def flow_loss(velocity: Velocity, x1_BTC: Tensor, z0_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> FlowLoss:
    """Mean squared error of the predicted velocity against x1 - z0, in float32, unweighted.

    Args:
        velocity: the model.
        x1_BTC: data latents; z0_BTC: standard normal noise of that shape.
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


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance and where on the path it acts.

    scale: w in v_u + w (v_c - v_u); 1 is none.
    mode: constant · linear (1+(w-1)(i+1)/steps) · late (w where (i+1)/steps > 0.5) · early-R (w where
    t > R, so near the data in spite of its name) · cfg_star-K-R (i < K: -R v_u; else as constant).
    Source: official RectifiedFlow.sample.
    """

    scale: float = 1.0
    mode: str = "constant"

    def __post_init__(self) -> None:
        """Raises ValueError for a mode that does not exist."""
        if not re.fullmatch(r"constant|linear|late|early-\d+(\.\d+)?|cfg_star-\d+-\d+(\.\d+)?", self.mode):
            raise ValueError(
                f"guidance mode: expected constant, linear, late, early-R or cfg_star-K-R, found {self.mode!r}"
            )

    def weights(self, step: int, steps: int, t: float) -> tuple[float, float]:
        """(weight of v_c, weight of v_u) at step index `step` of `steps`, at time `t`."""
        w, parts = self.scale, self.mode.split("-")
        if parts[0] == "linear":
            w = 1 + (w - 1) * (step + 1) / steps
        elif parts[0] == "late":
            w = w if (step + 1) / steps > 0.5 else 1.0
        elif parts[0] == "early":
            w = w if t > float(parts[1]) else 1.0
        elif parts[0] == "cfg_star" and step < int(parts[1]):
            return 0.0, -float(parts[2])
        return w, 1 - w


def guided_velocity(
    velocity: Velocity, z_BTC: Tensor, t: float, y_B: Tensor, null_label: int, weights: tuple[float, float]
) -> Tensor:
    """Conditional and unconditional velocity mixed, from one forward of 2B; a half without weight is not computed."""
    conditional, unconditional = weights
    b = len(z_BTC)
    null_B = torch.full_like(y_B, null_label)

    def at(count: int) -> Tensor:
        return torch.full((count,), t, dtype=z_BTC.dtype, device=z_BTC.device)

    if unconditional == 0:
        return conditional * velocity(z_BTC, at(b), y_B)
    if conditional == 0:
        return unconditional * velocity(z_BTC, at(b), null_B)
    v_c, v_u = velocity(torch.cat([z_BTC, z_BTC]), at(2 * b), torch.cat([y_B, null_B])).chunk(2)
    return (
        v_u + conditional * (v_c - v_u)
        if conditional + unconditional == 1
        else (conditional * v_c + unconditional * v_u)
    )


@torch.no_grad()
def sample(
    velocity: Velocity,
    z0_BTC: Tensor,
    y_B: Tensor,
    *,
    null_label: int,
    steps: int,
    shift: float,
    solver: Literal["euler", "heun"] = "euler",
    guidance: Guidance | None = None,
) -> Tensor:
    """Integrate from noise to data: (B,T,C) → (B,T,C).

    Euler evaluates once a step, Heun twice, at the last step too (at t = 1), as the official sampler does.
    Raises ValueError for an unknown solver, or steps that are not positive.
    """
    if solver not in ("euler", "heun"):
        raise ValueError(f"solver: expected euler or heun, found {solver!r}")
    guidance = guidance or Guidance()
    grid = time_grid(steps, shift)
    z = z0_BTC

    def v_at(latents: Tensor, step: int, t: float) -> Tensor:
        weights = guidance.weights(step, steps, t)
        return guided_velocity(velocity, latents, t, y_B, null_label, weights).to(latents.dtype)

    for step in range(steps):
        dt = (grid[step + 1] - grid[step]).item()
        v = v_at(z, step, grid[step].item())
        if solver == "heun":
            v = 0.5 * (v + v_at(z + dt * v, step, grid[step + 1].item()))
        z = z + dt * v
    return z
