"""Learning-rate schedules, and optimizer state as flat tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

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


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as flat tensors, `INDEX.NAME`, in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, for an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        # A copy: tensors of a file are the file, mapped into memory, which may change or go while training lasts.
        state.setdefault(int(index), {})[name] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
