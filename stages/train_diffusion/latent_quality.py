"""Quality of samples in latent space, during training: no decoder, no images, no other network.

Latents are averaged over the grid. Their Fréchet distance to held-out rows measures the distribution. The fraction that
is nearest to the mean of its class measures the conditioning. The same numbers of real rows are reported: those of a
perfect model.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.model_manifests import EMA
from svgpipe.manifests.selection import evenly_spread
from svgpipe.models.dit import DiT
from svgpipe.models.feature_distances import frechet_distance, nearest_class_accuracy
from svgpipe.models.flow import shift_of

from ..networks.diffusion import trained_classes
from ..networks.sampling import SamplerSettings, sample_latents
from ..runtime.retry import Say, call_with_retries
from ..training.distributed import ProcessGroup
from .loss import draws_at

READ_ROWS = 256


class LatentQuality:
    """Measures models against the rows of one cache. All processes of the group must call it."""

    def __init__(self, cache: FeatureCache, config: DiffusionSection, group: ProcessGroup, say: Say) -> None:
        """Read `quality_rows` training rows and as many held-out rows, evenly spread."""
        self.cache, self.config, self.group, self.say = cache, config, group, say
        self.train, self.train_labels = self._pooled(cache.training_rows)
        self.held, self.held_labels = self._pooled(cache.heldout_rows)
        self.real = self._compare(self.train, self.held, self.held_labels)

    def _pooled(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        chosen = rows[evenly_spread(len(rows), self.config.quality_rows)]
        mine = chosen[np.asarray(self.group.local_slice(len(chosen)), np.int64)]
        parts = [torch.zeros(0, self.cache.manifest.latent_shape[-1])]
        for start in range(0, len(mine), READ_ROWS):
            parts.append(self._latents(mine[start : start + READ_ROWS]).mean(1))
        labels = torch.from_numpy(self.cache.labels[chosen].astype(np.int64))
        return self.group.gather_rows(torch.cat(parts), len(chosen)), labels

    def _latents(self, rows: NDArray[np.int64]) -> Tensor:
        """Return latents (B,T,C) of cache rows, drawn from their posteriors if they have any."""
        stored = torch.from_numpy(call_with_retries(partial(self.cache.read, rows), self.say)).flatten(1, 2).float()
        if self.cache.manifest.distribution == "point":
            return stored
        tokens, channels = stored.shape[1], stored.shape[2] // 2
        cpu = torch.device("cpu")
        return draws_at(self.config.seed, "quality", rows.tolist(), tokens, channels, cpu, posterior=True).latents(
            stored
        )

    def _compare(self, spread: Tensor, classified: Tensor, labels: Tensor) -> dict[str, float]:
        quality: dict[str, float] = {}
        if not self.group.is_main:  # all processes have the rows; one computes
            return quality
        if len(self.held) >= 2 and len(spread) >= 2:
            quality["latent_fd"] = frechet_distance(spread, self.held)
        if len(classified):
            accuracy = nearest_class_accuracy(self.train, self.train_labels, classified, labels)
            if accuracy is not None:
                quality["latent_accuracy"] = accuracy
        return quality

    def measure(self, model: DiT) -> dict[str, float]:
        """Return `latent_fd` and `latent_accuracy` of samples, and of real rows with the suffix `_real`."""
        count = self.config.quality_samples
        settings = settings_in_training(self.config, self.cache)
        samples = sample_in_training(
            model, count, settings, self.config, self.group, keep=lambda latents: latents.mean(1)
        ).cpu()
        quality = self._compare(samples, samples, settings.labels_of(range(count), model.num_classes))
        return quality | {f"{name}_real": value for name, value in self.real.items()}


def settings_in_training(config: DiffusionSection, cache: FeatureCache) -> SamplerSettings:
    """Return the settings of samples that are drawn during training."""
    classes = trained_classes(len(cache.classes), cache.untrained_classes)
    rows, columns, channels = cache.manifest.latent_shape
    return SamplerSettings(
        config.sample_steps,
        1.0,
        "ddim" if config.objective == "ddpm" else "euler",
        "constant",
        shift_of(config.sample_shift, rows * columns, channels),
        0,
        config.precision,
        EMA,
        classes=classes,
    )


def sample_in_training(
    model: DiT,
    count: int,
    settings: SamplerSettings,
    config: DiffusionSection,
    group: ProcessGroup,
    keep: Callable[[Tensor], Tensor] = lambda latents: latents,
) -> Tensor:
    """Sample the samples 0 to `count` - 1 of a model in training. All processes sample, and each gets all samples.

    Args:
        model: the model.
        count: number of samples.
        settings: of the sampler.
        config: batch size.
        group: processes that train the model.
        keep: (B,T,C) float32 latents → (B,…), the part to return.

    Returns:
        (count,…) on the group's device.
    """
    # All processes gather a sharded model at once, so each samples as many; surplus samples are dropped.
    mine, size = group.local_slice(count), -(-config.batch_size // config.accumulate)
    end = mine.start + group.largest_slice(count)
    chunks = [range(start, min(start + size, end)) for start in range(mine.start, end, size)]
    sampled = torch.cat([keep(sample_latents(model, indices, settings, group.device)) for indices in chunks])
    return group.gather_rows(sampled[: len(mine)], count)
