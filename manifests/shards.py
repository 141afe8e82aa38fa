"""Shard sets: WebDataset tars with an index, so that every row is one range read.

A set that svgpipe wrote:

    shard-000000.tar        KEY.jpg|png|webp, KEY.cls (label as text), KEY.json (path of the source)
    shard-000000.parquet    its index, see index.py
    heldout/shard-000009.tar, .parquet    the same for held-out images
    rejected.jsonl          path, reason; inputs = stored + rejected
    manifest.json           ShardSetManifest; a split is a range of tars, training tars first

A set of existing tars, made by `svgpipe index`; the tars lie elsewhere:

    index/000000.parquet    one per tar, in the order of the manifest
    manifest.json

The number of a row is its position over all tars of the set, in order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import braceexpand
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from .errors import ArtifactError, UsageError
from .filesystem import Location, absolute, file_sha256, file_size, file_version, location
from .index import DAMAGED, REJECT, ImageRef, read_index, refs_of_table
from .manifest import MANIFEST_NAME, FrozenModel, InputRef, Manifest, digest
from .selection import choose_evenly

Split = Literal["train", "heldout"]
HELDOUT_FOLDER = "heldout"
# Open indexes per process: neighbouring units lie in the same tars.
INDEXES_KEPT = 4


class ShardFile(FrozenModel):
    """One tar of a shard set."""

    name: str = Field(description="Name next to the manifest, or the full location of an existing tar.")
    split: Split
    num_images: int
    num_bytes: int
    sha256: str
    index_sha256: str
    index: str | None = Field(None, description="Path below the set's directory; null: the tar's name with .parquet.")
    version: str | None = Field(None, description="Of an existing tar: `file_version` when it was indexed.")

    @property
    def files(self) -> dict[str, str]:
        """Return the sha256 of the tar and of its index, by path below the set's directory."""
        return {self.name: self.sha256, _index_name(self): self.index_sha256}


def tar_of(directory: Location, shard: ShardFile) -> Location:
    """Return the location of a tar of the set in `directory`."""
    return directory / shard.name if shard.index is None else location(shard.name)


def index_of(directory: Location, shard: ShardFile) -> Location:
    """Return the location of the index of a tar."""
    return directory / _index_name(shard)


def _index_name(shard: ShardFile) -> str:
    return shard.index or shard.name.replace(".tar", ".parquet")


def refs_of(directory: Location, shards: Sequence[ShardFile]) -> list[ImageRef]:
    """Return all images of some tars, in order.

    Raises:
        ArtifactError: an index is missing or altered.
    """
    tables = ((shard, read_index(index_of(directory, shard), shard.num_images)) for shard in shards)
    return [ref for shard, table in tables for ref in refs_of_table(table, tar_of(directory, shard))]


class ShardSetManifest(Manifest):
    """Content of a shard set."""

    KIND: ClassVar[str] = "shard-set"
    NOUN: ClassVar[str] = "a shard set"
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset({"shards"})
    LATE: ClassVar[frozenset[str]] = frozenset({"class_names"})

    kind: Literal["shard-set"] = "shard-set"
    class_names: list[str]
    num_inputs: int
    num_images: int
    num_rejected: int
    num_heldout: int
    content: str = Field(description="sha256 over names, splits and hashes of all tars and indexes.")
    shards: list[ShardFile]

    @staticmethod
    def content_of(shards: Sequence[ShardFile]) -> str:
        """Return the expected value of `content`."""
        return digest([[shard.name, shard.split, shard.sha256, shard.index_sha256] for shard in shards])


@dataclass(frozen=True)
class Rows:
    """Facts about every image, as columns of equal length N."""

    shard: NDArray[np.int32]  # position in ShardSet.shards
    label: NDArray[np.int32]  # −1 if rejected and unknown
    heldout: NDArray[np.bool_]
    rejected: NDArray[np.bool_]  # unusable, as found when it was indexed
    damaged: NDArray[np.bool_]  # a damaged JPEG that was kept

    def __len__(self) -> int:
        return len(self.label)


def changed_content(shard: ShardFile, tar: Location) -> str | None:
    """Return the sha256 of an existing tar that is not what was indexed; None otherwise.

    It is hashed only if it was written since.
    """
    if shard.version in (None, file_version(tar)):
        return None
    return found if (found := file_sha256(tar)) != shard.sha256 else None


