"""Shape of a feature store, and names of its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .filesystem import Location

StoreDtype = Literal["float16", "int8"]
# What is stored of an image: a latent, or mean and standard deviation of a posterior.
Distribution = Literal["point", "gaussian"]


@dataclass(frozen=True)
class StoreSpec:
    """Shape of a feature store."""

    num_samples: int
    views: tuple[str, ...]
    grid: tuple[int, int]
    channels: int
    unit_rows: int
    class_names: tuple[str, ...]
    dtype: StoreDtype = "float16"

    @property
    def num_units(self) -> int:
        """Number of outer shards."""
        return -(-self.num_samples // self.unit_rows)

    def rows_of(self, unit: int) -> range:
        """Return the samples of outer shard `unit`."""
        return range(unit * self.unit_rows, min((unit + 1) * self.unit_rows, self.num_samples))

    def shape_of(self, unit: int) -> tuple[int, ...]:
        """Return the shape of outer shard `unit`."""
        return (len(self.rows_of(unit)), len(self.views), *self.grid, self.channels)


def unit_name(unit: int) -> str:
    """Return the path of outer shard `unit` below its store."""
    return f"features/c/{unit}/0/0/0/0"


def unit_file(path: Location, unit: int) -> Location:
    """Return the file of outer shard `unit` of the store at `path`."""
    return path / unit_name(unit)
