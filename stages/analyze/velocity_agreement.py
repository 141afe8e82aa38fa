"""Do the images of one class pull a noisy point the same way, and those of another class elsewhere?

The paper's argument for few steps, made measurable on the data alone: the true conditional velocity field of a class
is known in closed form (`empirical_velocity`). At a point on the path of an image of class c stand three fields: of two
disjoint halves of the other images of c, and of as many images of another class. Agreement is the cosine between two
of them, so within and between classes compare fields of equal size at the same points.

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
from svgpipe.models.empirical_flow import empirical_velocity, posterior
from svgpipe.models.seeds import generator

from ..evaluate.intervals import estimate, mean_estimate, picks
from ..runtime.selection import evenly_spread

# Dense near the noise: of latents of 100,000 numbers, a field soon points at a single image, from t = 0.02 on if these
# have nothing in common.
TIMES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9)
POINTS_PER_CLASS = 8
MIN_CLASS = 3
# Every class is cut to the size of the smallest one, so classes below this share of the median are left out.
MIN_SHARE = 0.5
MAX_FIELDS = 32  # classes whose fields are looked at from all points: with all of 1000, the work would take days


class Agreement(FrozenModel):
    """At one time."""

    time: float
    within: Estimate = Field(description="Mean cosine between the fields of two halves of a class.")
    between: Estimate = Field(
        description="Mean cosine between the fields of half a class and of half another, over at most 32 others."
    )
    parted: Estimate = Field(
        description="(1 - between) / (1 - within): how much further apart fields of two classes are; 1 where "
        "classes do not matter."
    )
    rows: Estimate = Field(
        description="How many images of half a class make up its field (1 / sum of squared weights); at 1 the field "
        "points at the likeliest image alone, and what is compared is where single images lie."
    )


class VelocityAgreement(NamedTuple):
    """At all times, and over them."""

    at_times: list[Agreement]
    mean_parted: Estimate
    left_out: list[int]  # classes with too few images


def velocity_agreement(latents_nD: Tensor, labels_n: Tensor, replicates: int, seed: int) -> VelocityAgreement:
    """Of (n,D) normalised latents, at every one of TIMES; intervals are over the points.

    Classes of fewer than three images, or of less than half the median class, are left out.

    Raises:
        ValueError: fewer than two classes of at least three images.
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
        for c in fields:  # at all points at once: there are as many fields as classes
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
    """Estimates of the cosines within and between, of every time; points are resampled at all times alike."""
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
    """For each class: rows that give points, and two halves of the rest, of equal size in all classes."""
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
    """(P,D) points at time t on the paths of those rows, each from a noise of its own that is the same at all times."""
    noise = torch.stack(
        [torch.randn(latents.shape[1], generator=generator(seed, "agreement", int(row))) for row in rows]
    )
    return (1 - t) * noise.to(latents.device) + t * latents[rows]