class ShardSet:
    """A finished shard set, or some of its tars."""

    def __init__(self, directory: Location, manifest: ShardSetManifest, shards: Sequence[ShardFile]) -> None:
        self.directory, self.manifest, self.shards = directory, manifest, tuple(shards)
        # (tars + 1,) first row of every tar, and the number of rows.
        self.starts = np.cumsum([0, *(shard.num_images for shard in self.shards)])
        self._tables: dict[int, pa.Table] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "manifest": self.manifest, "shards": self.shards}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return int(self.starts[-1])

    @classmethod
    def open(cls, spec: str | Location) -> ShardSet:
        """Open a directory, one tar, or a brace pattern such as 'path/shard-{000000..000009}.tar'.

        Returns:
            The shard set.

        Raises:
            ArtifactError: there is no shard set, or a tar is not in its manifest, missing or of another size.
            UsageError: the pattern names no tar, or tars of several directories.
        """
        text = str(spec)
        if not text.endswith(".tar"):
            manifest = ShardSetManifest.read(location(text))
            return cls._checked(absolute(location(text)), manifest, manifest.shards)
        paths = expand(text)
        places = [_place_of(path) for path in paths]
        directories = {str(directory) for directory, _ in places}
        if len(directories) != 1:
            raise UsageError(f"{text}: expected tars of one directory, found {len(directories)} directories.")
        directory = places[0][0]
        if paths[0].exists() and not (directory / MANIFEST_NAME).exists():
            raise ArtifactError(
                f"{directory}: expected a shard set, found tars without {MANIFEST_NAME}. To use existing tars, index "
                f"them once with `svgpipe index '{text}' --out DIR`, then give DIR."
            )
        return cls._some(absolute(directory), [name for _, name in places])

    @classmethod
    def of_input(cls, ref: InputRef, artifact: Location) -> ShardSet:
        """Open the shard set that `artifact` recorded as its input. Raises the errors of `open`.

        Returns:
            The shard set.
        """
        directory, only = ref.place(artifact), ref.config.get("only")
        return cls.open(directory) if only is None else cls._some(directory, only)

    @classmethod
    def _some(cls, directory: Location, names: Sequence[str]) -> ShardSet:
        manifest = ShardSetManifest.read(directory)
        listed = {shard.name: shard for shard in manifest.shards}
        unknown = [name for name in names if name not in listed]
        if unknown:
            raise ArtifactError(
                f"{directory / unknown[0]}: not a shard of {directory / MANIFEST_NAME}, which lists "
                f"{len(listed)} from {next(iter(listed), 'none')}."
            )
        return cls._checked(directory, manifest, [listed[name] for name in names])

    @classmethod
    def _checked(cls, directory: Location, manifest: ShardSetManifest, shards: Sequence[ShardFile]) -> ShardSet:
        shard_set = cls(directory, manifest, shards)
        shard_set.check_files()
        return shard_set

    def absolute(self) -> ShardSet:
        """Return the same set with absolute paths, for processes with another current directory."""
        return ShardSet(absolute(self.directory), self.manifest, self.shards)

    def check_files(self) -> None:
        """Check the sizes of all tars. Existing tars that were written since they were indexed are hashed.

        Raises:
            ArtifactError: a tar is missing, has another size, or other content.
        """
        for shard in self.shards:
            tar = tar_of(self.directory, shard)
            size = file_size(tar)
            if size != shard.num_bytes:
                found = "none" if size is None else f"{size} bytes"
                raise ArtifactError(
                    f"{tar}: expected a tar of {shard.num_bytes} bytes, found {found}. "
                    "Restore it, or make the shard set again in a new directory."
                )
            if (content := changed_content(shard, tar)) is not None:
                raise ArtifactError(
                    f"{tar}: was changed after it was indexed: expected sha256 {shard.sha256[:12]}, found "
                    f"{content[:12]}. Its labels may be others now. Index the tars again, into a new directory."
                )

    def as_input(self) -> InputRef:
        """Return the reference for later stages. Some tars of a set are another input than all of them."""
        ref = self.manifest.as_input(self.directory)
        names = [shard.name for shard in self.shards]
        if names == [shard.name for shard in self.manifest.shards]:
            return ref
        return ref.model_copy(
            update={
                "fingerprint": digest([ref.fingerprint, names]),
                "config": {**ref.config, "only": names, "of": ref.fingerprint},
            }
        )

    def tars(self, split: Split | None = None) -> list[Location]:
        """Return the paths of the tars, all or those of one split, in order."""
        return [tar_of(self.directory, s) for s in self.shards if split in (None, s.split)]

    @cached_property
    def rows(self) -> Rows:
        """Labels and splits of all rows.

        Raises:
            ArtifactError: an index is missing or altered.
        """
        labels: list[NDArray[Any]] = [np.zeros(0, np.int32)]
        rejected, damaged = [np.zeros(0, np.bool_)], [np.zeros(0, np.bool_)]
        for shard in self.shards:
            table = read_index(index_of(self.directory, shard), shard.num_images, ["label"])
            # By DLPack, because pyarrow's to_numpy imports pandas.
            labels.append(np.from_dlpack(table["label"].combine_chunks()))
            rejected.append(_flags(table, REJECT.name))
            damaged.append(_flags(table, DAMAGED.name))
        pa.default_memory_pool().release_unused()  # memory of up to a thousand indexes
        counts = np.diff(self.starts)
        heldout = np.asarray([shard.split == "heldout" for shard in self.shards], np.bool_)
        return Rows(
            shard=np.repeat(np.arange(len(self.shards), dtype=np.int32), counts),
            label=np.concatenate(labels).astype(np.int32),
            heldout=np.repeat(heldout, counts),
            rejected=np.concatenate(rejected),
            damaged=np.concatenate(damaged),
        )

    def refs(self, rows: Iterable[int]) -> list[ImageRef]:
        """Return the locations of the images of `rows`. Reads only the indexes of their tars, and caches the last few.

        Raises:
            IndexError: no such row.
            ArtifactError: an index is missing or altered.
        """
        wanted = np.fromiter(rows, np.int64)
        bad = wanted[(wanted < 0) | (wanted >= len(self))]
        if bad.size:
            raise IndexError(f"row {bad[0]}: expected 0..{len(self) - 1}")
        positions = np.searchsorted(self.starts, wanted, side="right") - 1
        refs = []
        # One take per run of rows in the same tar; units are such runs.
        for stretch in np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(positions)) + 1):
            if len(stretch):
                position = int(positions[stretch[0]])
                table = self._table(position).take(_as_arrow(wanted[stretch] - self.starts[position]))
                refs += refs_of_table(table, tar_of(self.directory, self.shards[position]))
        return refs

    def _table(self, position: int) -> pa.Table:
        """Return the index of a tar. Thread-safe: every single operation on the dict is atomic."""
        table = self._tables.get(position)
        if table is None:
            shard = self.shards[position]
            table = read_index(index_of(self.directory, shard), shard.num_images)
            kept = list(self._tables)
            for old in kept[: max(0, len(kept) + 1 - INDEXES_KEPT)]:
                self._tables.pop(old, None)
            self._tables[position] = table
        return table

    def usable_rows(self, split: Split) -> NDArray[np.int64]:
        """Return the rows of one split, without the rejected ones. Raises the error of `rows`."""
        return np.flatnonzero(~self.rows.rejected & (self.rows.heldout == (split == "heldout")))

    def usable(self, split: Split, count: int | None = None) -> list[ImageRef]:
        """Return at most `count` evenly spread images of one split, without rejected ones; None: all.

        Raises the errors of `refs`.
        """
        return self.refs(choose_evenly(self.usable_rows(split).tolist(), count))

    def read_image(self, row: int) -> bytes:
        """Return the bytes of the image at `row`.

        Raises:
            ArtifactError: they do not match the recorded size and hash.
        """
        return self.refs([row])[0].read()


