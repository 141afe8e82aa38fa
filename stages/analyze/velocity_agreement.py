"""Agreement of the true velocity fields of classes: the paper's argument for few steps, measured on the data alone.

The conditional velocity field of a class is known in closed form (`empirical_velocity`). At a point on the path of an
image of class c, three fields are compared: those of two disjoint halves of the other images of c, and that of as many
images of another class. Agreement is the cosine of two fields. Within and between classes therefore compare fields of
equal size at the same points.

Legend: P points, D dimensions of a whole latent.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.manifest import FrozenModel
from svgpipe.manifests.selection import evenly_spread
from svgpipe.models.empirical_flow import empirical_velocity, posterior
from svgpipe.models.seeds import generator

from ..evaluate.intervals import estimate, mean_estimate, picks

# Dense near the noise: with latents of 100,000 dimensions, a field soon points at a single image, from t = 0.02 on if
# images have nothing in common.
TIMES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9)
POINTS_PER_CLASS = 8
MIN_CLASS = 3
# All classes are reduced to the size of the smallest one. Classes below this fraction of the median are skipped.
MIN_SHARE = 0.5
MAX_FIELDS = 32  # classes whose fields are computed at all points; all 1000 would take days


class Agreement(FrozenModel):
    """Agreement at one time."""

    time: float
    within: Estimate = Field(description="Mean cosine between the fields of two halves of a class.")
    between: Estimate = Field(
        description="Mean cosine between the fields of half a class and of half another class, over at most 32 others."
    )
    parted: Estimate = Field(
        description="(1 - between) / (1 - within): how much more fields of two classes differ; 1: classes do not "
        "matter."
    )
    rows: Estimate = Field(
        description="Number of images of half a class that contribute to its field (1 / sum of squared weights). At 1, "
        "the field points at the most likely image alone, and positions of single images are compared."
    )


class VelocityAgreement(NamedTuple):
    """Agreement at all times, and its mean."""

    at_times: list[Agreement]
    mean_parted: Estimate
    left_out: list[int]  # skipped classes with too few images


def velocity_agreement(latents_nD: Tensor, labels_n: Tensor, replicates: int, seed: int) -> VelocityAgreement:
    """Measure (n,D) normalised latents at all TIMES. Intervals are over the points.

    Classes with fewer than three images, or with less than half the median number, are skipped.

    Returns:
        Agreement at all times, its mean, and the skipped classes.

    Raises:
        ValueError: fewer than two classes with at least three images.
    """
    groups = _groups(labels_n, seed)
    if len(groups) < 2:
        raise ValueError("velocity agreement: expected at least two classes of three images")
    cosines, rows_TP = [], []
    rows = torch.cat([points for points, _, _ in groups.values()])
    classes = labels_n[rows].cpu()
    fields = [list(groups)[i] for i in evenly_spread(len(groups), MAX_FIELDS)]
    for t in TIMES:
        z = _points(latents_nD, rows, t, seed)
        own, twin, effective = torch.empty_like(z), torch.empty_like(z), torch.empty(len(z), dtype=torch.float64)
        for c, (_, one, two) in groups.items():
            here = (classes == c).to(z.device)
            likely = posterior(z[here], t, latents_nD[one])
            own[here] = empirical_velocity(z[here], t, latents_nD[one], likely)
            twin[here] = empirical_velocity(z[here], t, latents_nD[two])
            effective[classes == c] = 1 / likely.square().sum(1).cpu()
        within, between = F.cosine_similarity(own, twin, dim=1).cpu(), torch.zeros(len(z))
        others = torch.zeros(len(z))
        for c in fields:  # for all points at once: there are as many fields as classes
            cosine = F.cosine_similarity(own, empirical_velocity(z, t, latents_nD[groups[c][1]]), dim=1).cpu()
            between += torch.where(classes == c, 0.0, cosine)
            others += classes != c
        between /= others
        cosines.append(torch.stack([within, between]))
        rows_TP.append(effective)
    left_out = sorted(set(labels_n.tolist()) - set(groups))
    return VelocityAgreement(
        *_summarised(torch.stack(cosines).double(), torch.stack(rows_TP), replicates, seed), left_out
    )


def _summarised(cosines_T2P: Tensor, rows_TP: Tensor, replicates: int, seed: int) -> tuple[list[Agreement], Estimate]:
    """Return estimates of the cosines within and between classes at every time. Points are resampled jointly."""
    count = cosines_T2P.shape[2]

    def parted(pick: Tensor) -> Tensor:
        within, between = cosines_T2P[:, :, pick].mean(2).T
        return (1 - between) / (1 - within).clamp_min(1e-9)

    value = parted(torch.arange(count))
    resampled = [parted(pick) for pick in picks(count, replicates, seed)]
    at_times = [
        Agreement(
            time=t,
            within=mean_estimate(within, replicates, seed),
            between=mean_estimate(between, replicates, seed),
            parted=estimate(float(value[i]), [float(r[i]) for r in resampled], count),
            rows=mean_estimate(rows_TP[i], replicates, seed),
        )
        for i, (t, (within, between)) in enumerate(zip(TIMES, cosines_T2P, strict=True))
    ]
    return at_times, estimate(float(value.mean()), [float(r.mean()) for r in resampled], count)


def _groups(labels: Tensor, seed: int) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Return for each class the rows that give points, and two halves of the rest, of equal size in all classes."""
    members = {int(c): torch.nonzero(labels == c).flatten() for c in labels.unique()}
    enough = max(MIN_CLASS, MIN_SHARE * statistics.median(map(len, members.values())))
    members = {c: rows for c, rows in members.items() if len(rows) >= enough}
    if not members:
        return {}
    smallest = min(map(len, members.values()))
    points = max(1, min(POINTS_PER_CLASS, smallest // 3))
    half = (smallest - points) // 2
    groups = {}
    for c, rows in members.items():
        shuffled = rows[torch.randperm(len(rows), generator=generator(seed, "halves", c))]
        groups[c] = (shuffled[:points], shuffled[points : points + half], shuffled[points + half : points + 2 * half])
    return groups


def _points(latents: Tensor, rows: Tensor, t: float, seed: int) -> Tensor:
    """Return (P,D) points at time t on the paths of these rows. The noise of a row is the same at all times."""
    noise = torch.stack(
        [torch.randn(latents.shape[1], generator=generator(seed, "agreement", int(row))) for row in rows]
    )
    return (1 - t) * noise.to(latents.device) + t * latents[rows]
