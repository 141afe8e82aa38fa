"""Nearest neighbours between two sets of features: precision and recall, density and coverage, nearest rows.

Legend: n m rows, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .feature_distances import BLOCK

PRECISION_NEIGHBOURS = 3  # of precision and recall, arXiv 1904.06991
DENSITY_NEIGHBOURS = 5  # of density and coverage, arXiv 2002.09797


def ball_radii(rows: Tensor, neighbours: Sequence[int], device: torch.device | None = None) -> Tensor:
    """(k,m) distances of each of (m,D) rows to its k-th neighbour among the others, for each of the `neighbours`.

    Every distance is computed once, and counts for both of its rows. Where there is no k-th neighbour, the radius is
    -1: no ball.
    """
    most, blocks = max(neighbours), rows.split(BLOCK)
    # The first of the nearest rows is the row itself.
    nearest = [torch.full((len(block), most + 1), math.inf, device=device or rows.device) for block in blocks]

    def see(place: int, distances: Tensor) -> None:
        nearest[place] = torch.cat([nearest[place], distances], dim=1).topk(most + 1, largest=False).values

    for one, block in enumerate(blocks):
        here = block.to(device)
        for other in range(one, len(blocks)):
            distances = torch.cdist(here, blocks[other].to(device))
            see(one, distances)
            if other > one:
                see(other, distances.T)
    ordered = torch.cat(nearest).sort(1).values.T[list(neighbours)]
    return torch.where(ordered.isinf(), -1, ordered).to(rows)


@dataclass(frozen=True)
class Neighbours:
    """What the distances between (n,D) rows and an (m,D) reference tell.

    Attributes:
        precise: (n,) bool, rows in a ball of the reference. Source of both: arXiv 1904.06991, eq. 1 and 2.
        recalled: (m,) bool, rows of the reference in a ball of the rows.
        balls: (n,) float32, number of wider balls of the reference that hold the row. Source of both: arXiv 2002.09797.
        covered: (m,) bool, rows of the reference whose wider ball holds one of the rows.
        nearest: (n,) int64, number of the nearest row of the reference.
        distances: (n,) float32, distance to it.
    """

    precise: Tensor
    recalled: Tensor
    balls: Tensor
    covered: Tensor
    nearest: Tensor
    distances: Tensor


def compare_neighbours(
    rows: Tensor, reference: Tensor, radii: Tensor, reference_radii: Tensor, device: torch.device | None = None
) -> Neighbours:
    """Return the neighbours of (n,D) rows in an (m,D) reference, on the CPU. Every distance is computed once.

    Args:
        rows: (n,D).
        reference: (m,D).
        radii: (n,) of the balls around the rows, from `ball_radii`; negative: none.
        reference_radii: (2,m) of the balls around the reference: for precision, and for density and coverage.
        device: where distances are computed; default: that of the rows.
    """
    device = device or rows.device
    n, m = len(rows), len(reference)
    precise, recalled, covered = (torch.zeros(size, dtype=torch.bool, device=device) for size in (n, m, m))
    balls, nearest = torch.zeros(n, device=device), torch.zeros(n, dtype=torch.int64, device=device)
    distances, radii, wider = torch.full((n,), math.inf, device=device), radii.to(device), reference_radii.to(device)
    for i in range(0, n, BLOCK):
        here = slice(i, i + BLOCK)
        block = rows[here].to(device)
        for j in range(0, m, BLOCK):
            there = slice(j, j + BLOCK)
            apart = torch.cdist(block, reference[there].to(device))
            precise[here] |= (apart <= wider[0, there]).any(1)
            recalled[there] |= (apart <= radii[here, None]).any(0)
            inside = apart <= wider[1, there]
            balls[here] += inside.sum(1)
            covered[there] |= inside.any(0)
            closest, place = apart.min(1)
            nearest[here] = torch.where(closest < distances[here], j + place, nearest[here])
            distances[here] = torch.minimum(distances[here], closest)
    found = nearest.cpu()
    # Distances from products are inexact where rows are nearly equal: those of copies would not be 0.
    exact = torch.cat(
        [
            (rows[i : i + BLOCK] - reference[found[i : i + BLOCK]]).norm(dim=1).to("cpu", torch.float32)
            for i in range(0, n, BLOCK)
        ]
    )
    return Neighbours(precise.cpu(), recalled.cpu(), balls.cpu(), covered.cpu(), found, exact)
