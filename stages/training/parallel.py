"""One model on several processes: replicas (DDP), or each holding a part of every parameter (FSDP2).

Both average gradients over processes. Checkpoints know nothing of either: `whole` and `placed` translate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import torch
from torch import Tensor, nn

from .distributed import Team

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Strategy = Literal["ddp", "fsdp2"]


def shard_parameters(model: nn.Module, units: Sequence[nn.Module], team: Team) -> None:
    """Spread every parameter of `model` over the team, in place; `units` are gathered one at a time when they run."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(team.device.type, (team.size,))
    for part in (*units, model):
        # By default the outermost parameters stay gathered after a forward pass: averages could not be updated.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)


def replicate(model: nn.Module, team: Team) -> nn.Module:
    """`model`, so that a backward pass through it leaves gradients averaged over the team."""
    if team.size == 1:
        return model
    from torch.nn.parallel import DistributedDataParallel

    devices = [team.device] if team.device.type == "cuda" else None
    # No buffer of ours changes in training but by what all processes agree on.
    return DistributedDataParallel(model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)


@contextmanager
def averaging(model: Any, now: bool) -> Iterator[None]:
    """Whether backward passes in the block exchange gradients, or keep them for one that will."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(now)
        yield
    elif hasattr(model, "no_sync") and not now:
        with model.no_sync():
            yield
    else:
        yield


def _is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    # A process alone has no such tensors, and should not load what defines them.
    return type(tensor).__name__ == "DTensor"


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What of each tensor lies in this process."""
    return [tensor.to_local() if _is_sharded(tensor) else tensor for tensor in tensors]


def whole(tensor: Tensor) -> Tensor:
    """The tensor, put together from its parts on every process, which must all ask for it."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor


def gathered(tensors: Mapping[str, Tensor], team: Team) -> dict[str, Tensor]:
    """`whole` for a group of them; of those that are spread over processes only the one that leads keeps anything."""
    found = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if not _is_sharded(tensor):
            found[name] = full
        elif team.leads:
            found[name] = full.cpu()  # one after the other, so that the device never holds the whole model
    return found


def placed(value: Tensor, like: Tensor) -> Tensor:
    """Inverse of `whole`: this process's part of `value` if `like` has its shape and is spread over the team."""
    if not _is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the same file: nothing needs to be sent.
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gradient_norms(parameters: Sequence[Tensor], team: Team) -> Tensor:
    """(parameters,) L2 norms of the gradients; 0 for a parameter without one. The same on every process."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    norms = torch.stack(torch._foreach_norm(local(gradients)))
    if not any(map(_is_sharded, gradients)):
        return norms
    return team.sum(norms.square()).sqrt()


def clip_gradients(parameters: Sequence[Tensor], limit: float, norm: Tensor) -> None:
    """Scale all gradients by min(1, limit / norm), as torch's clip_grads_with_norm_, also where they are spread."""
    gradients = local([p.grad for p in parameters if p.grad is not None])
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))
