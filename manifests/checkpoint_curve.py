"""Result of `svgpipe evaluate-checkpoints`: the distance of samples over a training, and epochs to given distances."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from .estimate import Estimate
from .manifest import FrozenModel
from .report_file import ExtractorInfo

CURVE_NAME = "checkpoints.json"


class CheckpointPoint(FrozenModel):
    """A checkpoint and the distance of its samples."""

    step: int = Field(description="Training steps.")
    epochs: float = Field(description="Training images seen, over their number in the cache.")
    weights: str = Field(description="sha256 of the file of the weights.")
    frechet_distance: Estimate = Field(description="Fréchet distance of the samples to the reference.")


class Reached(FrozenModel):
    """How long a training takes to a distance."""

    distance: float = Field(description="The distance that was asked for.")
    step: int | None = Field(description="First checkpoint at or below it; null: none.")
    epochs: float | None = Field(
        description="Epochs, interpolated between this checkpoint and the one before, linearly in the logarithm of the "
        "distance; of the first checkpoint if there is none before; null: not reached."
    )


class CheckpointCurve(FrozenModel):
    """Distances over a training."""

    metric: str = Field(description="FID, or a Fréchet distance in a named feature space.")
    extractor: ExtractorInfo = Field(description="Feature extractor of the metric.")
    reference: str = Field(description="Reference images or statistics, in words.")
    num_samples: int = Field(description="Number of samples per checkpoint.")
    image_size: int = Field(description="Pixels per side of the samples.")
    sampler: str = Field(description="Steps, solver and weights, in words; without guidance.")
    heldout: Estimate | None = Field(description="Distance of held-out images; null: the reference has none.")
    points: list[CheckpointPoint] = Field(description="The checkpoints, by step.")
    reached: list[Reached] = Field(description="Epochs to the distances that were asked for.")


def epochs_to(points: Sequence[CheckpointPoint], distance: float) -> Reached:
    """Return how long the training takes to a distance, see `Reached`. The points are in the order of their steps."""
    below = next((i for i, point in enumerate(points) if point.frechet_distance.value <= distance), None)
    if below is None:
        return Reached(distance=distance, step=None, epochs=None)
    point = points[below]
    if below == 0 or point.frechet_distance.value <= 0:
        return Reached(distance=distance, step=point.step, epochs=point.epochs)
    before = points[below - 1]
    high, low = math.log(before.frechet_distance.value), math.log(point.frechet_distance.value)
    share = (high - math.log(distance)) / (high - low)
    epochs = before.epochs + share * (point.epochs - before.epochs)
    return Reached(distance=distance, step=point.step, epochs=epochs)
