"""Learning rate, and the state of models and optimizers as flat tensors for checkpoints.

The state is the same for every world size and strategy. torch.distributed.checkpoint gathers and scatters the tensors
of a sharded model. All ranks must call these functions. Only the main process gets the tensors of a sharded model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svgpipe.manifests.schedule_section import ScheduleSection

from .distributed import is_sharded


def learning_rate(step: int, steps: int, base: float, schedule: ScheduleSection) -> float:
    """Return the learning rate at step `step` (from 0) of `steps`: linear warm-up, then constant or cosine."""
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return base
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    factor = schedule.final_factor + (1 - schedule.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    return base * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


def _options(model: nn.Module, *, cpu_offload: bool = False) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    sharded = any(map(is_sharded, model.parameters()))
    return StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload) if sharded else None


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return `model.state_dict()`; of a sharded model gathered on the CPU."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    tensors: dict[str, Any] = get_model_state_dict(model, options=_options(model, cpu_offload=True))
    return tensors


def load_model_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Restore the result of `model_tensors`. torch raises RuntimeError for keys or shapes that do not fit."""
    from torch.distributed.checkpoint.state_dict import set_model_state_dict

    set_model_state_dict(model, dict(tensors), options=_options(model))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimizer, by `PARAMETER.NAME`: `blocks.0.mlp.weight.exp_avg`."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    if not optimizer.state:  # torch would make a step to create it
        return {}
    gathered: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_options(model, cpu_offload=True))
    state: dict[str, dict[str, Tensor]] = gathered.get("state", {})
    return {f"{key}.{name}": torch.as_tensor(value) for key, entry in state.items() for name, value in entry.items()}


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restore the result of `optimizer_tensors`. Empty `tensors` (before the first step) change nothing."""
    from torch.distributed.checkpoint.state_dict import set_optimizer_state_dict

    if not tensors:
        return
    state: dict[str, Any] = {}
    for key, value in tensors.items():
        parameter, _, name = key.rpartition(".")
        # Copied, because tensors of a file are memory-mapped, and the file may change or disappear during training.
        state.setdefault(parameter, {})[name] = value.clone()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=_options(model))
