"""What diffusion training will hold in memory."""

from __future__ import annotations

import torch

from svgpipe.manifests.recipe import DiffusionSection

from ..networks.diffusion import build_dit
from ..runtime.memory import resident_memory
from ..training.distributed import Team
from ..training.memory_estimate import Kept, MemoryEstimate
from ..training.parallel import Strategy
from .loss import Draws, sample_losses


def estimate_diffusion(
    config: DiffusionSection, team: Team, strategy: Strategy, *, grid: tuple[int, int], channels: int, num_classes: int
) -> MemoryEstimate:
    """For one process of `team`, without allocating any of it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    samples = -(-team.largest_share(config.batch_size) // config.accumulate)
    with FakeTensorMode(), team.device:
        model = build_dit(config.model, grid=grid, channels=channels, num_classes=num_classes)
        kept = Kept(model.parameters())
        shape = (samples, grid[0] * grid[1], channels)
        x1, noise, at = torch.empty(shape), torch.empty(shape), torch.empty(samples)
        labels = torch.zeros(samples, dtype=torch.int64)
        with kept.hooks:
            sample_losses(model, x1, labels, Draws(noise, at, at), config, null_label=None).mean()
        parameters = 4 * sum(p.numel() for p in model.parameters())
    activations = kept.total
    block = activations // config.model.depth
    if config.activation_checkpointing:  # what goes into each block, and one block computed again
        activations = config.model.depth * samples * shape[1] * config.model.width * 4 + block
    spread = team.size if strategy == "fsdp2" else 1
    on_cpu, averages = team.device.type == "cpu", len(config.ema_decays)
    return MemoryEstimate(
        weights=2 * parameters // spread,
        optimizer=2 * parameters // spread,
        averages=averages * parameters // spread,
        activations=activations + 2 * block,  # a backward pass holds a block's gradients beside
        checkpoint=(3 + averages) * parameters if on_cpu and team.leads else 0,
        process=resident_memory() if on_cpu else 0,
    )
