"""Learning-rate schedules."""

from __future__ import annotations

import math

import torch

from svgpipe.manifests.recipe import ScheduleSection


def learning_rate(step: int, steps: int, base: float, schedule: ScheduleSection) -> float:
    """Learning rate at optimiser step `step` (from 0) of `steps`: linear warm-up, then constant or cosine."""
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return base
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    factor = schedule.final_factor + (1 - schedule.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    return base * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value
