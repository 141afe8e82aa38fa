"""The index of a tar: one parquet row per image, so that any image is one range read.

    key, label, offset, size, sha256, path    of the image member, in tar order
    reject                                    reason why the row is unusable, or null; absent if no row is rejected
    damaged                                   whether the image is a damaged JPEG that was kept; absent if there is none

The label is −1 if a rejected row has no known label.
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
DAMAGED = pa.field("damaged", pa.bool_())


@dataclass(frozen=True)
class ImageRef:
    """Location of one image in a tar, with its size and hash."""

    tar: Location
    offset: int
    size: int
    sha256: str
    key: str
    label: int
    path: str = ""
    reject: str | None = None
    damaged: bool = False

    @property
    def name(self) -> str:
        """The image for a person: `TAR: KEY`, or its file."""
        return f"{self.tar.name}: {self.key}" if self.tar.suffix == ".tar" else str(self.tar)

    def read(self) -> bytes:
        """Return the bytes of the image.

        Raises:
            ArtifactError: the bytes do not match the recorded size and sha256.
        """
        return _checked(read_range(self.tar, self.offset, self.size), self)


def write_index(path: Location, refs: Iterable[ImageRef]) -> str:
    """Write the index of one tar atomically, with the columns `reject` and `damaged` only if some row has a value.

    Returns:
        sha256 of the file.
    """
    rows = list(refs)
    columns = {name: [getattr(ref, name) for ref in rows] for name in INDEX_COLUMNS}
    table = pa.table(columns, schema=_SCHEMA)
    if any(ref.reject is not None for ref in rows):
        table = table.append_column(REJECT, pa.array([ref.reject for ref in rows], pa.string()))
    if any(ref.damaged for ref in rows):
        table = table.append_column(DAMAGED, pa.array([ref.damaged for ref in rows], pa.bool_()))
    buffer = io.BytesIO()
    parquet.write_table(table, buffer)
    write_atomic(path, buffer.getvalue())
    return hashlib.sha256(buffer.getvalue()).hexdigest()


def read_index(path: Location, num_images: int | None, columns: Sequence[str] = INDEX_COLUMNS) -> pa.Table:
    """Return columns of the index of one tar, and `reject` and `damaged` if they exist.

    Raises:
        ArtifactError: the index is missing, unreadable, or has another number of rows than `num_images`.
    """
    try:
        with path.open("rb") as file:
            source = parquet.ParquetFile(file)
            names = set(source.schema_arrow.names)
            wanted = [name for name in (*columns, REJECT.name, DAMAGED.name) if name in names]
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
    """Return the rows of a table with all columns as references."""
    names = table.column_names
    return [
        ImageRef(tar, **dict(zip(names, values, strict=True)))
        for values in zip(*(table[n].to_pylist() for n in names), strict=True)
    ]


def read_images(refs: Sequence[ImageRef]) -> list[bytes | ArtifactError]:
    """Return the bytes of many images, or an error for each image that does not match its record.

    Neighbouring images of a tar are read together.

    Raises:
        OSError: storage fails.
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
            f"found {len(data)} bytes with {found[:12]}. The tar was altered or truncated."
        )
    return data
