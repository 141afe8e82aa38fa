"""The loss of training and held-out rows. All random values are functions of the row.

Legend: B batch, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.selection import evenly_spread
from svgpipe.models.ddpm import STEPS as DDPM_STEPS
from svgpipe.models.ddpm import Process, ddpm_loss
from svgpipe.models.dit import DiT, Outputs
from svgpipe.models.flow import Velocity, drop_labels, flow_loss, logit_normal, shift_of, shift_time
from svgpipe.models.representation_alignment import representation_loss, spatial_zscore
from svgpipe.models.seeds import seed_of

from ..runtime.device import autocast, to_device
from ..runtime.retry import Say, call_with_retries
from ..training.distributed import ProcessGroup


def times_of(draws: Draws, config: DiffusionSection) -> Tensor:
    """Return the times (B,) of the samples, noise at 0 and data at 1; of ddpm the middles of the noising steps."""
    if config.objective == "ddpm":
        return 1 - (_ddpm_step(draws) + 0.5) / DDPM_STEPS
    u = logit_normal(draws.time) if config.logit_normal_time else draws.time
    return shift_time(u, shift_of(config.time_shift, *draws.noise.shape[1:]))


def _ddpm_step(draws: Draws) -> Tensor:
    """Return uniform step numbers (B,) int64 below 1,000."""
    return (draws.time * DDPM_STEPS).long().clamp_max(DDPM_STEPS - 1)


def _losses(
    model: Velocity, x1: Tensor, labels: Tensor, draws: Draws, config: DiffusionSection
) -> tuple[Tensor, Tensor]:
    """Return the loss to minimise and its squared error, (B,) each."""
    if config.objective == "ddpm":
        ddpm = ddpm_loss(model, x1, draws.noise, _ddpm_step(draws), labels, Process.of_training())
        return ddpm.squared_error + ddpm.bound, ddpm.squared_error
    options = {"cosine": config.cosine_loss, "of_data": config.predict_data}
    flow = flow_loss(model, x1, draws.noise, times_of(draws, config), labels, **options)
    return flow.per_sample + flow.cosine, flow.per_sample


def training_losses(
    model: Any,
    x1: Tensor,
    labels: Tensor,
    draws: Draws,
    config: DiffusionSection,
    null_label: int,
    features: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return the loss of every sample (B,) float32, and of it the loss of alignment, without its coefficient.

    An auxiliary head adds the same loss of its prediction.

    Args:
        model: a `DiT`; an `AlignedDiT` if there are `features`.
        x1: (B,T,C) latents.
        labels: (B,) int64. Some are replaced by `null_label`, as `draws` decides.
        draws: random values of the samples.
        config: section `diffusion` of a recipe.
        null_label: the label for 'no class'.
        features: (B,N,Z) features to align with, as the vision model gave them; None: no alignment.
    """
    if config.label_dropout > 0:
        labels = drop_labels(labels, draws.drop, config.label_dropout, null_label)
    whole = {} if features is not None or config.model.auxiliary_depth is None else {"everything": True}
    given: list[Outputs] = []

    def velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if features is None and not whole:
            return cast(Tensor, model(x, t, y))
        given.append(model(x, t, y, **whole))
        return given[0].velocity

    with autocast(x1.device, config.precision):
        total, _ = _losses(velocity, x1, labels, draws, config)
        if given and (auxiliary := given[0].auxiliary) is not None:
            total = total + _losses(lambda *_: auxiliary, x1, labels, draws, config)[0]
    if features is None or config.align is None:
        return total, None
    projected = cast(Tensor, given[0].tokens)
    aligned = representation_loss(projected, spatial_zscore(features) if config.align.zscore else features)
    return total + config.align.coefficient * aligned, aligned.detach()


