"""Plain chunks straight from local shard files: what tensorstore reads too, in a third of the time.

A Zarr shard ends with its index: offset and length of every inner chunk (little-endian uint64), then the index's
crc32c. A plain chunk is its values followed by their crc32c. One read per row goes straight into the result, where
tensorstore copies three times. Oracle: FeatureStore.read_async, which a test compares with.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.errors import ArtifactError

if TYPE_CHECKING:
    from svgpipe.manifests.store import Features, FeatureStore

CRC_BYTES = 4
# Open files that a reader keeps; a random batch touches about as many shards as it has rows.
FILES_KEPT = 256


class ChunkReader:
    """Reads rows of a local float16 store, for one thread at a time. A forked process needs a reader of its own."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store
        self._files: OrderedDict[int, _ShardFile] = OrderedDict()
        self._turn = threading.Lock()
        self.pid = os.getpid()

    @staticmethod
    def fits(store: FeatureStore) -> bool:
        """Whether the store's chunks are plain and its files local."""
        return isinstance(store.path, Path) and store.spec.dtype == "float16"

    def read(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> Features:
        """(n, row, column, channel) float16. Raises ArtifactError for a missing shard or a wrong checksum."""
        spec = self._store.spec
        result = np.empty((len(rows), *spec.grid, spec.channels), np.float16)
        flat = result.view(np.uint8).reshape(-1).data
        size = result.nbytes // max(1, len(rows))
        with self._turn:
            for i, (row, view) in enumerate(zip(rows.tolist(), views.tolist(), strict=True)):
                unit, inside = divmod(row, spec.unit_rows)
                chunk = inside * len(spec.views) + view
                self._file(unit).read_into(chunk, flat[i * size : (i + 1) * size], row)
        return result

    def _file(self, unit: int) -> _ShardFile:
        file = self._files.get(unit)
        if file is None:
            spec = self._store.spec
            path = self._store.unit_file(unit)
            assert isinstance(path, Path)
            file = self._files[unit] = _ShardFile(path, spec.unit_rows * len(spec.views))
            if len(self._files) > FILES_KEPT:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(unit)
        return file

    def close(self) -> None:
        """Close all files."""
        while self._files:
            self._files.popitem()[1].close()

    def __del__(self) -> None:
        self.close()


class _ShardFile:
    """One open shard and its index."""

    def __init__(self, path: Path, chunks: int) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise self._wrong("no such shard was written") from error
        length = chunks * 16 + CRC_BYTES
        start = os.fstat(self._handle).st_size - length
        raw = os.pread(self._handle, length, start) if start >= 0 else b""
        if len(raw) < length or _crc(raw[:-CRC_BYTES]) != raw[-CRC_BYTES:]:
            self.close()
            raise self._wrong("its index is damaged or cut short")
        self._index = np.frombuffer(raw[:-CRC_BYTES], "<u8").reshape(chunks, 2)

    def read_into(self, chunk: int, target: memoryview, row: int) -> None:
        """Fill `target` with one chunk, checked."""
        offset, length = (int(value) for value in self._index[chunk])
        if length != len(target) + CRC_BYTES:
            raise self._wrong(f"row {row} was never written, or is of another size")
        crc = bytearray(CRC_BYTES)
        if os.preadv(self._handle, [target, crc], offset) != length or _crc(target) != crc:
            raise self._wrong(f"row {row}: its checksum is wrong")

    def _wrong(self, problem: str) -> ArtifactError:
        return ArtifactError(f"{self.path}: cannot read features: {problem}. `svgpipe verify --deep` names the damage.")

    def close(self) -> None:
        os.close(self._handle)


def _crc(data: bytes | memoryview) -> bytes:
    return int(google_crc32c.value(bytes(data))).to_bytes(CRC_BYTES, "little")
