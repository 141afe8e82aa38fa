"""Curvature of sampling paths: the straighter they are, the fewer steps a model needs.

Legend: B samples, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.manifest import FrozenModel
from svgpipe.models.dit import DiT
from svgpipe.models.sampler import time_grid

from ..evaluate.intervals import mean_estimate
from ..networks.sampling import initial_noise, labels_of

STEPS = 50
SAMPLES = 64
BATCH = 16


class Straightness(FrozenModel):
    """Paths without guidance, in 50 equal Euler steps. All values are relative to |end - start|; 0: straight."""

    weights: str
    times: list[float]
    deviation: list[Estimate] = Field(description="Mean distance to the straight line, at each of `times`.")
    largest_deviation: Estimate = Field(description="Mean over samples of the largest deviation.")
    curvature: Estimate = Field(
        description="Integral of |v - (end - start)|² over time, over |end - start|² (arXiv 2209.03003, eq. 7)."
    )
    one_step: Estimate = Field(description="Distance from the result of a single step to the end of the path.")


@torch.no_grad()
def straightness(
    model: DiT, weights: str, replicates: int, seed: int, classes: Sequence[int] | None = None
) -> Straightness:
    """Measure samples 0 to 63, with `classes` (None: all) in turn. `model` is in eval mode on the computing device.

    Returns:
        Deviations from straight paths.
    """
    deviations, curvatures, one_steps = [], [], []
    for start in range(0, SAMPLES, BATCH):
        path, velocities = _trajectory(model, range(start, start + BATCH), seed, classes)
        chord = path[-1] - path[0]
        length = _norm(chord).clamp_min(1e-12)  # an untrained model does not move
        times = time_grid(STEPS, 1.0).to(chord.device)
        line = path[0] + times.view(-1, 1, 1, 1) * chord
        deviations.append(torch.stack([_norm(z - on) / length for z, on in zip(path, line, strict=True)]).cpu())
        steps = times.diff()
        apart = torch.stack([_norm(v - chord).square() for v in velocities]) / length.square()
        curvatures.append((steps[:, None] * apart).sum(0).cpu())
        one_steps.append((_norm(path[0] + velocities[0] - path[-1]) / length).cpu())
    deviation = torch.cat(deviations, dim=1)
    return Straightness(
        weights=weights,
        times=[round(float(t), 6) for t in time_grid(STEPS, 1.0)],
        deviation=[mean_estimate(at_one_time, replicates, seed) for at_one_time in deviation],
        largest_deviation=mean_estimate(deviation.amax(0), replicates, seed),
        curvature=mean_estimate(torch.cat(curvatures), replicates, seed),
        one_step=mean_estimate(torch.cat(one_steps), replicates, seed),
    )


def _trajectory(
    model: DiT, indices: range, seed: int, classes: Sequence[int] | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Return (B,T,C) points at the STEPS + 1 times, and velocities at all but the last."""
    device = next(model.parameters()).device
    z = initial_noise(seed, indices, model.grid[0] * model.grid[1], model.in_channels).to(device)
    labels = labels_of(indices, range(model.num_classes) if classes is None else classes).to(device)
    path, velocities = [z], []
    grid = time_grid(STEPS, 1.0).tolist()
    for step in range(STEPS):
        v = model(z, torch.full((len(z),), grid[step], device=device), labels)
        z = z + (grid[step + 1] - grid[step]) * v
        velocities.append(v)
        path.append(z)
    return path, velocities


def _norm(values: Tensor) -> Tensor:
    return values.flatten(1).norm(dim=1)
