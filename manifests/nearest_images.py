"""Results: distances of a set of images to their nearest reference images, which show copies of training images."""

from __future__ import annotations

from pydantic import Field

from .estimate import Estimate
from .manifest import FrozenModel

QUANTILES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 1)


class NearestPair(FrozenModel):
    """An image and the reference image that is nearest to it in feature space."""

    image: int = Field(description="Number of the image in its set.")
    reference: int = Field(description="Number of the reference image.")
    name: str = Field(description="File of the reference image, or tar and key.")
    distance: float = Field(description="Euclidean distance of their features.")


class NearestImages(FrozenModel):
    """Euclidean distances, in feature space, to the nearest reference image."""

    distances: list[float] = Field(
        description=f"At the quantiles {', '.join(f'{100 * level:g}' for level in QUANTILES)} %."
    )
    threshold: float | None = Field(
        description="Distance that 1 % of new images are below: of reconstructions of held-out images or, where the "
        "autoencoder cannot encode, of held-out images. null: fewer than 100 of them."
    )
    near_copies: Estimate | None = Field(
        description="Fraction of the images that are closer than the threshold; 1 % is expected of new images."
    )
    closest: list[NearestPair] = Field(description="The near-copies, closest first; at least 10 pairs, at most 100.")
