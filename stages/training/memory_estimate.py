"""What a training will hold in memory, found before it holds anything.

A model runs once on tensors without content, which torch keeps the size of; what a backward pass would keep is added
up. Nothing here is a promise: kernels take work space of their own. Compared with the peaks that the benchmark
tests/benchmarks/train.py measures, it is right to about a tenth.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from svgpipe.manifests.errors import UsageError

from ..runtime.memory import available_memory
from .distributed import Team
from .supervisor import Supervisor


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process holds on its device at the peak of a step."""

    weights: int  # and their gradients
    optimizer: int
    averages: int
    activations: int
    checkpoint: int  # the copy that is being written, where the device is the CPU
    process: int  # what the interpreter and its libraries hold already, likewise

    @property
    def total(self) -> int:
        return sum(getattr(self, part.name) for part in fields(self))

    def __str__(self) -> str:
        parts = ", ".join(f"{part.name} {getattr(self, part.name) / 1e9:.2f}" for part in fields(self))
        return f"about {self.total / 1e9:.2f} GB ({parts})"


class Kept:
    """What is kept for a backward pass while `hooks` are entered, in bytes by storage, apart from the weights."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        own = {_storage(weight) for weight in weights}
        self.bytes: dict[int, int] = {}
        self._alive: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            if (storage := _storage(tensor)) not in own:
                self.bytes[storage] = tensor.untyped_storage().nbytes()
                self._alive.append(tensor)  # or another tensor would get its address
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def require_memory(found: MemoryEstimate, team: Team, supervisor: Supervisor, what_to_do: str) -> None:
    """Tell what it will take, and refuse what cannot fit.

    Raises:
        UsageError: more than the device has at all; more than is free just now is only warned of.
    """
    free, total = available_memory(team.device)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if team.device.type == "cpu" and team.size > 1 else 1
    needed = found.total * neighbours - found.checkpoint * (neighbours - 1)  # which is the leader's alone
    each = f" for each of {neighbours} workers" if neighbours > 1 else ""
    if needed > total:
        raise UsageError(f"memory: this recipe takes {found}{each}; there are {total / 1e9:.2f} GB. {what_to_do}")
    supervisor.say(f"memory: {found}{each}, of {total / 1e9:.1f} GB")
    if needed - (found.process if neighbours == 1 else 0) > free:
        supervisor.say(f"warning: only {free / 1e9:.2f} GB of it are free. {what_to_do}")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
