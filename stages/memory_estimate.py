"""What a diffusion training will hold in memory, found before it holds anything.

The model runs once on tensors without content, which torch keeps the size of; what a backward pass would keep is added
up. Nothing here is a promise: kernels take work space of their own. Compared with the peaks that the benchmark
tests/benchmarks/train.py measures, it is right to about a tenth.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.stages.draws import Draws
from svgpipe.stages.flow_losses import sample_losses
from svgpipe.stages.parallel import Strategy
from svgpipe.stages.sampling import build_dit
from svgpipe.stages.supervisor import Supervisor
from svgpipe.stages.team import Team


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


def estimate(
    config: DiffusionSection, team: Team, strategy: Strategy, *, grid: tuple[int, int], channels: int, num_classes: int
) -> MemoryEstimate:
    """For one process of `team`, without allocating any of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    samples = -(-team.largest_share(config.batch_size) // config.accumulate)
    held: dict[int, int] = {}
    with FakeTensorMode(), team.device:
        model = build_dit(config.model, grid=grid, channels=channels, num_classes=num_classes)
        own = {_storage(p) for p in model.parameters()}

        def keep(tensor: Tensor) -> Tensor:
            if (storage := _storage(tensor)) not in own:
                held[storage] = tensor.untyped_storage().nbytes()
                alive.append(tensor)  # or another tensor would get its address
            return tensor

        alive: list[Tensor] = []
        shape = (samples, grid[0] * grid[1], channels)
        x1, noise, at = torch.empty(shape), torch.empty(shape), torch.empty(samples)
        labels = torch.zeros(samples, dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            sample_losses(model, x1, labels, Draws(noise, at, at), config, null_label=None).mean()
        parameters = 4 * sum(p.numel() for p in model.parameters())
    everything = sum(held.values())
    block = everything // config.model.depth
    if config.activation_checkpointing:  # what goes into each block, and one block computed again
        everything = config.model.depth * samples * shape[1] * config.model.width * 4 + block
    spread = team.size if strategy == "fsdp2" else 1
    on_cpu, averages = team.device.type == "cpu", len(config.ema_decays)
    return MemoryEstimate(
        weights=2 * parameters // spread,
        optimizer=2 * parameters // spread,
        averages=averages * parameters // spread,
        activations=everything + 2 * block,  # a backward pass holds a block's gradients beside
        checkpoint=(3 + averages) * parameters if on_cpu and team.leads else 0,
        process=_resident() if on_cpu else 0,
    )


def require_memory(found: MemoryEstimate, team: Team, supervisor: Supervisor) -> None:
    """Tell what it will take, and refuse what cannot fit.

    Raises:
        UsageError: more than the device has at all; more than is free just now is only warned of.
    """
    free, total = _memory_of(team.device)
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if team.device.type == "cpu" and team.size > 1 else 1
    needed = found.total * neighbours - found.checkpoint * (neighbours - 1)  # which is the leader's alone
    each = f" for each of {neighbours} workers" if neighbours > 1 else ""
    what_to_do = (
        "Use --set diffusion.activation_checkpointing=true, a larger diffusion.accumulate, a smaller batch or model"
        + (", or --strategy fsdp2." if team.size > 1 else ", or several --num-workers.")
    )
    if needed > total:
        raise UsageError(f"memory: this recipe takes {found}{each}; there are {total / 1e9:.2f} GB. {what_to_do}")
    supervisor.say(f"memory: {found}{each}, of {total / 1e9:.1f} GB")
    if needed - (found.process if neighbours == 1 else 0) > free:
        supervisor.say(f"warning: only {free / 1e9:.2f} GB of it are free. {what_to_do}")


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _resident() -> int:
    try:
        resident, shared = map(int, Path("/proc/self/statm").read_text().split()[1:3])
        return (resident - shared) * resource.getpagesize()  # libraries lie in memory once for all processes
    except OSError:
        return 0


def _memory_of(device: torch.device) -> tuple[int, int]:
    """Free and total bytes: of the GPU, or of this machine or the container that it is limited to."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what can be had, unlike what nothing lies in
        free = int(meminfo.read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = (group / "memory.stat").read_text().partition("inactive_file ")[2].split()  # given up when asked for
        return min(free, limit - used + int(cached[0])), min(total, limit)
    except (OSError, ValueError, IndexError):  # no such group, or "max"
        return free, total
