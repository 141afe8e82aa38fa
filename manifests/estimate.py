"""A measured number with its interval and its number of images."""

from __future__ import annotations

from pydantic import Field

from .manifest import FrozenModel


class Estimate(FrozenModel):
    """A measured number, its 95 % interval, and the number of images that it was measured on.

    Intervals come from the bootstrap; those of fractions are Wilson intervals.
    """

    value: float = Field(description="The measured number.")
    low: float | None = Field(None, description="Lower end of the 95 % interval; null without resampling.")
    high: float | None = Field(None, description="Upper end of the 95 % interval.")
    num_images: int = Field(description="Number of images that it was measured on.")
