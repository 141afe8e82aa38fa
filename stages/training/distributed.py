"""The processes that train one model, and the model on them.

A global batch is split into contiguous slices, one per process; the first slices may be longer by one. The model
is replicated (DDP) or its parameters are sharded (FSDP2). Both average gradients over processes. Checkpoints are the
same for both, see optimizer.py. A single process never starts torch.distributed.
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
    """All-reduce sum. The backward pass also sums, because every process's part of the loss depends on every input."""

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
    """This process's place in the group. All processes must call every method except the two for slices."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def local_slice(self, count: int) -> range:
        """Return the positions of this process among `count`."""
        each, more = divmod(count, self.size)
        start = self.rank * each + min(self.rank, more)
        return range(start, start + each + (self.rank < more))

    def largest_slice(self, count: int) -> int:
        """Return the positions of the process with the most."""
        return -(-count // self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all processes; no gradient."""
        return values if self.size == 1 else _total(values)

    def sum_with_gradient(self, values: Tensor) -> Tensor:
        """Return `sum` with a gradient, for processes that each compute a part of one loss with the result."""
        return values if self.size == 1 else _Sum.apply(values)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true on any process. Only hosts wait here, never a GPU."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(int(flag))))

    def gather_rows(self, mine: Tensor, count: int) -> Tensor:
        """Gather the slices of all processes: (slice, …) → (count, …), in order.

        Returns:
            The rows.
        """
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
        """Wait until every process is here."""
        self.any(False)


Strategy = Literal["ddp", "fsdp2"]


def shard_parameters(model: nn.Module, units: Sequence[nn.Module], group: ProcessGroup) -> None:
    """Shard every parameter of `model` over the group, in place. `units` are gathered one at a time during a pass."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.size,))
    for part in (*units, model):
        # By default the outermost parameters stay gathered after a forward pass, and EMA weights could not be updated.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def replicate(model: nn.Module, group: ProcessGroup) -> nn.Module:
    """Return `model` so that a backward pass averages gradients over the group."""
    if group.size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    devices = [group.device] if group.device.type == "cuda" else None
    # Buffers need no broadcast: they are only updated with values that are equal on all ranks.
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def gradient_sync(model: Any, enabled: bool) -> Iterator[None]:
    """Average gradients over ranks in backward passes of the block, or only accumulate them.

    Yields:
        Nothing.
    """
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(enabled)
        yield
    elif hasattr(model, "no_sync") and not enabled:
        with model.no_sync():
            yield
    else:
        yield


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Return whether it is sharded: by class name, because a single process need not import the class."""
    return type(tensor).__name__ == "DTensor"


def gradient_norms(parameters: Sequence[Tensor], group: ProcessGroup) -> Tensor:
    """Return (parameters,) L2 norms of the gradients, the same on every process; 0 for a parameter without gradient."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    norms = torch.stack(torch._foreach_norm([g.to_local() if is_sharded(g) else g for g in gradients]))
    return group.sum(norms.square()).sqrt() if any(map(is_sharded, gradients)) else norms