@torch.no_grad()
def heldout_loss(
    model: DiT, cache: FeatureCache, config: DiffusionSection, group: ProcessGroup, say: Say = lambda text: None
) -> float | None:
    """Return the mean squared error on `eval_rows` evenly spread held-out rows; None without any.

    Noise and times are fixed. All processes of the group must call it. `say` receives messages about retries.
    """
    held = cache.heldout_rows  # of a sorted set, the first rows would be the first classes
    held = held[evenly_spread(len(held), config.eval_rows)]
    if not len(held):
        return None
    tokens, channels = model.grid[0] * model.grid[1], model.in_channels
    total, size = torch.zeros((), dtype=torch.float64, device=group.device), -(-config.batch_size // config.accumulate)
    for start in range(0, len(held), size):
        count = min(size, len(held) - start)
        share = group.local_slice(count)
        # All processes gather a sharded model at once: a process without rows computes one that does not count.
        places = [start + place for place in share] or [start]
        rows = held[places]
        stored = torch.from_numpy(call_with_retries(partial(cache.read, rows), say)).flatten(1, 2)
        labels = torch.from_numpy(cache.labels[rows].astype(np.int64)).to(group.device)
        draws = draws_at(
            config.seed, "heldout", places, tokens, channels, group.device, posterior=stored.shape[-1] != channels
        )
        x1 = draws.latents(stored.to(group.device).float())
        with autocast(group.device, config.precision):
            _, squared_error = _losses(model, x1, labels, draws, config)
        total += squared_error[: len(share)].sum()
    return float(group.sum(total)) / len(held)


@dataclass(frozen=True)
class Draws:
    """Random values of B samples with T tokens of C channels."""

    noise: Tensor  # (B,T,C) standard normal
    time: Tensor  # (B,) uniform in [0, 1), before any shift
    drop: Tensor  # (B,) uniform in [0, 1): small values drop the label
    posterior: Tensor | None = None  # (B,T,C) standard normal, for latents that are drawn from a posterior

    def latents(self, stored: Tensor) -> Tensor:
        """Return the latents (B,T,C): stored ones as they are, or drawn from stored means and deviations (B,T,2C)."""
        if self.posterior is None:
            return stored
        mean, std = stored.chunk(2, dim=-1)
        return mean + std * self.posterior


def draws_at(
    seed: int,
    step: int | str,
    positions: Sequence[int],
    tokens: int,
    channels: int,
    device: torch.device,
    *,
    posterior: bool = False,
) -> Draws:
    """Draw the random values of the samples at `positions`; `posterior`: the latents are drawn too.

    Times and label dropout use the CPU's generator and are the same on every device. Noise, most of the values, is
    drawn on the device: the same for all CPUs, and the same for all GPUs.

    Returns:
        Noise, times, dropout draws, and the noise of posteriors.
    """
    noise = torch.empty(len(positions), tokens, channels, device=device)
    from_posterior = torch.empty_like(noise) if posterior else None
    uniform = torch.empty(len(positions), 2)
    on_cpu, on_device = torch.Generator(), torch.Generator(device)
    for row, position in enumerate(positions):
        number = seed_of(seed, "step", step, position)
        uniform[row].uniform_(generator=on_cpu.manual_seed(number))
        noise[row].normal_(generator=on_device.manual_seed(number + 1))
        if from_posterior is not None:
            from_posterior[row].normal_(generator=on_device)
    time, drop = to_device(uniform, device).unbind(1)
    return Draws(noise, time, drop, from_posterior)


BUCKETS = 10


class LossByTime:
    """Mean loss in ten equal buckets of flow time, from noise (0) to data (1)."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, BUCKETS, device=device)  # losses, counts

    def add(self, losses: Tensor, times: Tensor) -> None:
        """Add losses (B,) of samples at times (B,) in [0, 1]."""
        places = (times * BUCKETS).long().clamp(0, BUCKETS - 1)
        self.sums.index_add_(1, places, torch.stack([losses.float(), torch.ones_like(losses, dtype=torch.float32)]))

    def summed(self, group: ProcessGroup) -> LossByTime:
        """Return the sum over all processes of the group."""
        total = LossByTime(self.sums.device)
        total.sums = group.sum(self.sums)
        return total

    def means(self) -> dict[str, float]:
        """Return `loss_t0` (times 0 to 0.1) … `loss_t9`, without empty buckets."""
        sums, counts = self.sums.tolist()
        return {f"loss_t{i}": sums[i] / counts[i] for i in range(BUCKETS) if counts[i]}
