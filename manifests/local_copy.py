"""Whole files of a cache on a local disk, for caches in an object store or on a slow network disk.

    FOLDER/CONTENT/features/c/UNIT/0/0/0/0      outer shards, in the layout of the cache

Files are downloaded in the background. Rows whose file is not there yet are read from the cache itself, so a read
never waits for a download, and never gives other values. Several processes of a machine may use one folder.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cache import FeatureCache
from .errors import ArtifactError, UsageError, first_line
from .feature_store import FeatureStore
from .filesystem import ABANDONED_S, children, make_directory, remove_partials, write_atomic
from .store_spec import unit_file

DOWNLOADS = 8  # at a time, each file in memory


@dataclass(frozen=True)
class LocalDisk:
    """Where copies are kept, and how many bytes they may take."""

    folder: Path
    num_bytes: int

    def files_of(self, cache: FeatureCache) -> int:
        """Return how many files of a cache fit; at most all of them."""
        spec = cache.store.spec
        largest = int(np.prod(spec.shape_of(0))) * np.dtype(spec.dtype).itemsize
        return min(self.num_bytes // max(1, largest), spec.num_units)

    def check(self, cache: FeatureCache, block: int | None) -> None:
        """Check that the whole cache fits, or two blocks of `block` files: the one that is read and the next.

        Raises:
            UsageError: it does not.
        """
        fit, needed = self.files_of(cache), cache.store.spec.num_units if block is None else 2 * block
        if fit >= min(needed, cache.store.spec.num_units):
            return
        size = f"{cache.path}: has {cache.store.spec.num_units} files, {cache.manifest.num_bytes / 1e9:.1f} GB; "
        if fit < 2:
            raise UsageError(f"{size}--local-gb {self.num_bytes / 1e9:g} holds {fit} of them, expected two or more.")
        what = "all are needed to shuffle all rows" if block is None else f"two blocks of {block} are needed"
        raise UsageError(
            f"{size}--local-gb {self.num_bytes / 1e9:g} holds {fit}, and {what}. Give more, or shuffle within blocks "
            f"of at most {fit // 2} files: --set diffusion.shuffle_files={fit // 2} (for the whole training)."
        )


class LocalCopy:
    """Reads rows of a cache, from local copies of its files where they are there."""

    def __init__(self, cache: FeatureCache, disk: LocalDisk, say: Callable[[str], None] = lambda text: None) -> None:
        self.store, self.say = cache.store, say
        self.local = FeatureStore(disk.folder / cache.manifest.content[:16], cache.store.spec)
        make_directory(self.local.path)
        remove_partials(self.local.path, ABANDONED_S)
        self.unit_rows = cache.store.spec.unit_rows
        self._kept: frozenset[int] = frozenset()
        self._downloads: dict[int, Future[None]] = {}
        self._pool = ThreadPoolExecutor(DOWNLOADS, thread_name_prefix="svgpipe-download")
        self._turn = threading.Lock()
        self._full = self._told = False

    def keep(self, units: Sequence[int]) -> None:
        """Download these files, in this order, and delete all others."""
        if self._kept == (wanted := frozenset(units)):
            return
        with self._turn:
            self._kept = wanted
            for unit in set(self._downloads) - wanted:
                self._downloads.pop(unit).cancel()
            for unit in self.units_here() - wanted:
                self._path(unit).unlink(missing_ok=True)
            for unit in units:
                if unit not in self._downloads:
                    self._downloads[unit] = self._pool.submit(self._download, unit)

    def units_here(self) -> set[int]:
        """Return the files that are on the local disk."""
        folder = Path(str(self.local.path)) / "features" / "c"
        numbers = {int(path.name) for path in children(folder) if path.name.isdigit()} if folder.is_dir() else set()
        return {unit for unit in numbers if self._path(unit).exists()}

    def wait(self) -> None:
        """Wait for all downloads."""
        for download in list(self._downloads.values()):
            with suppress(Exception):
                download.result()

    def close(self) -> None:
        """Stop downloading. The files stay, for the next run."""
        self._pool.shutdown(cancel_futures=True)

    def read_stored(self, rows: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[Any]:
        """Return rows like `FeatureStore.read_stored`. Raises its errors."""
        units, places = np.unique(rows // self.unit_rows, return_inverse=True)
        here = np.asarray([self._path(int(unit)).exists() for unit in units], np.bool_)[places]
        try:
            local = self.local.read_stored(rows[here], views[here])
        except (ArtifactError, OSError):  # deleted by another process since, or damaged
            return self.store.read_stored(rows, views)
        if here.all():
            return local
        result = np.empty((len(rows), *local.shape[1:]), local.dtype)
        result[here], result[~here] = local, self.store.read_stored(rows[~here], views[~here])
        return result

    def _path(self, unit: int) -> Path:
        path = unit_file(self.local.path, unit)
        assert isinstance(path, Path)
        return path

    def _download(self, unit: int) -> None:
        target = self._path(unit)
        if self._full or target.exists():
            return
        try:
            content = self.store.unit_file(unit).read_bytes()
            with self._turn:
                if unit in self._kept:
                    make_directory(target.parent)
                    write_atomic(target, content)
        except Exception as error:  # each storage library has its own; rows are read from the cache instead
            self._full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            if not self._told:
                self.say(f"warning: {target}: not copied ({first_line(error)}); rows are read from the cache instead")
            self._told = True
