"""The numbers of all reports: each with how many images it was found on, and its interval."""

from __future__ import annotations

from pydantic import Field

from .manifest import FrozenModel


class Estimate(FrozenModel):
    """A number, how many images it was found on, and the 95 % interval over them.

    By bootstrap; of shares Wilson's, which has a width where all or none hit.
    """

    value: float = Field(description="The number itself.")
    low: float | None = Field(None, description="Without it, nothing was resampled.")
    high: float | None = Field(None, description="The upper end; low is the lower one.")
    num_images: int = Field(description="That it was found on.")
