"""Shard sets: WebDataset tars, and beside each an index that makes every row one range read.

On disk:

    shard-000000.tar        KEY.jpg|png|webp, KEY.cls (label as text), KEY.json (path of the source)
    shard-000000.parquet    key, label, offset, size, sha256, path — of the image member, in tar order
    rejected.jsonl          path, reason — inputs = stored + rejected
    manifest.json           ShardSetManifest; splits are whole tars, training tars first

A row's number is its position over all tars of the set, in order.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import braceexpand
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.manifest import (
    MANIFEST_NAME,
    InputRef,
    Manifest,
    digest,
    file_sha256,
    sync_directory,
    write_atomic,
)

Split = Literal["train", "heldout"]


class ShardFile(BaseModel):
    """One tar of a shard set."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    split: Split
    num_images: int
    num_bytes: int
    sha256: str


class ShardSetManifest(Manifest):
    """What a shard set holds."""

    KIND: ClassVar[str] = "shard-set"
    NOUN: ClassVar[str] = "a shard set"
    OUTSIDE_IDENTITY: ClassVar[frozenset[str]] = frozenset({"shards"})

    kind: Literal["shard-set"] = "shard-set"
    class_names: list[str]
    num_inputs: int
    num_images: int
    num_rejected: int
    num_heldout: int
    content: str = Field(description="sha256 over the names and hashes of all tars.")
    shards: list[ShardFile]

    @staticmethod
    def content_of(shards: Sequence[ShardFile]) -> str:
        """Digest that `content` must equal."""
        return digest([[shard.name, shard.split, shard.sha256] for shard in shards])


@dataclass(frozen=True)
class Rows:
    """The index of many images, as columns of equal length N."""

    shard: NDArray[np.int32]  # position in ShardSet.shards
    label: NDArray[np.int32]
    offset: NDArray[np.int64]  # of the image member's bytes in its tar
    size: NDArray[np.int64]
    heldout: NDArray[np.bool_]
    key: list[str]
    sha256: list[str]
    path: list[str]

    def __len__(self) -> int:
        return len(self.label)


class ShardSet:
    """A finished shard set, or some tars of one."""

    def __init__(self, directory: Path, manifest: ShardSetManifest, shards: Sequence[ShardFile]) -> None:
        self.directory, self.manifest, self.shards = directory, manifest, tuple(shards)

    @classmethod
    def open(cls, spec: str | Path) -> ShardSet:
        """Open a directory, one tar, or a brace pattern such as 'path/shard-{000000..000009}.tar'.

        Raises:
            ArtifactError: no shard set there, a tar that its manifest does not list or that is missing
                or of another size than recorded.
            UsageError: the pattern names no tar, or tars of several directories.
        """
        text = str(spec)
        if not text.endswith(".tar"):
            directory = Path(text)
            manifest = ShardSetManifest.read(directory)
            chosen = manifest.shards
        else:
            try:
                paths = [Path(p) for p in braceexpand.braceexpand(text)]
            except ValueError as error:
                raise UsageError(f"{text}: the braces do not match.") from error
            if len(set(paths)) != len(paths):
                raise UsageError(f"{text}: names a tar twice.")
            directories = {p.parent for p in paths}
            if len(directories) != 1:
                raise UsageError(f"{text}: expected tars of one directory, found {len(directories)} directories.")
            directory = directories.pop()
            manifest = ShardSetManifest.read(directory)
            listed = {shard.name: shard for shard in manifest.shards}
            unknown = [p.name for p in paths if p.name not in listed]
            if unknown:
                raise ArtifactError(
                    f"{directory / unknown[0]}: not a shard of {directory / MANIFEST_NAME}, which lists "
                    f"{len(listed)} from {next(iter(listed), 'none')}."
                )
            chosen = [listed[p.name] for p in paths]
        found = cls(directory, manifest, chosen)
        found.check_files()
        return found

    def check_files(self) -> None:
        """Raise ArtifactError for a tar that is missing or not of its recorded size."""
        for shard in self.shards:
            path = self.directory / shard.name
            size = path.stat().st_size if path.exists() else None
            if size != shard.num_bytes:
                found = "none" if size is None else f"{size} bytes"
                raise ArtifactError(
                    f"{path}: expected a tar of {shard.num_bytes} bytes, found {found}. "
                    "Restore it, or run `svgpipe shard` again into a new directory."
                )

    def as_input(self) -> InputRef:
        """Identity for later stages; a part of a set is another input than the whole."""
        ref = self.manifest.as_input(self.directory)
        names = [shard.name for shard in self.shards]
        if names == [shard.name for shard in self.manifest.shards]:
            return ref
        return ref.model_copy(
            update={"fingerprint": digest([ref.fingerprint, names]), "config": {**ref.config, "only": names}}
        )

    def tars(self, split: Split | None = None) -> list[Path]:
        """Paths of the tars, all or those of one split, in order."""
        return [self.directory / s.name for s in self.shards if split in (None, s.split)]

    @cached_property
    def rows(self) -> Rows:
        """The whole index. Raises ArtifactError for a missing or altered parquet file."""
        columns: dict[str, list[Any]] = {name: [] for name in INDEX_COLUMNS}
        shard_of: list[NDArray[np.int32]] = []
        heldout: list[NDArray[np.bool_]] = []
        for position, shard in enumerate(self.shards):
            table = read_index(self.directory / shard.name.replace(".tar", ".parquet"), shard.num_images)
            for name in INDEX_COLUMNS:
                columns[name] += table[name]
            shard_of.append(np.full(shard.num_images, position, np.int32))
            heldout.append(np.full(shard.num_images, shard.split == "heldout"))
        return Rows(
            shard=np.concatenate(shard_of) if shard_of else np.zeros(0, np.int32),
            label=np.asarray(columns["label"], np.int32),
            offset=np.asarray(columns["offset"], np.int64),
            size=np.asarray(columns["size"], np.int64),
            heldout=np.concatenate(heldout) if heldout else np.zeros(0, np.bool_),
            key=[str(v) for v in columns["key"]],
            sha256=[str(v) for v in columns["sha256"]],
            path=[str(v) for v in columns["path"]],
        )

    def read_image(self, row: int) -> bytes:
        """Bytes of the image at `row`, checked against the index.

        Raises:
            ArtifactError: the tar does not hold the recorded bytes there.
        """
        rows = self.rows
        path = self.directory / self.shards[int(rows.shard[row])].name
        return read_member(path, int(rows.offset[row]), int(rows.size[row]), rows.sha256[row])


