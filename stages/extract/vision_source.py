"""Vision features that a finished cache of the same shard set already holds, so that they are not computed again.

A cache of kind `svg` or `vision` begins with the channels of the vision model. They are normalised per channel, with
statistics of the same images. So they are the same numbers in every cache of one shard set, one vision model and one
section `extract`. A cache with the concatenated channels of several blocks also holds those of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.calibration import Calibration
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.feature_store import Features
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import Json, differing_fields
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.recipe import ExtractSection
from svgpipe.manifests.shards import ShardSet


@dataclass(frozen=True)
class VisionSource:
    """A finished float16 cache. Its channels `group`, F of them, are the wanted vision features."""

    cache: FeatureCache
    group: NDArray[np.int64]

    @classmethod
    def open(
        cls, path: Location, shards: ShardSet, encoder: AutoencoderManifest, config: ExtractSection
    ) -> VisionSource:
        """Open a cache, and check that an extraction would compute the same vision features.

        Args:
            path: the cache.
            shards: images of the extraction.
            encoder: autoencoder of the extraction.
            config: section `extract` of the extraction.

        Returns:
            The source.

        Raises:
            UsageError: the autoencoder of the extraction does not encode with a vision model, the store is int8, or the
                encoder is compiled, which rounds its parts otherwise than the whole.
            MismatchError: the features of the cache are others.
            ArtifactError: there is no finished cache, or the autoencoder that made it is gone.
        """
        if not encoder.frozen_channels:
            raise UsageError(f"vision features of {path}: kind {encoder.section.kind} does not encode with them.")
        if config.store_dtype != "float16":
            raise UsageError(f"vision features of {path}: only float16 caches share them, found {config.store_dtype}.")
        if config.compile:
            raise UsageError(f"vision features of {path}: copying them needs extract.compile=false.")
        cache = FeatureCache(path)
        made_from = cache.manifest.inputs
        if not cache.manifest.frozen_channels or "autoencoder" not in made_from:
            raise MismatchError(f"{path}: holds no vision features: expected a cache of kind svg or vision.")
        if "cache" in made_from:
            raise MismatchError(f"{path}: was requantized, so its vision features are rounded. Extract without it.")
        place = made_from["autoencoder"].place(cache.path)
        source = AutoencoderManifest.read(place)
        if source.fingerprint != made_from["autoencoder"].fingerprint:
            raise MismatchError(f"{path}: {place} is not the autoencoder that made it any more. Extract without it.")
        its_config = ExtractSection.model_validate(cache.manifest.config)
        there = _determining(made_from["shards"].fingerprint, source, its_config)
        here = _determining(shards.manifest.fingerprint, encoder, config)
        if (group := _blocks_inside(source, encoder)) is not None:
            here["backbone"] = there["backbone"]
        if lines := differing_fields(there, here):
            detail = "\n  ".join(lines)
            raise MismatchError(
                f"{path}: its vision features are not those of this extraction. They differ in:\n  {detail}\n"
                "Extract without it."
            )
        return cls(cache, np.arange(encoder.frozen_channels) if group is None else group)

    def require_same_statistics(self, calibration: Calibration) -> None:
        """Check that an extraction that was begun without the source normalises vision features as the source does.

        Raises:
            MismatchError: it does not.
        """
        own = self.complete(None)
        pairs = ((own.mean, calibration.mean), (own.std, calibration.std))
        if not all(np.array_equal(source, begun[: len(self.group)]) for source, begun in pairs):
            raise MismatchError(
                f"{self.cache.path}: normalises vision features with other numbers than the extraction that was begun. "
                "Go on without it."
            )

    def complete(self, residual: Calibration | None) -> Calibration:
        """Return the calibration of all channels: of the source, then that of the residual channels, if there are any.

        Raises:
            ArtifactError: the statistics of the source cannot be read.
        """
        own = Calibration(self.cache.channel_mean[self.group], self.cache.channel_std[self.group], None)
        if residual is None:
            return own
        mean, std = (np.concatenate(pair) for pair in ((own.mean, residual.mean), (own.std, residual.std)))
        return replace(own, mean=mean, std=std)

    def read(self, rows: Sequence[int], rejected: Sequence[int]) -> Features:
        """Return the features (n,view,row,column,F) of rows of the shard set; zeros for rejected ones.

        Args:
            rows: numbers in the shard set.
            rejected: positions in `rows` that the extraction rejects.

        Raises:
            ArtifactError: a row is valid now, but was rejected in the source; or features cannot be read.
        """
        valid = self.cache.valid[list(rows)]
        valid[list(rejected)] = True
        if not valid.all():
            row = rows[int(np.flatnonzero(~valid)[0])]
            raise ArtifactError(
                f"{self.cache.path}: row {row} was rejected there, but can be decoded now. Extract without it."
            )
        views: list[NDArray[np.float16]] = [
            self.cache.read(rows, view).astype(np.float16, copy=False) for view in self.cache.views
        ]
        first, last = int(self.group[0]), int(self.group[-1])
        if last - first + 1 == len(self.group):
            return np.stack(views, axis=1)[..., first : last + 1]
        return np.stack([np.take(view, self.group, axis=-1) for view in views], axis=1)


def _determining(shards: str, encoder: AutoencoderManifest, config: ExtractSection) -> Json:
    """Return what vision features depend on, as JSON values."""
    return {
        "shards": shards,
        "image_size": encoder.image_size,
        "backbone": _described(encoder),
        "backbone_weights": encoder.backbone_weights,
        "extract": config.model_dump(mode="json"),
    }


def _described(encoder: AutoencoderManifest) -> dict[str, Any]:
    """Return the settings of a vision model without those of its weights, as JSON values."""
    backbone = encoder.section.backbone
    described = backbone.model_dump(mode="json", exclude={"weights", "seed"})
    return {**described, "input_size": backbone.input_size or encoder.image_size}


def _blocks_inside(source: AutoencoderManifest, encoder: AutoencoderManifest) -> NDArray[np.int64] | None:
    """Return which channels of a source with concatenated blocks are the vision features of `encoder`.

    None for any other pair: one that has the same settings, or that differs in more than the blocks.
    """
    there, here = _described(source), _described(encoder)
    differing = {key for key in here if here[key] != there[key]}
    if not differing or not differing <= {"layers", "combine"} or here["spatial_mean"]:
        return None
    held, wanted = sorted(there["layers"] or ()), sorted(here["layers"] or ())
    if there["combine"] != "concat" or not set(wanted) <= set(held):
        return None
    if not wanted or (len(wanted) > 1 and here["combine"] != "concat"):
        return None
    width = source.frozen_channels // len(held)
    return np.concatenate([np.arange(width) + width * held.index(block) for block in wanted])
