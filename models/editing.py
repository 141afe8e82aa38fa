"""Editing by inversion: an image is integrated back to noise, and a part of it forward again under another label.

Legend: B batch, T tokens, C channels; z latents, t time from 0 (noise) to 1 (data).
Source: SVG (arXiv 2510.15301), its section on editing: inversion with the path recorded, noise inside a box, a softened
mask, Euler steps under the new class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .flow import Velocity
from .guidance import Guidance, GuidedVelocity


def no_report() -> None:
    """Do nothing after a step."""


def invert(
    velocity: Velocity,
    z1_BTC: Tensor,
    y_B: Tensor,
    times: Sequence[float],
    step_done: Callable[[], None] = no_report,
) -> list[Tensor]:
    """Return the states at `times`, ascending to 1, of Euler steps from data back to noise; the last is `z1_BTC`.

    `step_done` is called after every step.
    """
    path = [z1_BTC]
    for before, t in reversed(list(pairwise(times))):
        v = velocity(path[-1], z1_BTC.new_full((len(z1_BTC),), t), y_B)
        path.append(path[-1] - (t - before) * v.to(z1_BTC.dtype))
        step_done()
    return path[::-1]


def repaint(
    v_at: GuidedVelocity,
    path: Sequence[Tensor],
    mask_T1: Tensor,
    noise_BTC: Tensor,
    y_B: Tensor,
    times: Sequence[float],
    guidance: Guidance,
    step_done: Callable[[], None] = no_report,
) -> Tensor:
    """Return latents (B,T,C) at time 1, made anew where the mask is 1, and as recorded where it is 0.

    In the steps, every cell with a mask above 0 is made anew: a share of a state at every step would bring the cell
    back to the recorded path. The shares blend the ends of both paths.

    Args:
        v_at: the model, with its guidance.
        path: states (B,T,C) of the image at `times`, see `invert`.
        mask_T1: between 0 and 1.
        noise_BTC: standard normal. It is scaled to the deviation of states at the first time.
        y_B: new labels.
        times: ascending, the last is 1.
        guidance: scale and mode.
        step_done: called after every step.
    """
    t0, steps, anew = times[0], len(times) - 1, mask_T1 > 0
    # The deviation of t data + (1 - t) noise, for normalised data.
    z = torch.where(anew, noise_BTC * (t0**2 + (1 - t0) ** 2) ** 0.5, path[0])
    for step, (t, after) in enumerate(pairwise(times)):
        v = v_at(z, t, y_B, guidance.weights(step, steps, t))
        z = torch.where(anew, z + (after - t) * v.to(z.dtype), path[step + 1])
        step_done()
    return path[-1] + mask_T1 * (z - path[-1])


def soft_mask(box: tuple[int, int, int, int], size: int, grid: tuple[int, int]) -> Tensor:
    """Return a mask (T,1) over cells: 1 where a cell touches a box, less in the cells around it, 0 elsewhere.

    The cells around it have the mean over 3x3 cells, with the weights 1 2 1 in both directions.

    Args:
        box: x, y, width, height in pixels of the image.
        size: pixels per side of the image.
        grid: rows and columns of cells.
    """
    x, y, width, height = box
    inside = torch.zeros(1, 1, size, size)
    inside[..., y : y + height, x : x + width] = 1
    cells = F.adaptive_max_pool2d(inside, grid)
    weights = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (weights[:, None] * weights)[None, None]
    around = F.conv2d(F.pad(cells, (1, 1, 1, 1), mode="replicate"), kernel)
    return torch.maximum(cells, around).flatten()[:, None]
