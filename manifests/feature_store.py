"""The Zarr v3 group that holds features, used by feature caches and for sampled latents. It needs no manifest.

    zarr.json               group attributes: class_names, views
    features/               (sample, view, row, column, channel); inner chunk: one sample and view, with crc32c;
                            outer shard: `unit_rows` samples, written completely by one writer
    label/ valid/ heldout/  (sample) int32, bool, bool
    channel_mean/ _std/     (channel) float32: normalised = (feature - channel_mean) / channel_std
    feature_scale/          (channel) float32, int8 stores only: normalised = stored * feature_scale

float16 chunks are uncompressed; int8 chunks are compressed with zstd. tensorstore writes the shards. Local rows are
read by chunk_reader.py, rows in object stores by tensorstore. Reading a shard that was never written raises an error;
it does not give zeros.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import zarr
from numpy.typing import ArrayLike, NDArray
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from .chunk_reader import ChunkReader
from .errors import ArtifactError, SvgpipeError, storage_error
from .filesystem import Location, children, kvstore, make_directory, write_atomic, zarr_store
from .manifest import read_json, write_json
from .store_spec import StoreSpec, unit_file

DIMENSIONS = ("sample", "view", "row", "column", "channel")
INT8_LIMIT = 127
ZSTD_LEVEL = 3
# Shard indexes that a reader caches: without the cache, every read fetches the index of its shard again.
INDEX_CACHE_BYTES = 64 << 20
# Requests to an object store at a time; tensorstore's default of 32 leaves a fast network idle.
REQUESTS = 256

Features = NDArray[np.float16]  # to be written
Values = NDArray[np.floating[Any]]  # as read: float16 or float32, see `FeatureStore.dequantize`


# The process that has used tensorstore. tensorstore aborts forks of it.
_tensorstore_pid: int | None = None


def _forked_after_use() -> bool:
    return _tensorstore_pid is not None and _tensorstore_pid != os.getpid()


def _open_group(path: Location) -> zarr.Group:
    """Return the group, opened by the metadata of every array, so that lost metadata is noticed."""
    return zarr.open_group(zarr_store(path), mode="r", zarr_format=3, use_consolidated=False)


class FeatureStore:
    """One Zarr group."""

    def __init__(self, path: Location, spec: StoreSpec) -> None:
        """Wrap the existing group at `path`. Use `create` or `open`."""
        self.path, self.spec = path, spec
        self._handles: dict[int, Any] = {}
        self._scale: NDArray[np.float32] | None = None
        self._reader: ChunkReader | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "spec": self.spec, "_handles": {}, "_scale": self._scale, "_reader": None}

    @classmethod
    def create(
        cls,
        path: Location,
        spec: StoreSpec,
        channel_mean: NDArray[np.float32],
        channel_std: NDArray[np.float32],
        feature_scale: NDArray[np.float32] | None = None,
    ) -> FeatureStore:
        """Create the metadata of a store at `path`; existing shards are kept.

        Returns:
            The store.

        Raises:
            ValueError: int8 without a scale per channel.
        """
        if (spec.dtype == "int8") != (feature_scale is not None):
            raise ValueError(f"a {spec.dtype} store with feature_scale {feature_scale is not None}")
        files: dict[str, Any] = {}
        group = zarr.create_group(MemoryStore(files), zarr_format=3)
        group.attrs.update({"class_names": list(spec.class_names), "views": list(spec.views)})
        tile = (*spec.grid, spec.channels)
        small = spec.dtype == "int8"
        group.create_array(
            "features",
            shape=(spec.num_samples, len(spec.views), *tile),
            dtype=spec.dtype,
            chunks=(1, 1, *tile),
            shards=(spec.unit_rows, len(spec.views), *tile),
            serializer="auto" if small else BytesCodec(endian="little"),
            compressors=[ZstdCodec(level=ZSTD_LEVEL), Crc32cCodec()] if small else [Crc32cCodec()],
            dimension_names=DIMENSIONS,
        )
        _write_files(path, files)
        store = cls(path, spec)
        store.put("channel_mean", channel_mean.astype(np.float32), "channel")
        store.put("channel_std", channel_std.astype(np.float32), "channel")
        if feature_scale is not None:
            store.put("feature_scale", feature_scale.astype(np.float32), "channel")
        return store

    @classmethod
    def open(cls, path: Location) -> FeatureStore:
        """Open an existing store.

        Returns:
            The store.

        Raises:
            ArtifactError: there is none.
        """
        try:
            group = _open_group(path)
            features = group["features"]
            names = (group.attrs["class_names"], group.attrs["views"])
        except (FileNotFoundError, KeyError, ValueError) as error:
            raise ArtifactError(f"{path}: expected a Zarr v3 group with features, found none ({error}).") from error
        assert isinstance(features, zarr.Array)
        dtype = str(features.dtype)
        if features.shards is None or len(features.shape) != len(DIMENSIONS) or dtype not in ("float16", "int8"):
            raise ArtifactError(
                f"{path}/features: expected a sharded float16 or int8 array over {DIMENSIONS}, found another array."
            )
        samples, _, rows, columns, channels = features.shape
        class_names, views = (tuple(str(v) for v in part) for part in names)  # type: ignore[union-attr]
        spec = StoreSpec(samples, views, (rows, columns), channels, features.shards[0], class_names, dtype)  # type: ignore[arg-type]
        return cls(path, spec)

    @property
    def group(self) -> zarr.Group:
        """The raw Zarr group, read-only."""
        return zarr.open_group(zarr_store(self.path), mode="r", zarr_format=3)

    def array(self, name: str) -> NDArray[Any]:
        """Return a small array (label, valid, channel_mean, …).

        Raises:
            ArtifactError: there is no such array, or its checksum is wrong.
        """
        try:
            array = _open_group(self.path)[name]
            assert isinstance(array, zarr.Array)
            return np.asarray(array[...])
        except (KeyError, FileNotFoundError, ValueError) as error:
            raise ArtifactError(f"{self.path}/{name}: expected an array, cannot read it: {error}") from error

    def put(self, name: str, values: NDArray[Any], *dimensions: str) -> None:
        """Write or replace a small array; `dimensions` names its axes."""
        files: dict[str, Any] = {}
        array = zarr.create_group(MemoryStore(files), zarr_format=3).create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=tuple(max(1, length) for length in values.shape),
            compressors=[Crc32cCodec()],
            dimension_names=dimensions,
            config={"write_empty_chunks": True},
        )
        array[...] = values
        del files["zarr.json"]
        _write_files(self.path, files)

    def describe(self, attributes: Mapping[str, Any]) -> None:
        """Add attributes to the group, and the metadata of its arrays.

        With this consolidated metadata, zarr opens the group by one read, and does not look at other files in it.
        """
        document = read_json(self.path / "zarr.json")
        document["attributes"] = {**document.get("attributes", {}), **attributes}
        arrays = [child for child in children(self.path) if (child / "zarr.json").exists()]
        metadata = {child.name: read_json(child / "zarr.json") for child in arrays}
        document["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": metadata}
        write_json(self.path / "zarr.json", document)

    @property
    def feature_scale(self) -> NDArray[np.float32] | None:
        """(channel,) factors of stored int8 values; None for float16."""
        if self.spec.dtype == "int8" and self._scale is None:
            self._scale = self.array("feature_scale").astype(np.float32)
        return self._scale

    def quantize(self, features: Features) -> NDArray[Any]:
        """Convert normalised float16 values (…, channel) to stored values; for int8 they are rounded and clipped.

        Returns:
            The stored values.
        """
        if (scale := self.feature_scale) is None:
            return features
        steps = np.rint(features.astype(np.float32) / scale)
        return np.clip(steps, -INT8_LIMIT, INT8_LIMIT, out=steps).astype(np.int8)

    def dequantize(self, stored: NDArray[Any]) -> Values:
        """Convert stored values back: float16 from a float16 store, float32 from int8.

        int8 gives float32, because numpy's rounding to float16 takes five times as long as the multiplication.

        Returns:
            The values.
        """
        if (scale := self.feature_scale) is None:
            return stored
        return np.multiply(stored, scale, dtype=np.float32)

    def forget(self) -> None:
        """Forget cached shard indexes, so that the next read sees restored files."""
        self._handles.clear()
        self._reader = None

    def _tensorstore(self, *, write: bool = False) -> Any:
        global _tensorstore_pid
        if _forked_after_use():
            raise SvgpipeError(
                f"{self.path}: this process was forked from a process that had used tensorstore, which does not work "
                'after a fork. Start the workers with multiprocessing_context="spawn".'
            )
        _tensorstore_pid = os.getpid()
        key = int(write)
        if key not in self._handles:
            spec = {
                "driver": "zarr3",
                "kvstore": kvstore(self.path / "features"),
                "fill_missing_data_reads": False,
                "store_data_equal_to_fill_value": True,
                "recheck_cached_data": "open",
                "context": {
                    "cache_pool": {"total_bytes_limit": 0 if write else INDEX_CACHE_BYTES},
                    "s3_request_concurrency": {"limit": REQUESTS},
                    "gcs_request_concurrency": {"limit": REQUESTS},
                },
            }
            try:
                self._handles[key] = ts.open(spec, open=True, read=True, write=write).result()
            except ValueError as error:
                raise ArtifactError(f"{self.path}/features: cannot be opened: {error}") from error
        return self._handles[key]

    def write_unit(self, unit: int, features: Features) -> NDArray[Any]:
        """Write outer shard `unit`.

        Args:
            unit: number of the outer shard.
            features: (rows, views, row, column, channel) float16, normalised.

        Returns:
            The values as stored.

        Raises:
            ValueError: wrong shape or dtype.
            OSError: the disk is full.
            ArtifactError: any other failure.
        """  # noqa: DOC501 - storage_error is a function
        rows, expected = self.spec.rows_of(unit), self.spec.shape_of(unit)
        if features.shape != expected or features.dtype != np.float16:
            raise ValueError(f"unit {unit}: expected float16 {expected}, found {features.dtype} {features.shape}")
        stored = self.quantize(features)
        # tensorstore would first read an existing last shard, which is seldom full, and would stop if it is damaged.
        self.unit_file(unit).unlink(missing_ok=True)
        try:
            self._tensorstore(write=True)[rows.start : rows.stop].write(stored).result()
        except ValueError as error:  # tensorstore raises it for all errors of the file system
            raise storage_error(self.unit_file(unit), error) from error
        return stored

    def unit_file(self, unit: int) -> Location:
        """Return the file of outer shard `unit`."""
        return unit_file(self.path, unit)

    def read_unit(self, unit: int) -> NDArray[Any]:
        """Return outer shard `unit` as stored, with every checksum verified.

        Raises:
            ArtifactError: it cannot be read.
        """
        rows = self.spec.rows_of(unit)
        return self._by_tensorstore(lambda features: features[rows.start : rows.stop])

    def read(self, indices: ArrayLike, view: str | ArrayLike = "original") -> Values:
        """Return rows (n, row, column, channel), normalised; see `dequantize` for the dtype.

        Args:
            indices: (n,) integers in any order; duplicates and negative indices are allowed.
            view: name of a view for all rows, or (n,) view numbers.

        Raises:
            IndexError: an index or a view number is out of range.
            ValueError: an unknown view name.
            ArtifactError: a shard is missing or has a wrong checksum.
        """
        return self.dequantize(self.read_stored(indices, view))

    def read_stored(self, indices: ArrayLike, view: str | ArrayLike = "original") -> NDArray[Any]:
        """Return rows like `read`, but as stored. Folders are read by `ChunkReader`, object stores by tensorstore.

        Raises:
            ArtifactError: a shard is missing or has a wrong checksum.
            OSError: storage fails.
        """
        rows = self._check_indices(indices)
        views = self._check_views(view, rows)
        if not isinstance(self.path, Path):
            return self._by_tensorstore(lambda features: features.vindex[rows, views])
        try:
            return self._chunks(self.path).read(rows, views)
        except (OSError, ArtifactError):
            self.forget()
            raise

    def _by_tensorstore(self, choose: Callable[[Any], Any]) -> NDArray[Any]:
        try:
            return np.asarray(choose(self._tensorstore()).read().result())
        except ValueError as error:  # tensorstore raises it for missing and corrupt chunks
            self.forget()
            raise ArtifactError(f"{self.path}: cannot read features: {error}") from error

    def _chunks(self, path: Path) -> ChunkReader:
        if self._reader is None or self._reader.pid != os.getpid():
            self._reader = ChunkReader(path, self.spec)
        return self._reader

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


def _write_files(path: Location, files: Mapping[str, Any]) -> None:
    """Write what zarr made in memory, each file atomically, chunks before the metadata that names them."""
    for key in sorted(files, key=lambda key: key.endswith("zarr.json")):
        target = path.joinpath(*key.split("/"))
        make_directory(target.parent)
        write_atomic(target, _without_blanks(files[key].to_bytes(), key))


def _without_blanks(content: bytes, key: str) -> bytes:
    """Return metadata in one stable form for all zarr versions."""
    return json.dumps(json.loads(content), indent=2).encode() if key.endswith("zarr.json") else content
