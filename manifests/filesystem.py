"""Locations of artifacts: folders, or prefixes of an object store at s3:// or gs://.

A Location is a `Path` or, for an object store, a `UPath`. Small files go through fsspec, bulk data through the drivers
of tensorstore. This file contains all differences between the two. An object store has no renames and no directories:
a write is one PUT, which is atomic.
"""

from __future__ import annotations

import bisect
import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

from upath import UPath

from .errors import UsageError, first_line

Location: TypeAlias = Path | UPath

# Python package of each scheme.
SCHEMES = {"s3": "s3fs", "gs": "gcsfs"}
# Gap between two ranges up to which they are read in one request, and maximum size of a request.
RANGE_GAP_BYTES, RANGE_BLOCK_BYTES = 1 << 20, 64 << 20
ABANDONED_S = 3600.0  # a temporary file without writes for this long belongs to a killed writer
# Packages whose errors mean a problem with the object store (no credentials, no connection).
_CLIENT_LIBRARIES = {"botocore", "aiobotocore", "s3fs", "gcsfs", "google", "aiohttp"}


def location(where: str | Location) -> Location:
    """Convert a path or URL from the command line.

    Returns:
        A Path, or a UPath for an object store.

    Raises:
        UsageError: empty text, a scheme other than s3:// and gs://, or a missing client library.
    """
    if isinstance(where, Path) and "://" not in str(where):
        return Path(where)
    text = str(where)
    scheme, separator, rest = text.partition("://")
    if not text.strip():
        raise UsageError("expected a path, found an empty text. Is a shell variable not set?")
    if not separator:
        return Path(text)
    if scheme == "file":
        return Path(rest)
    if scheme not in SCHEMES:
        raise UsageError(f"{text}: expected a path, s3://… or gs://…, found scheme {scheme!r}.")
    package = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f"{text}: needs {package}. Install it with `pip install {package}`.")
    # A cached listing would hide what other processes have written since.
    return UPath(text, use_listings_cache=False)


def absolute(path: Location) -> Location:
    """Return the same place as an absolute path, for processes with another current directory."""
    return path.absolute() if isinstance(path, Path) else path


def make_directory(path: Location) -> None:
    """Create a folder and its parents. Does nothing in an object store."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def children(path: Location) -> list[Location]:
    """Return the entries directly below `path`, sorted by name; empty if there is no such folder."""
    if not path.is_dir():
        return []
    return sorted(path.iterdir(), key=lambda child: child.name)


def remove_tree(path: Location) -> None:
    """Delete a folder and everything below it, if it exists."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


@contextmanager
def staged(path: Location) -> Iterator[Path]:
    """Yield a temporary local file. It is moved to `path` when the block ends, and deleted if the block fails.

    After a crash, `path` holds either its complete old or its complete new content.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="svgpipe-") as folder:
            partial = Path(folder) / path.name
            yield partial
            path.fs.put_file(str(partial), path.path)
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    partial.touch()
    mode = partial.stat().st_mode
    try:
        yield partial
        partial.chmod(mode)  # safetensors writes files that only their owner can read
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_atomic(path: Location, content: bytes) -> None:
    """Write `content` atomically: after a crash, `path` holds either the complete old or the complete new content."""
    if isinstance(path, Path):
        with staged(path) as partial:
            partial.write_bytes(content)
    else:
        path.write_bytes(content)


def create_exclusively(path: Location, content: bytes) -> bool:
    """Write `content` unless `path` exists. Of several concurrent callers, one succeeds.

    Returns:
        False if `path` existed.
    """
    try:
        if isinstance(path, Path):
            with path.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        else:
            path.fs.pipe_file(path.path, content, mode="create")
    except FileExistsError:
        return False
    return True


def sync_directory(path: Path) -> None:
    """Make renames in the folder `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partials(path: Location, idle_s: float = 0) -> None:
    """Delete temporary files of killed writers in this folder and below it.

    Args:
        path: folder; object stores have no temporary files.
        idle_s: minimum seconds since the last write. 0 only for the owner of the folder's lock; where other processes
            may be writing, use ABANDONED_S.
    """
    if isinstance(path, Path):
        for partial in path.rglob(".*.partial"):
            with suppress(OSError):
                if not idle_s or time.time() - partial.stat().st_mtime > idle_s:
                    partial.unlink()


def file_sha256(path: Location) -> str:
    """Return the sha256 (hex) of a file."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def has_sha256(path: Location, sha256: str) -> bool:
    """Return whether the file exists and has this sha256."""
    return file_size(path) is not None and file_sha256(path) == sha256


def file_size(path: Location) -> int | None:
    """Return the size in bytes; None if there is no such file."""
    try:
        return int(path.stat().st_size)
    except FileNotFoundError:
        return None


def file_version(path: Location) -> str:
    """Return a text that changes when the file is written: modification time in ns, or the object's ETag.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if isinstance(path, Path):
        return str(path.stat().st_mtime_ns)
    facts = path.fs.info(path.path)
    return str(facts.get("ETag") or facts.get("etag") or facts.get("LastModified") or facts.get("mtime"))


def read_range(path: Location, offset: int, size: int) -> bytes:
    """Return `size` bytes from `offset` on, fewer at the end of the file: one seek and read, or one range request.

    Raises:
        OSError: there is no such file, or storage fails.
    """
    if isinstance(path, Path):
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    try:
        return bytes(path.fs.cat_file(path.path, start=offset, end=offset + size))
    except OSError:
        if (length := file_size(path)) is not None and offset >= length:
            return b""  # object stores answer a range beyond the end with an error
        raise


def read_ranges(path: Location, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return several ranges, given as (offset, size), in their order.

    In an object store, neighbouring ranges are merged into one request, and requests run concurrently.
    """
    if isinstance(path, Path) or len(ranges) < 2:
        return [read_range(path, offset, size) for offset, size in ranges]
    from fsspec.utils import merge_offset_ranges

    starts, ends = [offset for offset, _ in ranges], [offset + size for offset, size in ranges]
    names, firsts, lasts = merge_offset_ranges(
        [path.path] * len(ranges), list(starts), list(ends), max_gap=RANGE_GAP_BYTES, max_block=RANGE_BLOCK_BYTES
    )
    try:
        blocks = path.fs.cat_ranges(names, firsts, lasts, on_error="raise")
    except OSError:  # one range is beyond the end of a truncated object; read the others one by one
        return [read_range(path, offset, size) for offset, size in ranges]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        number = bisect.bisect_right(firsts, start) - 1
        parts.append(bytes(blocks[number][start - firsts[number] : end - firsts[number]]))
    return parts


def kvstore(path: Location) -> dict[str, Any]:
    """Return tensorstore's specification of the folder at `path`."""
    if isinstance(path, Path):
        return {"driver": "file", "path": f"{path.resolve()}/"}
    bucket, _, prefix = path.path.partition("/")
    if path.protocol == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/"}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{prefix}/"}
    # The same variables as botocore, so that both clients use one store.
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def zarr_store(path: Location) -> Any:
    """Return the store that zarr opens for the group at `path`."""
    if isinstance(path, Path):
        return path
    from zarr.storage import FsspecStore

    return FsspecStore.from_url(str(path), storage_options={"use_listings_cache": False})


def client_error(error: BaseException) -> str | None:
    """Return one line for an error of an object store client; None for any other error."""
    if type(error).__module__.partition(".")[0] not in _CLIENT_LIBRARIES:
        return None
    return f"the object store refused: {first_line(error)}. Check credentials, region, endpoint and bucket."