def _place_of(tar: Location) -> tuple[Location, str]:
    """Return the directory of the shard set of a tar, and the tar's name in it."""
    folder = tar.parent
    if folder.name == HELDOUT_FOLDER and not (folder / MANIFEST_NAME).exists():
        return folder.parent, f"{HELDOUT_FOLDER}/{tar.name}"
    return folder, tar.name


def _flags(table: pa.Table, column: str) -> NDArray[np.bool_]:
    """Return whether a row has a value other than null and false in an optional column."""
    if column not in table.column_names:
        return np.zeros(len(table), np.bool_)
    values = table[column].combine_chunks()
    flags = values if pa.types.is_boolean(values.type) else values.is_valid()
    return np.from_dlpack(flags.cast(pa.uint8())).astype(np.bool_)


def _as_arrow(values: NDArray[np.int64]) -> pa.Array:
    """Avoid pa.array: it imports pandas, 70 MB per process, to check for pandas types.

    Returns:
        The locations.
    """
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(np.ascontiguousarray(values))])


def expand(pattern: str) -> list[Location]:
    """Return the tars of a brace pattern, in order.

    Raises:
        UsageError: the braces do not match, or a tar is named twice.
    """
    try:
        names = list(braceexpand.braceexpand(pattern))
    except ValueError as error:
        raise UsageError(f"{pattern}: the braces do not match.") from error
    if len(set(names)) != len(names):
        raise UsageError(f"{pattern}: names a tar twice.")
    return [location(name) for name in names]


def shard_name(number: int, split: Split = "train") -> str:
    """Return shard-000000.tar; heldout/shard-000009.tar for held-out images, which `*.tar` does not find."""
    name = f"shard-{number:06d}.tar"
    return f"{HELDOUT_FOLDER}/{name}" if split == "heldout" else name
