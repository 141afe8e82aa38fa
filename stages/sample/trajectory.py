"""What a sampling passes through: the state of every step, decoded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from svgpipe.manifests.errors import UsageError

from ..images.decode import RGBArray
from ..networks.sampling import SamplerSettings
from ..runtime.progress import Progress, Silent
from .image_sampler import BATCH, ImageSampler, places_of


def trajectory(
    sampler: ImageSampler, labels: Sequence[int], settings: SamplerSettings, progress: Progress | None = None
) -> RGBArray:
    """Return the decoded noise, and the decoded state after every step: (steps+1,N,H,W,3). The last are the samples.

    Raises:
        UsageError: the solver has no common steps.
    """
    if settings.solver == "dopri5":
        raise UsageError("--show-steps: solver dopri5 chooses the steps of every sample itself. Choose another solver.")
    places, batches = places_of(labels), range(0, len(labels), BATCH)
    shown = progress or Silent()
    shown.begin("sample and decode", 2 * len(batches) * (settings.steps + 1), "states")
    parts = [_states(sampler, labels[i : i + BATCH], places[i : i + BATCH], settings, shown) for i in batches]
    return np.concatenate(parts, axis=1)


def _states(
    sampler: ImageSampler, labels: Sequence[int], places: Sequence[int], settings: SamplerSettings, progress: Progress
) -> RGBArray:
    states: list[Tensor] = []

    def watch(state: Tensor) -> None:
        states.append(state.float().cpu())
        progress.advance()

    sampler.latents(labels, places, settings, watch=watch)
    images = []
    for state in states:
        images.append(sampler.decode(state))
        progress.advance()
    return np.stack(images)
