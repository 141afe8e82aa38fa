"""The feature cache: normalised features of every image, in a Zarr v3 group that opens without svgpipe.

    zarr.json               group attributes: class_names, views, and (when finished) the manifest's content
    features/               (sample, view, row, column, channel) float16; inner chunk = one sample and one view,
                            crc32c on it; outer shard = `unit_rows` samples, written whole by one writer
    label/ valid/ heldout/  (sample) int32, bool, bool
    channel_mean/ _std/     (channel) float32: stored = (feature - channel_mean) / channel_std
    stored_mean/ _std/      (channel) float32: of what was written, over valid rows; near 0 and 1
    journal/                one record per outer shard: the proof that it was written

Bulk reads and writes go through tensorstore (60 times faster here than zarr-python's fancy indexing); zarr
creates, describes and inspects. A shard that was never written is an error to read here, not zeros.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import tensorstore as ts
import zarr
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from zarr.codecs import BytesCodec, Crc32cCodec

from svgpipe.manifests.errors import ArtifactError, storage_error
from svgpipe.manifests.manifest import Manifest

DIMENSIONS = ("sample", "view", "row", "column", "channel")
Features = NDArray[np.float16]


class CacheManifest(Manifest):
    """What a feature cache holds and what made it; training reads this before any row."""

    KIND: ClassVar[str] = "feature-cache"
    NOUN: ClassVar[str] = "a feature cache"
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset({"num_bytes"})

    kind: Literal["feature-cache"] = "feature-cache"
    num_samples: int
    num_valid: int
    num_rejected: int
    num_heldout: int
    feature_shape: tuple[int, int, int] = Field(description="rows, columns, channels")
    frozen_channels: int
    views: list[str]
    store_dtype: Literal["float16"] = "float16"
    unit_rows: int
    class_names: list[str]
    backbone: str
    backbone_weights: str = Field(description="As the recipe named them: hub, random, a file or a package.")
    content: str = Field(description="sha256 over the hashes of all outer shards, labels and statistics.")
    num_bytes: int


@dataclass(frozen=True)
class StoreSpec:
    """Shape of a feature store."""

    num_samples: int
    views: tuple[str, ...]
    grid: tuple[int, int]
    channels: int
    unit_rows: int
    class_names: tuple[str, ...]

    @property
    def num_units(self) -> int:
        """Outer shards."""
        return -(-self.num_samples // self.unit_rows)

    def rows_of(self, unit: int) -> range:
        """Samples of outer shard `unit`."""
        return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.num_samples))


class FeatureStore:
    """The Zarr group itself: shared by feature caches and generated latents. No manifest is needed."""

    def __init__(self, path: Path, spec: StoreSpec) -> None:
        """Wrap the existing group at `path`; use `create` or `open`."""
        self.path, self.spec = path, spec
        self._handles: dict[int, Any] = {}

    @classmethod
    def create(
        cls, path: Path, spec: StoreSpec, channel_mean: NDArray[np.float32], channel_std: NDArray[np.float32]
    ) -> FeatureStore:
        """Make an empty store, replacing arrays that an interrupted creation left behind."""
        group = zarr.open_group(path, mode="a", zarr_format=3)
        group.attrs.update({"class_names": list(spec.class_names), "views": list(spec.views)})
        tile = (*spec.grid, spec.channels)
        group.create_array(
            "features",
            shape=(spec.num_samples, len(spec.views), *tile),
            dtype="float16",
            chunks=(1, 1, *tile),
            shards=(spec.unit_rows, len(spec.views), *tile),
            serializer=BytesCodec(endian="little"),
            compressors=[Crc32cCodec()],
            dimension_names=DIMENSIONS,
            overwrite=True,
        )
        _put(group, "channel_mean", channel_mean.astype(np.float32), "channel")
        _put(group, "channel_std", channel_std.astype(np.float32), "channel")
        return cls(path, spec)

    @classmethod
    def open(cls, path: Path) -> FeatureStore:
        """Open an existing store. Raises ArtifactError if there is none."""
        try:
            group = zarr.open_group(path, mode="r", zarr_format=3)
            features = group["features"]
            names = (group.attrs["class_names"], group.attrs["views"])
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise ArtifactError(f"{path}: expected a Zarr v3 group with features, found none ({error}).") from error
        assert isinstance(features, zarr.Array)
        if features.shards is None or len(features.shape) != len(DIMENSIONS):
            raise ArtifactError(f"{path}/features: expected a sharded array over {DIMENSIONS}, found another.")
        samples, _, rows, columns, channels = features.shape
        class_names, views = (tuple(str(v) for v in part) for part in names)  # type: ignore[union-attr]
        spec = StoreSpec(samples, views, (rows, columns), channels, features.shards[0], class_names)
        return cls(path, spec)

    @property
    def group(self) -> zarr.Group:
        """The raw Zarr group, read-only."""
        return zarr.open_group(self.path, mode="r", zarr_format=3)

    def array(self, name: str) -> NDArray[Any]:
        """A small array (label, valid, channel_mean, …) read whole."""
        found = self.group[name]
        assert isinstance(found, zarr.Array)
        return np.asarray(found[...])

    def _tensorstore(self, *, write: bool = False) -> Any:
        # A handle made before a fork must not be used after it: its threads are gone.
        key = os.getpid() * 2 + write
        if key not in self._handles:
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": str(self.path.resolve() / "features") + "/"},
                "fill_missing_data_reads": False,
                "store_data_equal_to_fill_value": True,
            }
            self._handles = {k: v for k, v in self._handles.items() if k // 2 == os.getpid()}
            self._handles[key] = ts.open(spec, open=True, read=True, write=write).result()
        return self._handles[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "spec": self.spec, "_handles": {}}

    def write_unit(self, unit: int, features: Features) -> None:
        """Write outer shard `unit` whole: (rows, views, row, column, channel) float16.

        Raises:
            ValueError: another shape or dtype than the store's.
        """
        rows = self.spec.rows_of(unit)
        expected = (len(rows), len(self.spec.views), *self.spec.grid, self.spec.channels)
        if features.shape != expected or features.dtype != np.float16:
            raise ValueError(f"unit {unit}: expected float16 {expected}, found {features.dtype} {features.shape}")
        try:
            self._tensorstore(write=True)[rows.start : rows.stop].write(features).result()
        except ValueError as error:  # tensorstore's word for whatever the file system refused
            raise storage_error(self.unit_file(unit), error) from error

    def unit_file(self, unit: int) -> Path:
        """The file of outer shard `unit`."""
        return self.path / "features" / "c" / str(unit) / "0" / "0" / "0" / "0"

    def put(self, name: str, values: NDArray[Any], dimension: str = "sample") -> None:
        """Write a small one-dimensional array whole, replacing it."""
        _put(zarr.open_group(self.path, mode="a", zarr_format=3), name, values, dimension)

    def describe(self, attributes: dict[str, Any]) -> None:
        """Add attributes to the group."""
        zarr.open_group(self.path, mode="a", zarr_format=3).attrs.update(attributes)

    def read_async(self, indices: ArrayLike, view: str | ArrayLike = "original") -> Any:
        """Start reading; `.result()` gives what `read` would. Raises IndexError or ValueError at once."""
        rows = self._check_indices(indices)
        views = self._check_views(view, rows)
        return self._tensorstore().vindex[rows, views].read()

    def read(self, indices: ArrayLike, view: str | ArrayLike = "original") -> Features:
        """Rows in any order, duplicates and negative indices allowed: (n, row, column, channel) float16.

        Args:
            indices: (n,) integers.
            view: a view's name for all, or (n,) view numbers.
        Raises:
            IndexError: an index or view number out of range. ValueError: an unknown view name.
            ArtifactError: a shard that is missing or whose checksum is wrong.
        """
        future = self.read_async(indices, view)
        try:
            return np.asarray(future.result())
        except ValueError as error:  # tensorstore's word for missing and corrupt chunks
            raise ArtifactError(f"{self.path}: cannot read features: {error}") from error

    def _check_indices(self, indices: ArrayLike) -> NDArray[np.int64]:
        rows = np.atleast_1d(np.asarray(indices))
        if rows.size == 0:
            rows = rows.astype(np.int64)
        if not np.issubdtype(rows.dtype, np.integer) or rows.ndim != 1:
            raise IndexError(f"expected one-dimensional integer indices, found {rows.dtype} {rows.shape}")
        rows = rows.astype(np.int64)
        count = self.spec.num_samples
        bad = rows[(rows < -count) | (rows >= count)]
        if bad.size:
            raise IndexError(f"index {bad[0]}: expected {-count}..{count - 1}")
        return np.where(rows < 0, rows + count, rows)

    def _check_views(self, view: str | ArrayLike, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        names = self.spec.views
        if isinstance(view, str):
            if view not in names:
                raise ValueError(f"view {view!r}: expected one of {', '.join(names)}")
            return np.full(len(rows), names.index(view), np.int64)
        views = np.broadcast_to(np.asarray(view, np.int64), rows.shape)
        if views.size and (views.min() < 0 or views.max() >= len(names)):
            raise IndexError(f"view numbers: expected 0..{len(names) - 1}, found {views.min()}..{views.max()}")
        return views


def _put(group: zarr.Group, name: str, values: NDArray[Any], dimension: str) -> None:
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(max(1, len(values)),),
        compressors=[Crc32cCodec()],
        dimension_names=(dimension,),
        overwrite=True,
    )
    array[...] = values


@dataclass(frozen=True)
class CachedRow:
    """One sample of a cache."""

    features: Features  # (row, column, channel), normalised, view `original`
    label: int
    class_name: str
    valid: bool
    heldout: bool


class FeatureCache(Sequence[CachedRow]):
    """A finished feature cache.

    >>> cache = FeatureCache("runs/demo/cache")       # doctest: +SKIP
    >>> batch = cache.read([5, 3, 3], view="flip")    # (3, rows, columns, channels) float16, normalised
    >>> features = cache.denormalize(batch)           # float32, as the autoencoder's decoder wants them
    """

    def __init__(self, path: str | Path) -> None:
        """Open the cache at `path`.

        Raises:
            ArtifactError: no finished cache there, or its arrays are not what its manifest says.
        """
        self.path = Path(path)
        self.manifest = CacheManifest.read(self.path)
        self.store = FeatureStore.open(self.path)
        spec = self.store.spec
        found = (spec.num_samples, (*spec.grid, spec.channels))
        if found != (self.manifest.num_samples, self.manifest.feature_shape):
            raise ArtifactError(
                f"{self.path}: expected {self.manifest.num_samples} samples of {self.manifest.feature_shape}, "
                f"found {found[0]} of {found[1]}. The store was altered after its manifest was written."
            )

    def __len__(self) -> int:
        return self.manifest.num_samples

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(samples, views, rows, columns, channels)"""
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
        """(samples,) class of every sample."""
        return self.store.array("label").astype(np.int32)

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """(samples,) False where the image could not be decoded: its features are zeros."""
        return self.store.array("valid").astype(np.bool_)

    @cached_property
    def heldout(self) -> NDArray[np.bool_]:
        """(samples,) True for images that no training may use."""
        return self.store.array("heldout").astype(np.bool_)

    @cached_property
    def channel_mean(self) -> NDArray[np.float32]:
        """(channels,) subtracted before storing."""
        return self.store.array("channel_mean").astype(np.float32)

    @cached_property
    def channel_std(self) -> NDArray[np.float32]:
        """(channels,) divided by before storing."""
        return self.store.array("channel_std").astype(np.float32)

    @property
    def group(self) -> zarr.Group:
        """The raw Zarr group, read-only."""
        return self.store.group

    def __getitem__(self, index: Any) -> Any:
        """One sample as a `CachedRow`. Raises IndexError out of range; slices are not supported, use `read`."""
        if isinstance(index, slice):
            raise TypeError("a cache gives single rows by index; use read(range(...)) for several")
        features = self.read([index])[0]
        i = int(index)
        label = int(self.labels[i])
        return CachedRow(features, label, self.classes[label], bool(self.valid[i]), bool(self.heldout[i]))

    def read(self, indices: ArrayLike, view: str | ArrayLike = "original") -> Features:
        """Rows in any order with duplicates; see `FeatureStore.read`."""
        return self.store.read(indices, view)

    def read_async(self, indices: ArrayLike, view: str | ArrayLike = "original") -> Any:
        """As `read`, but returns at once with a future."""
        return self.store.read_async(indices, view)

    def denormalize(self, features: NDArray[Any]) -> NDArray[np.float32]:
        """Stored (…, channel) values → features as encoded, float32."""
        return np.asarray(features, np.float32) * self.channel_std + self.channel_mean
