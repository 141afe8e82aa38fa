"""Images between two noises, or between two classes: the paper's figures of interpolation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from svgpipe.models.dit import DiT

from ..images.decode import RGBArray
from ..networks.sampling import SamplerSettings, initial_noise
from ..runtime.progress import Progress
from .image_sampler import BATCH, ImageSampler


def lerp(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Return (F,…) mixtures (1 - s) first + s second, for shares s (F,)."""
    s = shares.view(-1, *[1] * first.ndim)
    return (1 - s) * first + s * second


def slerp(first: Tensor, second: Tensor, shares: Tensor) -> Tensor:
    """Return (F,…) points on the arc between two tensors: their norm is that of noise, unlike that of a mixture.

    Source: Shoemake, Animating Rotation with Quaternion Curves (1985).
    """
    cosine = (first * second).sum() / (first.norm() * second.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle < 1e-4:  # the same tensor twice
        return lerp(first, second, shares)
    s = shares.view(-1, *[1] * first.ndim)
    return (torch.sin((1 - s) * angle) * first + torch.sin(s * angle) * second) / torch.sin(angle)


def between_seeds(
    sampler: ImageSampler,
    label: int,
    seeds: Sequence[int],
    shares: Sequence[float],
    settings: SamplerSettings,
    progress: Progress,
) -> tuple[RGBArray, RGBArray]:
    """Return images (F,H,W,3) of a class by lerp and by slerp of the noises of two seeds, for F shares from 0 to 1.

    The ends are the first images of the class with these seeds, if the solver is deterministic. The noise of another
    solver's steps is the same for all, of the seed of `settings`.
    """
    cells, channels = sampler.trained.cells, sampler.trained.channels
    first, second = (initial_noise(seed, [0], cells, channels)[0] for seed in seeds)
    by = torch.tensor(shares)
    labels = [label] * len(shares)
    return (
        _images(sampler, labels, lerp(first, second, by), settings, progress),
        _images(sampler, labels, slerp(first, second, by), settings, progress),
    )


def between_classes(
    sampler: ImageSampler,
    classes: Sequence[int],
    shares: Sequence[float],
    settings: SamplerSettings,
    progress: Progress,
) -> RGBArray:
    """Return images (F,H,W,3) from one noise, whose label embedding is a mixture of those of two classes."""
    noise = initial_noise(settings.seed, [0], sampler.trained.cells, sampler.trained.channels)
    with _mixed_labels(sampler.model(settings), classes, torch.tensor(shares)) as labels:
        return _images(sampler, labels, noise.expand(len(shares), -1, -1), settings, progress)


@contextmanager
def _mixed_labels(model: DiT, classes: Sequence[int], shares: Tensor) -> Iterator[list[int]]:
    """Give every mixture of two classes a label of its own inside the context.

    Yields:
        The labels.
    """
    embedder, table = model.y_embedder, model.y_embedder.embedding_table
    rows = table.weight.detach()
    mixed = lerp(rows[classes[0]], rows[classes[1]], shares.to(rows))
    embedder.embedding_table = nn.Embedding.from_pretrained(torch.cat([rows, mixed]))
    try:
        yield list(range(len(rows), len(rows) + len(shares)))
    finally:
        embedder.embedding_table = table


def _images(
    sampler: ImageSampler, labels: Sequence[int], noise: Tensor, settings: SamplerSettings, progress: Progress
) -> RGBArray:
    """Return images (F,H,W,3); a stochastic solver adds the same noise to all, so that only the beginning differs."""
    images = []
    for i, part in zip(range(0, len(noise), BATCH), noise.split(BATCH), strict=True):
        chosen = labels[i : i + BATCH]
        images.append(sampler.decode(sampler.latents(chosen, [0] * len(part), settings, noise=part)))
        progress.advance(len(part))
    return np.concatenate(images)
