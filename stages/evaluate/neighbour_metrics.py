"""Metrics from nearest neighbours: precision, recall, density, coverage, and samples that copy reference images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.nearest_images import QUANTILES, NearestImages, NearestPair
from svgpipe.manifests.selection import evenly_spread
from svgpipe.models.neighbours import (
    DENSITY_NEIGHBOURS,
    PRECISION_NEIGHBOURS,
    Neighbours,
    ball_radii,
    compare_neighbours,
)

from ..runtime.device import pick_device
from .intervals import mean_estimate, share_estimate

# The radius of a ball needs the distances to all other images: days of work for all of ImageNet. As in the papers.
MAX_BALLS = 50_000
MIN_HELDOUT = 100  # held-out images: of fewer, there is no 1 % quantile
MAX_PAIRS, MIN_PAIRS = 100, 10  # closest pairs that are named


@dataclass(frozen=True)
class NeighbourMetrics:
    """Compares sets with reference images.

    Attributes:
        pooled: (m,D) features of the reference.
        names: (m,) of its images.
        new: (k,D) features of images that the model has not seen, decoded as samples are.
        replicates: bootstrap resamplings of the density; 0: no intervals.
        seed: of the bootstrap.
    """

    pooled: Tensor
    names: Sequence[str]
    new: Tensor | None
    replicates: int
    seed: int

    def measure(self, rows: Tensor) -> dict[str, Estimate | NearestImages | None]:
        """Return fields of `Measured` for (n,D) features; None: too few images for balls."""
        found, places = self._compare(rows), evenly_spread(len(self.pooled), MAX_BALLS)
        balls, wide = len(places) > PRECISION_NEIGHBOURS, len(places) > DENSITY_NEIGHBOURS
        density = found.balls / DENSITY_NEIGHBOURS
        return {
            "precision": self._share(found.precise) if balls else None,
            "recall": self._share(found.recalled[places]) if len(rows) > PRECISION_NEIGHBOURS else None,
            "density": mean_estimate(density, self.replicates, self.seed) if wide else None,
            "coverage": self._share(found.covered[places]) if wide else None,
            "nearest": self._nearest(found),
        }

    def _compare(self, rows: Tensor) -> Neighbours:
        radii = radii_of_some(rows, [PRECISION_NEIGHBOURS])[0]
        return compare_neighbours(rows, self.pooled, radii, self._reference_radii, pick_device())

    @cached_property
    def _reference_radii(self) -> Tensor:
        return radii_of_some(self.pooled, [PRECISION_NEIGHBOURS, DENSITY_NEIGHBOURS])

    @cached_property
    def threshold(self) -> float | None:
        """The distance to the reference that 1 % of the new images fall below; None: too few of them.

        A decoded copy of a training image differs from it as a reconstruction does, so distances of real images would
        be too small a measure.
        """
        if self.new is None or len(self.new) < MIN_HELDOUT:
            return None
        return float(self._compare(self.new).distances.quantile(0.01))

    def _nearest(self, found: Neighbours) -> NearestImages:
        """Return the distances to the reference, and the closest pairs.

        The near-copies come first, at most MAX_PAIRS pairs, at least MIN_PAIRS.
        """
        distances, copies = found.distances, None
        if self.threshold is not None:
            copies = distances < self.threshold
        count = min(MAX_PAIRS, max(MIN_PAIRS, 0 if copies is None else int(copies.sum())))
        order = distances.argsort(stable=True)[:count].tolist()
        return NearestImages(
            distances=distances.double().quantile(torch.tensor(QUANTILES, dtype=torch.float64)).tolist(),
            threshold=self.threshold,
            near_copies=None if copies is None else self._share(copies),
            closest=[self._pair(found, image) for image in order],
        )

    def _pair(self, found: Neighbours, image: int) -> NearestPair:
        other = int(found.nearest[image])
        name = self.names[other] if self.names else str(other)
        return NearestPair(image=image, reference=other, name=name, distance=float(found.distances[image]))

    def _share(self, hits: Tensor) -> Estimate:
        return share_estimate(hits, interval=bool(self.replicates))


def radii_of_some(rows: Tensor, neighbours: Sequence[int]) -> Tensor:
    """Return radii (k,n) of the balls around (n,D) features; at most MAX_BALLS have one, see `ball_radii`."""
    radii = rows.new_full((len(neighbours), len(rows)), -1)
    places = evenly_spread(len(rows), MAX_BALLS)
    chosen = rows if len(places) == len(rows) else rows[places]
    radii[:, places] = ball_radii(chosen, neighbours, pick_device())
    return radii
