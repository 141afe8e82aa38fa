"""Whole files of a cache on a local disk, for caches in an object store or on a slow network disk.

    DIR/CONTENT-RUN/features/c/UNIT/0/0/0/0     outer shards, in the layout of the cache

A file is an outer shard, a unit of the cache. Threads download files in the background. Rows whose file is not there
are read from the cache itself, so a read never waits for a download, never gives other values, and does not fail when
the local disk does. Every training has its own folder; its workers on one machine share it.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import FeatureCache
from .chunk_reader import ChunkReader
from .errors import ArtifactError, UsageError, first_line
from .filesystem import file_size, make_directory, remove_partials, write_atomic
from .manifest import digest
from .store_spec import unit_file

DOWNLOADS = 8  # threads, each with one file in memory
WAITS_S = (1.0, 5.0, 25.0)  # before a failed download is tried again
CLOSE_S = 10.0  # a hanging store must not keep a finished training alive
STALE_S = 600.0  # a temporary file without writes for this long belongs to a killed process


@dataclass(frozen=True)
class LocalDisk:
    """Where copies are kept, and how many bytes they may take, besides the files that are being downloaded."""

    folder: Path
    num_bytes: int

    def check_folder(self) -> None:
        """Create the folder.

        Raises:
            UsageError: that is not possible.
        """
        try:
            make_directory(self.folder)
        except OSError as error:
            raise UsageError(
                f"--local-cache {self.folder}: expected a folder on a local disk ({first_line(error)})."
            ) from error

    def check_space(self, cache: FeatureCache, files: int, block: int | None) -> None:
        """Check that all files fit, or two blocks of `block` files: the one that is read and the next.

        Args:
            cache: to be copied.
            files: number of its files that hold training rows.
            block: files per block; None: all rows are shuffled.

        Raises:
            UsageError: they do not fit.
        """
        fit = self.num_bytes // _file_bytes(cache)
        if fit >= (files if block is None else min(2 * block, files)):
            return
        needed = "all are needed to shuffle all rows" if block is None else f"two blocks of {block} are needed"
        advice = "Give more."
        if (most := fit // 2) > 0:
            advice = (
                f"Give more, or shuffle within blocks of at most {most} files: --set diffusion.shuffle_files={most} "
                "(for the whole training)."
            )
        raise UsageError(
            f"--local-gb {self.num_bytes / 1e9:g}: {cache.path} has {files} files of up to "
            f"{_file_bytes(cache) / 1e6:.3g} MB with training rows. {fit} of them fit, and {needed}. {advice}"
        )

    def folder_of(self, cache: FeatureCache, run: object) -> Path:
        """Return the folder of one training: of a cache, and of the directory that the training writes."""
        return self.folder / f"{cache.manifest.content[:12]}-{digest(str(run))[:8]}"


def _file_bytes(cache: FeatureCache) -> int:
    """Return the size of a large file of a cache; compressed ones differ."""
    manifest = cache.manifest
    return max(1, file_size(cache.store.unit_file(0)) or 0, -(-manifest.num_bytes // cache.store.spec.num_units))


class LocalCopy:
    """Reads rows of a cache, from local copies of its files where they are there. Threads may share it."""

    def __init__(
        self,
        cache: FeatureCache,
        folder: Path,
        rank: int = 0,
        size: int = 1,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Start the downloading threads.

        Args:
            cache: to be read.
            folder: where copies are kept; see `LocalDisk.folder_of`.
            rank: of this process. It begins with its own part of the files, since others may share the folder.
            size: number of processes.
            say: receives warnings.
        """
        self.store, self.folder, self.rank, self.size, self.say = cache.store, folder, rank, size, say
        self.unit_rows = cache.store.spec.unit_rows
        self._reader = ChunkReader(folder, cache.store.spec)
        self._kept: frozenset[int] = frozenset()
        self._queue: deque[int] = deque()
        self._busy = 0
        self._changed = threading.Condition()
        self._closed = self._full = self._told = False
        with suppress(OSError):
            remove_partials(folder, STALE_S)
        for number in range(DOWNLOADS):  # daemons, for the same reason
            threading.Thread(target=self._download_all, daemon=True, name=f"svgpipe-download-{number}").start()

    def keep(self, units: Sequence[int]) -> None:
        """Start to download these files, in this order, and delete the other files of the folder. Does not wait."""
        if self._kept == (wanted := frozenset(units)):
            return
        with self._changed:
            self._kept, self._full = wanted, False
            for unit in self.units_here() - wanted:
                self._delete(unit)
            mine = [unit for unit in units if unit % self.size == self.rank]
            self._queue = deque(dict.fromkeys([*mine, *units]))
            self._changed.notify_all()

    def units_here(self) -> set[int]:
        """Return the files that are on the local disk."""
        with suppress(OSError):
            names = [path.name for path in (self.folder / "features" / "c").iterdir()]
            return {
                unit for unit in (int(name) for name in names if name.isascii() and name.isdigit()) if self._has(unit)
            }
        return set()

    def wait(self) -> None:
        """Wait until no download is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (not self._queue and not self._busy))

    def close(self, *, delete: bool = False) -> None:
        """Stop downloading. The files stay for the next run, unless `delete`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if delete:  # a file that is being written would appear again
                self._changed.wait_for(lambda: not self._busy, timeout=CLOSE_S)
        self._reader.close()
        if delete:
            shutil.rmtree(self.folder, ignore_errors=True)

    def read_stored(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows like `FeatureStore.read_stored`. Raises its errors."""
        units, places = np.unique(rows // self.unit_rows, return_inverse=True)
        here = np.asarray([self._has(int(unit)) for unit in units], np.bool_)[places]
        try:
            local = self._reader.read(rows[here], views[here])
        except (ArtifactError, OSError):
            self._delete_damaged(units[np.unique(places[here])])
            return self.store.read_stored(rows, views)
        if here.all():
            return local
        result = np.empty((len(rows), *local.shape[1:]), local.dtype)
        result[here], result[~here] = local, self.store.read_stored(rows[~here], views[~here])
        return result

    def _path(self, unit: int) -> Path:
        path = unit_file(self.folder, unit)
        assert isinstance(path, Path)
        return path

    def _has(self, unit: int) -> bool:
        with suppress(OSError):
            return self._path(unit).exists()
        return False

    def _delete(self, unit: int) -> None:
        self._reader.drop(unit)  # an open file would keep its space
        with suppress(OSError):
            self._path(unit).unlink(missing_ok=True)

    def _delete_damaged(self, units: NDArray[np.int64]) -> None:
        """Delete those files that cannot be read, and download them again."""
        for unit in units.tolist():
            rows = np.asarray(self.store.spec.rows_of(unit))
            try:
                for view in range(len(self.store.spec.views)):
                    self._reader.read(rows, np.full(len(rows), view))
            except (ArtifactError, OSError):
                with self._changed:
                    self._delete(unit)
                    self._queue.append(unit)
                    self._changed.notify_all()

    def _download_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or bool(self._queue))
                if self._closed:
                    return
                unit, self._busy = self._queue.popleft(), self._busy + 1
            try:
                self._download(unit)
            finally:
                with self._changed:
                    self._busy -= 1
                    self._changed.notify_all()

    def _download(self, unit: int) -> None:
        for wait in (*WAITS_S, None):
            if self._full or self._closed or unit not in self._kept or self._has(unit):
                return
            try:
                content = self.store.unit_file(unit).read_bytes()
                make_directory(self._path(unit).parent)
                write_atomic(self._path(unit), content)
                with self._changed:
                    if unit not in self._kept:
                        self._delete(unit)
                return
            except Exception as error:  # each storage library has its own; rows are read from the cache instead
                self._full = self._full or (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
                self._warn(unit, error)
                if wait is not None and not self._full:
                    time.sleep(wait)

    def _warn(self, unit: int, error: Exception) -> None:
        if not self._told:
            self._told = True
            self.say(
                f"warning: {self._path(unit)}: not copied ({first_line(error)}); rows are read from the cache instead"
            )
