"""The processes that train one model together, and the model on them.

A global batch is split into contiguous slices, one for each process; the first slices may be longer by one. The model
is replicated (DDP), or each process holds a part of every parameter (FSDP2); both average gradients over processes.
Checkpoints are the same for both, see optimizer.py. One process alone never starts torch.distributed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


class _Sum(torch.autograd.Function):
    """All-reduce sum. Its backward pass sums gradients too: every process's part of the loss depends on every input."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        del context
        return _total(values)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        del context
        return _total(gradient)


def _total(values: Tensor) -> Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total


@dataclass(frozen=True)
class ProcessGroup:
    """This process's place among those that train together. All must call every method but the two of slices."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports progress."""
        return self.rank == 0

    def local_slice(self, count: int) -> range:
        """Positions of this process among `count`."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def largest_slice(self, count: int) -> int:
        """Positions of the process that has most of them."""
        return -(-count // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise over all processes; no gradient."""
        return values if self.size == 1 else _total(values)

    def sum_with_gradient(self, values: Tensor) -> Tensor:
        """As `sum`, where every process goes on to compute its part of one loss with the result."""
        return values if self.size == 1 else _Sum.apply(values)

    def any(self, flag: bool) -> bool:
        """Whether it is true for any process. Only hosts wait for each other here, never for a GPU."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def gather_rows(self, mine: Tensor, count: int) -> Tensor:
        """(slice, …) of every process → (count, …), in order."""
        if self.size == 1:
            return mine
        largest = self.largest_slice(count)
        padded = mine.new_zeros(largest, *mine.shape[1:])
        padded[: len(mine)] = mine
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        torch.distributed.all_gather(parts, padded)
        lengths = [len(ProcessGroup(self.device, rank, self.size).local_slice(count)) for rank in range(self.size)]
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def barrier(self) -> None:
        """Until every process has come here."""
        self.any(False)


Strategy = Literal["ddp", "fsdp2"]


def shard_parameters(model: nn.Module, units: Sequence[nn.Module], group: ProcessGroup) -> None:
    """Spread every parameter of `model` over the group, in place; `units` are gathered one at a time when they run."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.size,))
    for part in (*units, model):
        # By default the outermost parameters stay gathered after a forward pass: averages could not be updated.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def replicate(model: nn.Module, group: ProcessGroup) -> nn.Module:
    """`model`, so that a backward pass through it leaves gradients averaged over the group."""
    if group.size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    devices = [group.device] if group.device.type == "cuda" else None
    # Buffers need no broadcast: they are only updated with values that are equal on all ranks.
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def gradient_sync(model: Any, enabled: bool) -> Iterator[None]:
    """Whether backward passes in the block average gradients over ranks, or only accumulate them."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(enabled)
        yield
    elif hasattr(model, "no_sync") and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    # By name: a process alone has no such tensors, and need not load what defines them.
    return type(tensor).__name__ == "DTensor"


def gradient_norms(parameters: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """(parameters,) L2 norms of the gradients; 0 for a parameter without one. The same on every process."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    norms = torch.stack(torch._foreach_norm([g.to_local() if is_sharded(g) else g for g in gradients]))
    return group.sum(norms.square()).sqrt() if any(map(is_sharded, gradients)) else norms
