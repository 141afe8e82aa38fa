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
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import zarr
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from .errors import ArtifactError
from .feature_store import FeatureStore, Values
from .filesystem import Location, absolute, location
from .manifest import Json, Manifest, digest
from .store_spec import StoreDtype, StoreSpec

STATISTICS = ("stored_mean", "stored_std", "stored_min", "stored_max", "stored_covariance")


class CacheManifest(Manifest):
    """What a feature cache holds and what it was made from."""

    KIND: ClassVar[str] = "feature-cache"
    NOUN: ClassVar[str] = "a feature cache"
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset({"num_bytes", "timings"})

    kind: Literal["feature-cache"] = "feature-cache"
    num_samples: int
    num_valid: int
    num_rejected: int
    num_heldout: int
    feature_shape: tuple[int, int, int] = Field(description="rows, columns, channels")
    frozen_channels: int
    views: list[str]
    store_dtype: StoreDtype = "float16"
    unit_rows: int
    class_names: list[str]
    backbone: str
    backbone_weights: str = Field(description="Weights as named in the recipe: hub, random, a file or a package.")
    content: str = Field(description="sha256 over the hashes of all outer shards, labels and statistics.")
    num_bytes: int
    timings: Json = Field(default_factory=dict, description="Seconds per worker of the run that finished the cache.")

    @property
    def spec(self) -> StoreSpec:
        """Shape of the store."""
        rows, columns, channels = self.feature_shape
        return StoreSpec(
            num_samples=self.num_samples,
            views=tuple(self.views),
            grid=(rows, columns),
            channels=channels,
            unit_rows=self.unit_rows,
            class_names=tuple(self.class_names),
            dtype=self.store_dtype,
        )

    @property
    def array_names(self) -> list[str]:
        """Names of the small arrays of the store."""
        scale = ["feature_scale"] if self.store_dtype == "int8" else []
        return ["label", "valid", "heldout", "channel_mean", "channel_std", *scale, *STATISTICS]

    @staticmethod
    def content_of(store: FeatureStore, unit_hashes: Sequence[str]) -> str:
        """Return the expected value of `content`: a digest over all outer shards and the small arrays."""
        names = ["label", "valid", "heldout", "channel_mean", "channel_std"]
        if store.spec.dtype == "int8":
            names.append("feature_scale")
        return digest([list(unit_hashes), {name: digest(store.array(name).tolist()) for name in names}])


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

    def read_stored(self, indices: ArrayLike, view: str | ArrayLike = "original") -> NDArray[Any]:
        """Return rows as stored, int8 or float16; see `FeatureStore.read_stored`."""
        return self.store.read_stored(indices, view)

    def denormalize(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """Return stored values (…, channel) as the float32 features that were encoded."""
        return np.asarray(features, np.float32) * self.channel_std + self.channel_mean