@dataclass(frozen=True)
class TarImage:
    """One image to store: its bytes, their extension (jpg, png, webp), label, and where it came from."""

    key: str
    data: bytes
    extension: str
    label: int
    path: str = ""


_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("label", pa.int32()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("sha256", pa.string()),
        ("path", pa.string()),
    ]
)
INDEX_COLUMNS = tuple(_SCHEMA.names)


def write_tar(tar_path: Path, images: Iterable[TarImage], split: Split) -> ShardFile:
    """Write one tar and its index; the tar appears by a rename, after its index. The bytes depend on `images` only."""
    columns: dict[str, list[Any]] = {name: [] for name in INDEX_COLUMNS}
    partial = tar_path.with_suffix(".partial")
    with partial.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for image in images:
                offset = tar.offset + tarfile.BLOCKSIZE
                _append(tar, image)
                sha256 = hashlib.sha256(image.data).hexdigest()
                row = (image.key, image.label, offset, len(image.data), sha256, image.path)
                for name, value in zip(INDEX_COLUMNS, row, strict=True):
                    columns[name].append(value)
        file.flush()
        os.fsync(file.fileno())
    buffer = io.BytesIO()
    parquet.write_table(pa.table(columns, schema=_SCHEMA), buffer)
    write_atomic(tar_path.with_suffix(".parquet"), buffer.getvalue())
    partial.replace(tar_path)
    sync_directory(tar_path.parent)
    return ShardFile(
        name=tar_path.name,
        split=split,
        num_images=len(columns["key"]),
        num_bytes=tar_path.stat().st_size,
        sha256=file_sha256(tar_path),
    )


def _append(tar: tarfile.TarFile, image: TarImage) -> None:
    sidecar = json.dumps({"path": image.path}).encode()
    for name, content in ((image.extension, image.data), ("cls", str(image.label).encode()), ("json", sidecar)):
        member = tarfile.TarInfo(f"{image.key}.{name}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def read_member(tar: Path, offset: int, size: int, sha256: str) -> bytes:
    """One range read, checked. Raises ArtifactError where the bytes are not the recorded ones."""
    with tar.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ArtifactError(
            f"{tar}: offset {offset}: expected {size} bytes with sha256 {sha256[:12]}, "
            f"found {len(data)} bytes with {found[:12]}. The tar was altered or cut short."
        )
    return data


def read_index(path: Path, num_images: int) -> dict[str, list[Any]]:
    """Columns of one tar's index. Raises ArtifactError if it is missing, unreadable or of another length."""
    if not path.exists():
        raise ArtifactError(f"{path}: expected the index of its tar, found none.")
    try:
        table: dict[str, list[Any]] = parquet.read_table(path).to_pydict()
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable parquet file: {error}") from error
    lengths = {name: len(table.get(name, [])) for name in INDEX_COLUMNS}
    if set(lengths.values()) != {num_images}:
        raise ArtifactError(f"{path}: expected {num_images} rows of {', '.join(INDEX_COLUMNS)}, found {lengths}.")
    return table


def shard_name(number: int) -> str:
    """shard-000000.tar and so on."""
    return f"shard-{number:06d}.tar"
