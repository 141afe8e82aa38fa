"""Label maps: the class and the depth of every cell of the centre crops of a shard set.

    segmentation    (sample, row, column) uint16, index of the class; UNLABELLED where there is none
    depth           (sample, row, column) float32, metres; NaN where it is unknown
    has_segmentation, has_depth    (sample) bool, whether the image has such a map
    rejected.jsonl  maps that cannot be used
    journal/        one record per outer shard

Row i is the image of row i of the shard set, as in every cache of this set. Opens in zarr and xarray without svgpipe.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import Field
from zarr.codecs import Crc32cCodec, ZstdCodec

from .errors import ArtifactError
from .filesystem import Location, absolute, location, make_directory, zarr_store
from .journal import Journal
from .manifest import Manifest, digest

UNLABELLED = 65535
_RESTORE = (
    "`svgpipe verify --deep` names damaged files; delete manifest.json and them, and run `svgpipe extract-maps` again."
)
SEGMENTATION, DEPTH = "segmentation", "depth"
FILLS: dict[str, tuple[str, float]] = {SEGMENTATION: ("uint16", UNLABELLED), DEPTH: ("float32", float("nan"))}


class LabelMapsManifest(Manifest):
    """Finished label maps."""

    KIND: ClassVar[str] = "label-maps"
    NOUN: ClassVar[str] = "a store of label maps"

    kind: Literal["label-maps"] = "label-maps"
    num_samples: int = Field(description="Rows; as many as the shard set has.")
    size: int = Field(description="Labels per side.")
    unit_rows: int
    classes: list[str]
    max_depth: float | None = Field(description="Metres; null: no depths.")
    num_segmentation: int = Field(description="Images with a mask.")
    num_depth: int = Field(description="Images with a depth map.")
    num_rejected: int = Field(description="Maps that cannot be used.")
    content: str = Field(description="Digest of the hashes of all units.")

    @staticmethod
    def content_of(journal: Journal, units: int) -> str:
        """Return the expected value of `content`. Raises the errors of `Journal.files`."""
        return digest([[[file.name, file.sha256] for file in journal.files(unit)] for unit in range(units)])


@dataclass(frozen=True)
class MapsSpec:
    """Shape of a store of label maps; `names` of its arrays."""

    num_samples: int
    size: int
    unit_rows: int
    names: tuple[str, ...]

    @property
    def num_units(self) -> int:
        return -(-self.num_samples // self.unit_rows)

    def rows_of(self, unit: int) -> range:
        """Return the samples of outer shard `unit`."""
        return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.num_samples))

    def files_of(self, unit: int) -> list[str]:
        """Return the files of outer shard `unit`."""
        return [f"{name}/c/{unit}/0/0" for name in self.names]


def create_maps(path: Location, spec: MapsSpec) -> None:
    """Write the metadata of a store; existing shards are kept."""
    make_directory(path)
    group = zarr.open_group(zarr_store(path), mode="a", zarr_format=3)
    for name in spec.names:
        if name in group:
            continue
        dtype, fill = FILLS[name]
        tile = (spec.size, spec.size)
        group.create_array(
            name,
            shape=(spec.num_samples, *tile),
            dtype=dtype,
            chunks=(1, *tile),
            shards=(spec.unit_rows, *tile),
            compressors=[ZstdCodec(level=3), Crc32cCodec()],
            fill_value=fill,
            dimension_names=("sample", "row", "column"),
        )


def write_maps(path: Location, spec: MapsSpec, unit: int, maps: dict[str, NDArray[Any]]) -> list[str]:
    """Write outer shard `unit`: (rows, size, size) by name of the array.

    Returns:
        Its files. zarr writes none for an array without any label.
    """
    group = zarr.open_group(zarr_store(path), mode="r+", zarr_format=3)
    rows = spec.rows_of(unit)
    for file in spec.files_of(unit):  # zarr would read an existing last shard, and stop if it is damaged
        (path / file).unlink(missing_ok=True)
    for name in spec.names:
        array = group[name]
        assert isinstance(array, zarr.Array)
        array[rows.start : rows.stop] = maps[name]
    return [file for file in spec.files_of(unit) if (path / file).exists()]


def write_presence(path: Location, present: dict[str, NDArray[np.bool_]]) -> None:
    """Write has_segmentation and has_depth."""
    group = zarr.open_group(zarr_store(path), mode="r+", zarr_format=3)
    for name, values in present.items():
        group.create_array(
            f"has_{name}", data=values, chunks=(max(1, len(values)),), dimension_names=("sample",), overwrite=True
        )


class LabelMaps:
    """Finished label maps.

    >>> maps = LabelMaps("runs/ade20k/maps")             # doctest: +SKIP
    >>> maps.read("segmentation", [5, 3])                # (2, size, size) uint16
    """

    def __init__(self, path: str | Location) -> None:
        """Open the maps at `path`.

        Raises:
            ArtifactError: there are none, or they are not finished.
        """
        self.path = absolute(location(path))
        self.manifest = LabelMapsManifest.read(self.path)
        self._there: dict[str, set[int]] = {name: set() for name in FILLS}  # units whose file was seen

    @property
    def names(self) -> list[str]:
        """Arrays that hold at least one map."""
        counts = {SEGMENTATION: self.manifest.num_segmentation, DEPTH: self.manifest.num_depth}
        return [name for name, count in counts.items() if count]

    @cached_property
    def _group(self) -> zarr.Group:
        return zarr.open_group(zarr_store(self.path), mode="r", zarr_format=3)

    def rows(self, name: str) -> NDArray[np.int64]:
        """Return the rows that have such a map.

        Raises:
            ArtifactError: the store is damaged.
        """
        return np.flatnonzero(self._read(f"has_{name}", slice(None)))

    def read(self, name: str, rows: Sequence[int]) -> NDArray[Any]:
        """Return (n, size, size) maps of rows in any order, also repeated; all must have such a map, see `rows`.

        Raises:
            ArtifactError: a shard is missing or damaged.
        """
        for unit in {row // self.manifest.unit_rows for row in rows} - self._there[name]:
            if not (file := self.path / name / f"c/{unit}/0/0").exists():  # zarr would return maps without labels
                raise ArtifactError(f"{file}: expected a shard of label maps, found none. {_RESTORE}")
            self._there[name].add(unit)
        return self._read(name, np.asarray(rows, np.int64))

    def _read(self, name: str, rows: Any) -> NDArray[Any]:
        try:
            array = self._group[name]
            assert isinstance(array, zarr.Array)
            return np.asarray(array.oindex[rows] if not isinstance(rows, slice) else array[rows])
        except (KeyError, ValueError, OSError) as error:
            raise ArtifactError(f"{self.path}/{name}: cannot read the label maps: {error}. {_RESTORE}") from error
