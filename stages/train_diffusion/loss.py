"""The flow loss of training and held-out rows, with everything random decided by row.

Legend: B batch, T tokens, C channels.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.models.dit import DiT
from svgpipe.models.flow import Velocity, drop_labels, flow_loss, shift_time

from ..runtime.device import autocast
from ..runtime.retry import Say, patiently
from ..training.distributed import Team
from .draws import Draws, draws_at


def sample_losses(
    velocity: Velocity, x1: Tensor, labels: Tensor, draws: Draws, config: DiffusionSection, *, null_label: int | None
) -> Tensor:
    """(B,) float32 flow losses at latents (B,T,C) and labels (B,); labels are dropped where `null_label` is given."""
    time = shift_time(draws.time, config.time_shift)
    if null_label is not None and config.label_dropout > 0:
        labels = drop_labels(labels, draws.drop, config.label_dropout, null_label)
    with autocast(x1.device, config.precision):
        return flow_loss(velocity, x1, draws.noise, time, labels).per_sample


@torch.no_grad()
def heldout_loss(
    model: DiT, cache: FeatureCache, config: DiffusionSection, team: Team, say: Say = lambda text: None
) -> float | None:
    """Mean flow loss on the first `eval_rows` held-out rows, with noise and times that never change.

    Every process of the team must call it; `say` is told when storage fails and is tried again. None where the cache
    has no held-out row.
    """
    held = np.flatnonzero(cache.valid & cache.heldout)[: config.eval_rows]
    if not len(held):
        return None
    tokens, channels = model.grid[0] * model.grid[1], model.in_channels
    total, size = torch.zeros((), dtype=torch.float64, device=team.device), -(-config.batch_size // config.accumulate)
    for start in range(0, len(held), size):
        count = min(size, len(held) - start)
        share = team.share(count)
        # A sharded model is gathered by all at once: who has nothing left computes a row that does not count.
        places = [start + place for place in share] or [start]
        rows = held[places]
        x1 = torch.from_numpy(patiently(partial(cache.read, rows), say)).flatten(1, 2).to(team.device).float()
        labels = torch.from_numpy(cache.labels[rows].astype(np.int64)).to(team.device)
        draws = draws_at(config.seed, "heldout", places, tokens, channels, team.device)
        total += sample_losses(model, x1, labels, draws, config, null_label=None)[: len(share)].sum()
    return float(team.sum(total)) / len(held)
