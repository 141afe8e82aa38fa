"""The feature cache: normalised features of every image in a Zarr v3 group that opens without svgpipe.

zarr.json, features/, …   the store, see feature_store.py; in a finished cache its attributes hold the manifest
stored_mean/ _std/ _min/ _max/   (channel) float32: statistics of the stored values of all valid rows
stored_covariance/        (channel, channel) float64: of the original view of 512 valid rows
journal/                  one record per outer shard, with its hash and moments; and the calibration:
                          channel_mean, channel_std and the int8 steps, fixed before any unit is written
rejected.jsonl            row, tar, offset, key, reason; samples = valid + rejected
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray

from .cache_creation import UNIT_ROWS, UNKNOWN, Options, create_cache
from .cache_manifest import CacheManifest
from .errors import ArtifactError
from .feature_store import FeatureStore, Values
from .filesystem import Location, absolute, location
from .store_spec import Distribution


class CachedRow(NamedTuple):
    """One sample of a cache. torch's DataLoader collates it."""

    features: Values  # (row, column, channel), normalised, view `original`
    label: int
    class_name: str
    valid: bool
    heldout: bool


class FeatureCache(Sequence[CachedRow]):
    """A finished feature cache.

    >>> cache = FeatureCache("runs/demo/cache")       # doctest: +SKIP
    >>> batch = cache.read([5, 3, 3], view="flip")    # (3, rows, columns, channels), normalised
    >>> features = cache.denormalize(batch)           # float32, the input of the autoencoder's decoder
    """

    def __init__(self, path: str | Location) -> None:
        """Open the cache at `path`.

        Raises:
            ArtifactError: there is no finished cache, or its arrays do not match its manifest.
        """
        self.manifest = CacheManifest.read(location(path))
        self.path = absolute(location(path))  # the current directory may change
        self.store = FeatureStore.open(self.path)
        spec, expected = self.store.spec, self.manifest.spec
        if spec != expected:
            raise ArtifactError(
                f"{self.path}: expected {expected.num_samples} samples of {(*expected.grid, expected.channels)} "
                f"{expected.dtype}, found {spec.num_samples} of {(*spec.grid, spec.channels)} {spec.dtype}, or other "
                "views or classes. The store was changed after its manifest was written."
            )

    @classmethod
    def create(
        cls,
        path: str | Location,
        features: Any,
        labels: ArrayLike,
        *,
        class_names: Sequence[str] | None = None,
        mean: ArrayLike | None = None,
        std: ArrayLike | None = None,
        heldout: ArrayLike | None = None,
        distribution: Distribution = "point",
        encoder: str = UNKNOWN,
        unit_rows: int = UNIT_ROWS,
    ) -> FeatureCache:
        """Make a cache of features that were computed elsewhere. An interrupted call is made again from the start.

        Args:
            path: directory to create.
            features: (n, row, column, channel), or (n, view, row, column, channel) with the views original and flip:
                an array (NumPy, memmap, Zarr, HDF5, torch) or an iterator of batches. The channel is last: latents
                (n, channel, row, column) need `numpy.moveaxis(latents, 1, -1)`.
            labels: (n,) class numbers from 0.
            class_names: in label order; None: the numbers.
            mean: subtracted from the features, one number or one per channel; None: measured on 4,096 training rows.
            std: they are divided by it; required with `mean`, and both with an iterator.
            heldout: (n,) True for rows that are kept out of training.
            distribution: gaussian: the first half of the channels holds the means and the second half the standard
                deviations of a posterior, and `mean` and `std` are those of the latents drawn from it.
            encoder: what made the features, for pages.
            unit_rows: rows per file.

        Returns:
            The cache.

        Raises:
            UsageError: labels, shapes or statistics do not fit, or `path` holds a cache.
            ArtifactError: a feature is not finite.
        """
        options = Options(class_names, mean, std, heldout, distribution, encoder, unit_rows)
        create_cache(path, features, labels, options)
        return cls(path)

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(samples, views, rows, columns, channels)."""
        return (len(self), len(self.views), *self.manifest.feature_shape)

    @property
    def views(self) -> list[str]:
        """Names of the stored views, `original` first."""
        return list(self.manifest.views)

    @property
    def classes(self) -> list[str]:
        """Class names; a label is an index into them."""
        return list(self.manifest.class_names)

    @cached_property
    def labels(self) -> NDArray[np.int32]:
        """(samples,) class index of every sample."""
        return self.store.array("label").astype(np.int32)

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """(samples,) False where the image could not be decoded; its features are zeros."""
        return self.store.array("valid").astype(np.bool_)

    @cached_property
    def heldout(self) -> NDArray[np.bool_]:
        """(samples,) True for images that are kept out of training."""
        return self.store.array("heldout").astype(np.bool_)

    @property
    def training_rows(self) -> NDArray[np.int64]:
        """(n,) rows for training: valid and not held out."""
        return np.flatnonzero(self.valid & ~self.heldout)

    @property
    def heldout_rows(self) -> NDArray[np.int64]:
        """(n,) held-out rows that are valid."""
        return np.flatnonzero(self.valid & self.heldout)

    @property
    def untrained_classes(self) -> list[int]:
        """Class indexes without a row for training."""
        counts = np.bincount(self.labels[self.training_rows], minlength=len(self.classes))
        return np.flatnonzero(counts == 0).tolist()

    @cached_property
    def channel_mean(self) -> NDArray[np.float32]:
        """(channels,) mean that was subtracted before storing."""
        return self.store.array("channel_mean").astype(np.float32)

    @cached_property
    def channel_std(self) -> NDArray[np.float32]:
        """(channels,) standard deviation that features were divided by before storing."""
        return self.store.array("channel_std").astype(np.float32)

    @property
    def scaling(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """(channels,) factor and offset of stored values: feature as it was encoded = stored * factor + offset."""
        scale = self.store.feature_scale
        return (self.channel_std if scale is None else self.channel_std * scale), self.channel_mean

    @property
    def group(self) -> zarr.Group:
        """The raw Zarr group, read-only."""
        return self.store.group

    def __getitem__(self, index: Any) -> Any:
        """Return one sample as a `CachedRow`. Slices are not supported; use `read`.

        Raises:
            IndexError: out of range.
            TypeError: `index` is a slice.
        """
        if isinstance(index, slice):
            raise TypeError("a cache gives single rows by index; use read(range(...)) for several rows")
        features = self.read([index])[0]
        i = int(index)
        label = int(self.labels[i])
        name = self.classes[label] if label >= 0 else ""  # a rejected image may have no label
        return CachedRow(features, label, name, bool(self.valid[i]), bool(self.heldout[i]))

    def read(self, indices: ArrayLike, view: str | ArrayLike = "original") -> Values:
        """Return rows in any order, duplicates allowed; see `FeatureStore.read`."""
        return self.store.read(indices, view)

    def read_latents(self, indices: ArrayLike, view: str | ArrayLike = "original") -> Values:
        """Return rows like `read`, as points: of a posterior cache the means alone."""
        return self.read(indices, view)[..., : self.manifest.latent_shape[-1]]

    def read_stored(self, indices: ArrayLike, view: str | ArrayLike = "original") -> NDArray[Any]:
        """Return rows as stored, int8 or float16; see `FeatureStore.read_stored`."""
        return self.store.read_stored(indices, view)

    def denormalize(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """Return normalised values (…, channel) as the float32 features that were encoded.

        Fewer channels are the first ones, such as latents of a posterior cache.
        """
        channels = features.shape[-1]
        return np.asarray(features, np.float32) * self.channel_std[:channels] + self.channel_mean[:channels]
