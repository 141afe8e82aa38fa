"""Exponential moving averages of a model's weights, several side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def warmed_decay(decay: float, updates: int) -> float:
    """Decay of the update after `updates` earlier ones: min(decay, (1 + n) / (10 + n)).

    Without the warm-up, a run of a few thousand steps at 0.9999 would mostly average its initial weights.
    Source: TensorFlow's ExponentialMovingAverage with num_updates.
    """
    return min(decay, (1 + updates) / (10 + updates))


def new_average(model: Model) -> Model:
    """Return a copy of `model` to average into: in eval mode, without gradients."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_averages(
    averages: Sequence[Sequence[Tensor]], decays: Sequence[float], weights: Sequence[Tensor], updates: int
) -> None:
    """Update average ← average + (1 − decay) (weights − average) with warmed decays, in one launch per average.

    Takes lists of parameters, because `parameters()` of a large model takes milliseconds, and a GPU waits for them.
    """
    for average, decay in zip(averages, decays, strict=True):
        torch._foreach_lerp_(list(average), list(weights), 1 - warmed_decay(decay, updates))
