"""What a training run is watched by, gathered without making a step wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..training.distributed import Team

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
