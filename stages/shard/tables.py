"""Tables of images as Hugging Face publishes them: parquet files, or arrow files of `save_to_disk`.

A column holds a struct with the bytes of an image (`image: {bytes, path}`), another the label: a number whose names lie
in the metadata of the schema (`ClassLabel`), or a text. Rows of one record batch or row group are read together.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet

from svgpipe.manifests.errors import UsageError, first_line

from .entries import Entry, Listing, modified_ns

TABLES = (".parquet", ".arrow")
MAX_CLASSES = 100_000  # more are not taken for classes that are numbered from 0
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"  # of an arrow stream: a message of length 0
LABELS = ("label", "labels", "fine_label", "class", "cls")


def list_tables(tables: Sequence[Path]) -> Listing:
    """List the rows of tables of one split, in order. Reads only the labels.

    Returns:
        The rows, and the class names if the tables hold them.

    Raises:
        UsageError: a file is no such table, or has no column of images.
    """
    entries: list[Entry] = []
    first: list[str] | None = None
    numbers = True
    for table in tables:
        schema = _schema_of(table)
        _, label = _columns_of(schema, table)
        names = _class_names(schema, label)  # of this table: another one may have another order
        first = first or names
        modified, origin = modified_ns(table.stat()), str(table.absolute())
        for number, labels in enumerate(_labels(table, label)):
            block = f"{table.name}/{number:05d}"
            numbers = numbers and not any(isinstance(value, str) for value in labels)
            entries += [
                Entry(f"{block}-{row:05d}", 0, modified, _class_of(value, names, table), origin, (number, row), block)
                for row, value in enumerate(labels)
            ]
    return Listing(entries, first or (_numbers(entries) if numbers else None))


def _numbers(entries: Sequence[Entry]) -> list[str] | None:
    """Return the names 0, 1, … if all labels are numbers, so that they stay what they are; None otherwise."""
    found = {entry.class_name for entry in entries if entry.class_name is not None}
    if not found or not all(re.fullmatch(r"[0-9]+", name) for name in found):
        return None
    highest = max(int(name) for name in found)
    return [str(number) for number in range(highest + 1)] if highest < MAX_CLASSES else None


def _class_of(value: Any, names: list[str] | None, table: Path) -> str | None:
    """Return the class name of a label; None without one (-1 in test sets).

    Raises:
        UsageError: it is neither a number nor a text.
    """
    if value is None or (isinstance(value, int) and value < 0):
        return None
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise UsageError(f"{table}: expected a number or a text as label, found {repr(value)[:40]}.")
    if isinstance(value, int) and names is not None:
        return names[value] if value < len(names) else None
    return (value.strip() or None) if isinstance(value, str) else str(value)


def _open(table: Path) -> Any:
    try:
        source = pa.memory_map(str(table))  # a file, not a path: pyarrow would read "a:b" as an address
        if table.suffix == ".parquet":
            return parquet.ParquetFile(source)
        try:
            return pa.ipc.open_file(source)
        except pa.ArrowInvalid:
            return pa.ipc.open_stream(source)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{table}: expected a table, found something else ({error}).") from error


def _schema_of(table: Path) -> pa.Schema:
    opened = _open(table)
    return opened.schema_arrow if isinstance(opened, parquet.ParquetFile) else opened.schema


def _labels(table: Path, label: str | None) -> Iterator[list[Any]]:
    """Yield the labels of each record batch, or row group of a parquet file; None without a label column.

    Raises:
        UsageError: the table is damaged.
    """
    try:
        yield from _labels_in(table, label)
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{table}: is truncated or damaged ({first_line(error)}). Download it again.") from error


def _labels_in(table: Path, label: str | None) -> Iterator[list[Any]]:
    opened = _open(table)
    if isinstance(opened, parquet.ParquetFile):
        for group in range(opened.num_row_groups):
            count = opened.metadata.row_group(group).num_rows
            column = (
                [None] * count if label is None else opened.read_row_group(group, columns=[label]).column(0).to_pylist()
            )
            yield column
    else:
        for batch in _batches(opened):
            yield [None] * len(batch) if label is None else batch.column(label).to_pylist()
        _require_end(opened, table)


def _require_end(opened: Any, table: Path) -> None:
    """Check that an arrow stream ends with its end marker: cut between two batches, it would lose rows silently.

    Raises:
        UsageError: it does not.
    """
    if isinstance(opened, pa.ipc.RecordBatchFileReader):
        return
    with table.open("rb") as file:
        file.seek(max(0, table.stat().st_size - len(STREAM_END)))
        if file.read() != STREAM_END:
            raise UsageError(f"{table}: is truncated: it has no end marker, so rows may be missing. Download it again.")


def _batches(opened: Any) -> Iterator[Any]:
    """Yield the record batches of an opened arrow file or stream."""
    if isinstance(opened, pa.ipc.RecordBatchFileReader):
        yield from (opened.get_batch(number) for number in range(opened.num_record_batches))
    else:
        yield from opened


def _columns_of(schema: pa.Schema, table: Path) -> tuple[str, str | None]:
    """Return the names of the image column and of the label column, which may be missing.

    Raises:
        UsageError: there is no column of images, or several.
    """
    images = [
        field.name for field in schema if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0
    ]
    labels = [name for name in LABELS if name in schema.names]
    if len(images) != 1:
        raise UsageError(
            f"{table}: expected one column of images (a struct with `bytes`), found "
            f"{', '.join(f'{field.name}: {field.type}' for field in schema)[:200]}."
        )
    return images[0], labels[0] if labels else None


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    """Return the names of a ClassLabel, from the metadata that `datasets` writes; None without them.

    Raises:
        UsageError: two labels have one name.
    """
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = [str(name) for name in features[label]["names"]]
    except (KeyError, TypeError, ValueError):
        return None
    if twice := [name for name in set(names) if names.count(name) > 1]:
        raise UsageError(f"tables: expected distinct class names, found {twice[0]!r} for several labels.")
    return names


@functools.lru_cache(maxsize=2)
def _image_bytes(table: Path, modified_ns: int, number: int) -> pa.Array:
    """Return the image bytes of one record batch. The last two are kept: rows of a batch are read one after another."""
    del modified_ns  # a replaced table is read again
    schema = _schema_of(table)
    image, _ = _columns_of(schema, table)
    opened = _open(table)
    if isinstance(opened, parquet.ParquetFile):
        column = opened.read_row_group(number, columns=[image]).column(image).combine_chunks()
    else:
        column = next(itertools.islice(_batches(opened), number, None)).column(image)
    return (column.chunk(0) if isinstance(column, pa.ChunkedArray) else column).field("bytes")


def read_row(table: Path, place: tuple[int, ...]) -> bytes:
    """Return the bytes of the image in a row, given as record batch and row.

    Raises:
        OSError: it has none.
    """
    number, row = place
    try:
        value = _image_bytes(table, table.stat().st_mtime_ns, number)[row].as_py()
    except pa.ArrowException as error:
        raise OSError(0, first_line(error)) from error
    if not isinstance(value, bytes):
        raise OSError(0, f"the row holds no image bytes, but {type(value).__name__}")
    return value
