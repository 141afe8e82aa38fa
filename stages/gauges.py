"""What a training run is watched by, gathered without making a step wait for the device."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

from svgpipe.stages.team import Team

BUCKETS = 10


class LossByTime:
    """Mean loss in ten equal buckets of the flow's time: near 0 the model sees noise, near 1 data."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, BUCKETS, device=device)  # losses, counts

    def add(self, losses: Tensor, times: Tensor) -> None:
        """Losses (B,) of samples at times (B,) in [0, 1]."""
        places = (times * BUCKETS).long().clamp(0, BUCKETS - 1)
        self.sums.index_add_(1, places, torch.stack([losses.float(), torch.ones_like(losses, dtype=torch.float32)]))

    def summed(self, team: Team) -> LossByTime:
        """The same over all processes of the team."""
        total = LossByTime(self.sums.device)
        total.sums = team.sum(self.sums)
        return total

    def means(self) -> dict[str, float]:
        """`loss_t0` (times 0 to 0.1) … `loss_t9`; a bucket that nothing fell into is left out."""
        sums, counts = self.sums.tolist()
        return {f"loss_t{i}": sums[i] / counts[i] for i in range(BUCKETS) if counts[i]}


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the device's allocator on CUDA, by this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage, whose value begins with that of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
