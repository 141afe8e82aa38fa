"""The index of a tar: one parquet row per image, which makes every image one range read.

    key, label, offset, size, sha256, path    of the image member, in tar order
    reject                                    why the row can never be used, or null; absent where no row is

A label of −1 stands beside a reject whose label is unknown.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as parquet

from .errors import ArtifactError
from .filesystem import Location, read_range, read_ranges, write_atomic

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
REJECT = pa.field("reject", pa.string())


@dataclass(frozen=True)
class ImageRef:
    """Where the bytes of one image lie, and what is known of it."""

    tar: Location
    offset: int
    size: int
    sha256: str
    key: str
    label: int
    path: str = ""
    reject: str | None = None

    def read(self) -> bytes:
        """The image's bytes, checked. Raises ArtifactError where they are not the recorded ones."""
        return _checked(read_range(self.tar, self.offset, self.size), self)


def write_index(path: Location, refs: Iterable[ImageRef]) -> str:
    """Write the index of one tar, atomically; `reject` only where some row has one. Returns its sha256."""
    rows = list(refs)
    columns = {name: [getattr(ref, name) for ref in rows] for name in INDEX_COLUMNS}
    table = pa.table(columns, schema=_SCHEMA)
    if any(ref.reject is not None for ref in rows):
        table = table.append_column(REJECT, pa.array([ref.reject for ref in rows], pa.string()))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_atomic(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_index(path: Location, num_images: int | None, columns: Sequence[str] = INDEX_COLUMNS) -> pa.Table:
    """Some columns of one tar's index, and `reject` where there is one.

    Raises:
        ArtifactError: it is missing, unreadable or, where `num_images` is given, of another length.
    """
    try:
        with path.open("rb") as file:
            source = parquet.ParquetFile(file)
            names = set(source.schema_arrow.names)
            wanted = [name for name in (*columns, REJECT.name) if name in names]
            table = source.read(columns=wanted, use_threads=False)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: expected the index of its tar, found none.") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path}: not a readable parquet file: {error}") from error
    if set(columns) - names or num_images not in (None, len(table)):
        raise ArtifactError(
            f"{path}: expected {num_images} rows of {', '.join(columns)}, "
            f"found {len(table)} rows of {', '.join(sorted(names))}."
        )
    return table


def refs_of_table(table: pa.Table, tar: Location) -> list[ImageRef]:
    """Rows of `read_index` with all columns → references."""
    names = table.column_names
    return [
        ImageRef(tar, **dict(zip(names, values, strict=True)))
        for values in zip(*(table[n].to_pylist() for n in names), strict=True)
    ]


def read_images(refs: Sequence[ImageRef]) -> list[bytes | ArtifactError]:
    """Checked bytes of many images, or the error of those that are not what was recorded; tar by tar in few reads.

    Raises:
        OSError: storage that fails.
    """
    by_tar: dict[Location, list[int]] = {}
    for number, ref in enumerate(refs):
        by_tar.setdefault(ref.tar, []).append(number)
    results: dict[int, bytes | ArtifactError] = {}
    for tar, numbers in by_tar.items():
        datas = read_ranges(tar, [(refs[number].offset, refs[number].size) for number in numbers])
        for number, data in zip(numbers, datas, strict=True):
            try:
                results[number] = _checked(data, refs[number])
            except ArtifactError as error:
                results[number] = error
    return [results[number] for number in range(len(refs))]


def _checked(data: bytes, ref: ImageRef) -> bytes:
    found = hashlib.sha256(data).hexdigest()
    if found != ref.sha256:
        raise ArtifactError(
            f"{ref.tar}: offset {ref.offset}: expected {ref.size} bytes with sha256 {ref.sha256[:12]}, "
            f"found {len(data)} bytes with {found[:12]}. The tar was altered or cut short."
        )
    return data
