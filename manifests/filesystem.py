"""Where artifacts lie: a folder, or a prefix of an object store at s3:// or gs://.

A Location is a plain `Path` or, for an object store, a `UPath`: small files go through fsspec, bulk data
through tensorstore's own drivers. Everything below that differs between the two is in this file.
An object store has no renames and no directories: there a write is one PUT, which is atomic by itself.
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

# Python package and pip extra that each scheme needs.
SCHEMES = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs")}
# Bytes between two ranges that are read rather than asked around, and bytes of one request.
RANGE_GAP_BYTES, RANGE_BLOCK_BYTES = 1 << 20, 64 << 20
ABANDONED_S = 3600.0  # a partial that nobody has written to for so long is of a writer that was killed
# What object stores' client libraries raise beside OSError (no credentials, no connection).
_CLIENT_LIBRARIES = {"botocore", "aiobotocore", "s3fs", "gcsfs", "google", "aiohttp"}


def location(where: str | Location) -> Location:
    """A path as typed by a person → Location.

    Raises:
        UsageError: no text, a scheme other than s3:// and gs://, or one whose client library is not installed.
    """
    if isinstance(where, Path) and "://" not in str(where):
        return Path(where)
    text = str(where)
    scheme, separator, rest = text.partition("://")
    if not text.strip():
        raise UsageError("expected a path, found an empty text: is a variable of the shell not set?")
    if not separator:
        return Path(text)
    if scheme == "file":
        return Path(rest)
    if scheme not in SCHEMES:
        raise UsageError(f"{text}: expected a path, s3://… or gs://…, found scheme {scheme!r}.")
    package, extra = SCHEMES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UsageError(f'{text}: needs {package}. Install it with `pip install "svgpipe[{extra}]"`.')
    # A cached listing would hide what other processes have written since.
    return UPath(text, use_listings_cache=False)


def absolute(path: Location) -> Location:
    """The same place for a process with another current directory."""
    return path.resolve() if isinstance(path, Path) else path


def make_directory(path: Location) -> None:
    """Create a folder and its parents; an object store needs none."""
    if isinstance(path, Path):
        path.mkdir(parents=True, exist_ok=True)


def children(path: Location) -> list[Location]:
    """What lies directly below `path`, by name; nothing where there is no such folder."""
    if not path.is_dir():
        return []
    return sorted(path.iterdir(), key=lambda child: child.name)


def remove_tree(path: Location) -> None:
    """Delete a folder and all below it, if it exists."""
    if isinstance(path, Path):
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        path.fs.rm(path.path, recursive=True)


@contextmanager
def staged(path: Location) -> Iterator[Path]:
    """A local file to write; it appears at `path` whole when the block ends, and not at all if it fails.

    After a crash `path` holds either its old or its whole new content.
    """
    if not isinstance(path, Path):
        with tempfile.TemporaryDirectory(prefix="svgpipe-") as folder:
            partial = Path(folder) / path.name
            yield partial
            path.fs.put_file(str(partial), path.path)
        return
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def write_atomic(path: Location, content: bytes) -> None:
    """Write `content` so that `path` holds either its old or its whole new content, even after a crash."""
    if isinstance(path, Path):
        with staged(path) as partial:
            partial.write_bytes(content)
    else:
        path.write_bytes(content)


def create_exclusively(path: Location, content: bytes) -> bool:
    """Write `content` unless `path` exists; False if it does. Of several that try at once, one succeeds."""
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
    """Make renames inside `path` durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_partials(path: Location, idle_s: float = 0) -> None:
    """Delete what killed writers left in this folder and below it.

    Args:
        idle_s: seconds since it was last written to. Only whoever holds the folder's lock may leave it at 0; where
            others may be writing, ABANDONED_S.
    """
    if isinstance(path, Path):
        for partial in path.rglob(".*.partial"):
            with suppress(OSError):
                if not idle_s or time.time() - partial.stat().st_mtime > idle_s:
                    partial.unlink()


def file_sha256(path: Location) -> str:
    """sha256 (hex) of a file's bytes, read in pieces."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            hasher.update(block)
    return hasher.hexdigest()


def has_sha256(path: Location, sha256: str) -> bool:
    """Whether the file is there and its bytes are those."""
    return file_size(path) is not None and file_sha256(path) == sha256


def file_size(path: Location) -> int | None:
    """Bytes; None where there is no such file."""
    try:
        return int(path.stat().st_size)
    except FileNotFoundError:
        return None


def read_range(path: Location, offset: int, size: int) -> bytes:
    """`size` bytes from `offset` on, fewer where the file ends: one seek and read, or one range request."""
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
    """Several `read_range`s, (offset, size) each, in their order.

    From an object store neighbouring ranges come in one request, and the requests run side by side.
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
    except OSError:  # a range beyond the end of an object that was cut short: the others can still be had
        return [read_range(path, offset, size) for offset, size in ranges]
    parts = []
    for start, end in zip(starts, ends, strict=True):
        number = bisect.bisect_right(firsts, start) - 1
        parts.append(bytes(blocks[number][start - firsts[number] : end - firsts[number]]))
    return parts


def kvstore(path: Location) -> dict[str, Any]:
    """tensorstore's specification of the folder at `path`."""
    if isinstance(path, Path):
        return {"driver": "file", "path": f"{path.resolve()}/"}
    bucket, _, prefix = path.path.partition("/")
    if path.protocol == "gs":
        return {"driver": "gcs", "bucket": bucket, "path": f"{prefix}/"}
    spec: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": f"{prefix}/"}
    # The same variables that botocore reads, so that both halves of a cache lie in one store.
    if endpoint := os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"):
        spec["endpoint"] = endpoint
    if region := os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"):
        spec["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in os.environ:
        spec["aws_credentials"] = {"type": "environment"}
    return spec


def zarr_store(path: Location) -> Any:
    """What zarr opens for the group at `path`."""
    if isinstance(path, Path):
        return path
    from zarr.storage import FsspecStore

    return FsspecStore.from_url(str(path), storage_options={"use_listings_cache": False})


def client_error(error: BaseException) -> str | None:
    """One line for an object store client's own error; None for anything else."""
    if type(error).__module__.partition(".")[0] not in _CLIENT_LIBRARIES:
        return None
    return f"the object store refused: {first_line(error)}. Check credentials, region, endpoint and bucket."
