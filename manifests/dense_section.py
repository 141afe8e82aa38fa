"""Recipe: label maps that lie beside images, and probes of a cache on them."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from .schedule_section import ScheduleSection
from .section import Natural, Positive, Section


class MapsSection(Section):
    """`svgpipe extract-maps`: masks and depth maps beside the images → label maps of the centre crops."""

    size: Positive = Field(256, description="Labels per side of the centre crop, such as the pixels of the images.")
    classes: tuple[str, ...] = Field((), description="Names of the classes of KEY.seg.png; none: no masks are read.")
    first_class: Natural = Field(0, description="Number of the first class in the masks; lower ones are unlabelled.")
    unlabelled: tuple[Natural, ...] = Field((255,), description="Further numbers of pixels without a class.")
    depth_unit: float | None = Field(
        None, gt=0, description="Metres per unit of KEY.depth.npy; null: no depths are read."
    )
    min_depth: float = Field(0.001, gt=0, description="Metres; a smaller depth is unknown.")
    max_depth: float = Field(10.0, gt=0, description="Metres; a larger depth is unknown.")
    unit_rows: Positive = Field(256, description="Samples per outer Zarr shard, the unit of work and of resume.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes names a class twice")
        if self.max_depth <= self.min_depth:
            raise ValueError(f"max_depth must be above min_depth, found {self.max_depth} and {self.min_depth}")
        return self


class DenseProbeSection(Section):
    """`svgpipe probe --maps`: a head per grid cell on the features of a cache."""

    head: Literal["linear", "fpn"] = Field(
        "linear", description="linear, or fpn: convolutions at 1, 2 and 4 times the resolution of the grid."
    )
    width: Positive = Field(128, description="Channels of the fpn head.")
    bins: Positive = Field(256, description="Depths that the head of depth chooses between.")
    steps: Positive = Field(2000, description="Training steps.")
    batch_size: Positive = Field(16, description="Images per step.")
    learning_rate: float = Field(1e-3, gt=0, description="Of AdamW.")
    weight_decay: float = Field(1e-4, ge=0, description="Of AdamW.")
    schedule: ScheduleSection = ScheduleSection(kind="cosine", warmup_steps=100)
    use_flips: bool = Field(True, description="Train also on mirrored images, where the cache holds them.")
    bootstrap: Natural = Field(100, description="Resamplings for the intervals; 0: none.")
    seed: Natural = Field(0, description="Seed of the head and of the order of the images.")
