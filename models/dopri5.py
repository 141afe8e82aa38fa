"""The Dormand-Prince solver of order 5(4). Every sample has its own step size.

A sample therefore does not depend on the others of its batch. In torchdiffeq, which SiT uses, the batch shares one step
size. Error norm, first step and step control are those of torchdiffeq, applied to one sample.
Legend: B batch, T tokens, C channels; z latents, t times from 0 (noise) to 1 (data), v velocity.
Source: Dormand and Prince 1980; Hairer, Norsett, Wanner, Solving Ordinary Differential Equations I, II.4.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Field = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(B,T,C) latents, (B,) times, (B,) numbers of the samples → (B,T,C) velocities."""

Tolerance = tuple[float, float]
"""Relative, absolute."""
TOLERANCE: Tolerance = (1e-3, 1e-6)  # of SiT's scripts
MAX_STEPS = 1000
SAFETY, LARGEST_GROWTH, LARGEST_SHRINK = 0.9, 10.0, 0.2
NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
# Weights of order 5 minus those of order 4.
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)


def integrate(field: Field, z_BTC: Tensor, tolerance: Tolerance = TOLERANCE) -> Tensor:
    """Integrate dz = v dt from t = 0 to 1: (B,T,C) → (B,T,C). Samples that have arrived are not evaluated any more.

    Args:
        field: velocity.
        z_BTC: latents at t = 0.
        tolerance: relative and absolute error of a step.

    Raises:
        ValueError: a sample needs more than `MAX_STEPS` steps.
    """
    z, active = z_BTC.clone(), torch.arange(len(z_BTC), device=z_BTC.device)
    t = torch.zeros(len(z), device=z.device)
    v = field(z, t, active).clone()
    dt = _first_step(field, z, v, active, tolerance)
    for _ in range(MAX_STEPS):
        here, start = z[active], t[active]
        step = torch.minimum(dt[active], 1 - start)
        moved, last, error = _step(field, here, v[active], start, step, active, tolerance)
        accepted = error <= 1
        kept = active[accepted]
        arrived = step[accepted] >= 1 - start[accepted]
        z[kept], v[kept] = moved[accepted], last[accepted]
        t[kept] = torch.where(arrived, 1.0, start[accepted] + step[accepted])
        dt[active] = step * _growth(error)
        active = active[t[active] < 1]
        if not len(active):
            return z
    raise ValueError(f"dopri5: a sample needs more than {MAX_STEPS} steps; the velocity is not smooth")


def _step(
    field: Field, z: Tensor, v: Tensor, t: Tensor, dt: Tensor, samples: Tensor, tolerance: Tolerance
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the latents after a step, the velocity there, and the error (B,) in units of the tolerance."""
    velocities, moved = [v], z
    for node, weights in zip(NODES, STAGES, strict=True):
        moved = z + _wide(dt) * sum(weight * k for weight, k in zip(weights, velocities, strict=True))
        velocities.append(field(moved, t + node * dt, samples))
    error = _wide(dt) * sum(weight * k for weight, k in zip(ERROR, velocities, strict=True))
    scale = tolerance[1] + tolerance[0] * torch.maximum(z.abs(), moved.abs())
    return moved, velocities[-1], _norm(error / scale)


def _first_step(field: Field, z: Tensor, v: Tensor, samples: Tensor, tolerance: Tolerance) -> Tensor:
    """Return a first step (B,) from the sizes of z, v and the change of v."""
    scale = tolerance[1] + tolerance[0] * z.abs()
    size, speed = _norm(z / scale), _norm(v / scale)
    trial = torch.where((size < 1e-5) | (speed < 1e-5), 1e-6, 0.01 * size / speed).clamp_max(1.0)
    change = _norm((field(z + _wide(trial) * v, trial, samples) - v) / scale) / trial
    largest = torch.maximum(speed, change)
    fitting = torch.where(largest <= 1e-15, (trial * 1e-3).clamp_min(1e-6), (0.01 / largest) ** (1 / 5))
    return torch.minimum(100 * trial, fitting)


def _growth(error: Tensor) -> Tensor:
    """Return the factors (B,) of the next step."""
    fitting = SAFETY / error.clamp_min(1e-10) ** (1 / 5)
    smallest = torch.where(error < 1, 1.0, LARGEST_SHRINK)
    return torch.maximum(fitting, smallest).clamp_max(LARGEST_GROWTH)


def _norm(values: Tensor) -> Tensor:
    """Root mean square of every sample, (B,T,C) → (B,)."""
    return values.flatten(1).square().mean(dim=1).sqrt()


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None]
