"""The features that representation alignment aims at: of a second cache of the same images, or of the cache itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.errors import MismatchError, UsageError
from svgpipe.manifests.filesystem import absolute


@dataclass(frozen=True)
class AlignmentTarget:
    """Features of a vision model in a cache.

    Attributes:
        cache: where they are.
        own: whether it is the cache that is learned.
    """

    cache: FeatureCache
    own: bool

    @property
    def group(self) -> slice:
        """Channels of the vision model's features: a residual code is not aligned with."""
        return next(iter(self.cache.manifest.channel_groups.values()))

    @property
    def channels(self) -> int:
        """Number of these channels."""
        return self.group.stop - self.group.start

    def scaling(self) -> tuple[Tensor, Tensor]:
        """Return (Z,) factor and offset: feature = stored * factor + offset, as the vision model gave it."""
        factor, offset = self.cache.scaling
        return torch.from_numpy(factor[self.group].copy()), torch.from_numpy(offset[self.group].copy())

    def absolute(self) -> AlignmentTarget:
        """Return the same with an absolute path, for processes with another current directory."""
        return AlignmentTarget(FeatureCache(absolute(self.cache.path)), self.own)


def alignment_target(
    cache: FeatureCache, config: DiffusionSection, other: FeatureCache | None
) -> AlignmentTarget | None:
    """Return the target of a training; None if the recipe has no `align`.

    Args:
        cache: that is learned.
        config: section `diffusion` of a recipe.
        other: second cache; None: the features of `cache` itself.

    Raises:
        UsageError: a depth that the model does not have, posteriors instead of features, another grid, or no flips.
        MismatchError: the caches are of different shard sets.
    """
    if config.align is None:
        return None
    own = other is None or other.manifest.fingerprint == cache.manifest.fingerprint
    target = AlignmentTarget(cache if other is None or own else other, own)
    require_depth(config)
    _require_features(cache, target, config)
    if not own:
        _require_same_images(cache, target.cache)
    return target


def require_depth(config: DiffusionSection) -> None:
    """Check the block whose tokens are aligned.

    Raises:
        UsageError: the model has fewer blocks.
    """
    if config.align is not None and config.align.depth > config.model.depth:
        raise UsageError(
            f"diffusion.align.depth: expected at most the model's {config.model.depth} blocks, found "
            f"{config.align.depth}."
        )


def _require_features(cache: FeatureCache, target: AlignmentTarget, config: DiffusionSection) -> None:
    manifest, name = target.cache.manifest, target.cache.path
    if manifest.distribution == "gaussian" or "latent" in manifest.channel_groups:
        what = "Give a cache of kind vision or svg with --align."
        raise UsageError(f"{name}: expected features of a vision model to align with, found latents of a VAE. {what}")
    (rows, columns, _), patch = cache.manifest.latent_shape, config.model.patch_size or 1
    tokens, found = (rows // patch, columns // patch), manifest.latent_shape[:2]
    if found != tokens:
        raise UsageError(
            f"{name}: expected features of {tokens[0]}x{tokens[1]} places, one per token of the model, found "
            f"{found[0]}x{found[1]}. Change diffusion.model.patch_size, or extract features of another size."
        )
    if config.use_flips and set(cache.views) - set(target.cache.views):
        raise UsageError(
            f"{name}: holds no flipped images, but {cache.path} does. Extract both with the same extract.views, or set "
            "diffusion.use_flips=false."
        )


def _require_same_images(cache: FeatureCache, other: FeatureCache) -> None:
    ours, theirs = (one.manifest.inputs.get("shards") for one in (cache, other))
    found = [
        f"{one.path}: shard set {'not recorded' if shards is None else shards.fingerprint[:12]}"
        for one, shards in ((cache, ours), (other, theirs))
    ]
    if ours is None or theirs is None or ours.fingerprint != theirs.fingerprint:
        raise MismatchError(
            f"--align: expected a second cache of the same shard set, found\n  {found[0]}\n  {found[1]}\nRow i must be "
            "the same image in both. Extract both from one shard set."
        )
    assert np.array_equal(cache.labels, other.labels), "caches of one shard set have its labels"
