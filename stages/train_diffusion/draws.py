"""What a training step draws at random: a function of (seed, step, position in the global batch), sample by sample.

So neither the number of workers, nor micro-batches, nor a resume changes what a sample meets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..runtime.device import seed_of, to_device


@dataclass(frozen=True)
class Draws:
    """Of B samples with T tokens of C channels."""

    noise: Tensor  # (B,T,C) standard normal
    time: Tensor  # (B,) uniform in [0, 1), before any shift
    drop: Tensor  # (B,) uniform in [0, 1): a label is dropped where it is small


def image_draws_at(
    seed: int, step: int, positions: Sequence[int], device: torch.device
) -> tuple[Tensor, list[torch.Generator]]:
    """For autoencoder training: (B,) uniform draws for masking, and what every image's dropout is drawn from."""
    seeds = [seed_of(seed, "image", step, position) for position in positions]
    mask = torch.cat([torch.rand(1, generator=torch.Generator().manual_seed(number)) for number in seeds])
    return to_device(mask, device), [torch.Generator(device).manual_seed(number + 1) for number in seeds]


def draws_at(
    seed: int, step: int | str, positions: Sequence[int], tokens: int, channels: int, device: torch.device
) -> Draws:
    """Draw for the samples at `positions`.

    Times and label dropout come from the CPU's generator, the same on every device. Noise, which is nearly all of it,
    is drawn where it is used: the same for all CPUs, and the same for all GPUs.
    """
    noise = torch.empty(len(positions), tokens, channels, device=device)
    uniform = torch.empty(len(positions), 2)
    on_cpu, on_device = torch.Generator(), torch.Generator(device)
    for row, position in enumerate(positions):
        number = seed_of(seed, "step", step, position)
        uniform[row].uniform_(generator=on_cpu.manual_seed(number))
        noise[row].normal_(generator=on_device.manual_seed(number + 1))
    time, drop = to_device(uniform, device).unbind(1)
    return Draws(noise, time, drop)
