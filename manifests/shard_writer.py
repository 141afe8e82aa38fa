"""Writes the tars of shard sets and of exported samples, each with its index."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .filesystem import Location, file_sha256, make_directory, staged
from .index import ImageRef, write_index
from .shards import ShardFile, Split


@dataclass(frozen=True)
class TarImage:
    """One image to store: bytes, extension (jpg, png, webp), label, and path of the source."""

    key: str
    data: bytes
    extension: str
    label: int
    path: str = ""
    damaged: bool = False


def write_tar(directory: Location, name: str, images: Iterable[TarImage], split: Split) -> ShardFile:
    """Write one tar and its index; the tar appears after its index. The bytes depend on `images` only.

    Args:
        directory: of the set.
        name: of the tar in it.
        images: in order.
        split: recorded in the entry.

    Returns:
        The entry of the manifest.
    """
    refs, tar_path = [], directory / name
    make_directory(tar_path.parent)
    with staged(tar_path) as partial:
        with tarfile.open(partial, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for image in images:
                offset = tar.offset + tarfile.BLOCKSIZE
                _append(tar, image)
                sha256 = hashlib.sha256(image.data).hexdigest()
                ref = ImageRef(tar_path, offset, len(image.data), sha256, image.key, image.label, image.path)
                refs.append(replace(ref, damaged=image.damaged))
        index_sha256 = write_index(tar_path.with_suffix(".parquet"), refs)
        sha256, num_bytes = file_sha256(partial), partial.stat().st_size
    return ShardFile(
        name=name,
        split=split,
        num_images=len(refs),
        num_bytes=num_bytes,
        sha256=sha256,
        index_sha256=index_sha256,
    )


def _append(tar: tarfile.TarFile, image: TarImage) -> None:
    sidecar = json.dumps({"path": image.path}).encode()
    for name, content in ((image.extension, image.data), ("cls", str(image.label).encode()), ("json", sidecar)):
        member = tarfile.TarInfo(f"{image.key}.{name}")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
