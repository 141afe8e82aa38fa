"""Velocities from noise to the images of two classes: the paper's toy figure, on the latents of a cache."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.manifest import FrozenModel
from svgpipe.models.seeds import generator

from ..evaluate.intervals import mean_estimate

SOURCES = 32  # noise samples; the first one is drawn
MIN_IMAGES = 3  # per class


class ClassPlane(FrozenModel):
    """One class on the plane of the figure."""

    name: str
    images: list[tuple[float, float]] = Field(description="Latents of its images.")
    mean: tuple[float, float] = Field(description="Their mean: the end of the arrow of the mean velocity.")
    own: Estimate = Field(
        description="Cosine between the velocity to an image and the mean velocity to the other images of its class."
    )
    other: Estimate = Field(description="Cosine between it and the mean velocity to the images of the other class.")


class ClassVelocities(FrozenModel):
    """Velocities x1 - x0 from noise x0 to latents x1 of two classes, flattened and normalised.

    The plane holds the two class means, and the direction in which the images vary most besides.
    """

    source: tuple[float, float] = Field(description="A noise sample, the start of the arrows.")
    classes: tuple[ClassPlane, ClassPlane]


def class_velocities(
    latents: tuple[Tensor, Tensor], names: tuple[str, str], replicates: int, seed: int
) -> ClassVelocities:
    """Measure two classes.

    Args:
        latents: (n,D) and (m,D) of each class.
        names: of the classes.
        replicates: bootstrap resamplings over the images.
        seed: of the noise and the bootstrap.

    Returns:
        The plane, and the cosines, averaged over SOURCES noise samples.

    Raises:
        ValueError: fewer than MIN_IMAGES images of a class, or all latents are equal.
    """
    for name, rows in zip(names, latents, strict=True):
        if len(rows) < MIN_IMAGES:
            raise ValueError(f"velocities: expected at least {MIN_IMAGES} images of {name}, found {len(rows)}")
    means = [rows.mean(0) for rows in latents]
    axes, centre = _plane(latents, means), (means[0] + means[1]) / 2
    noise = torch.randn(SOURCES, latents[0].shape[1], generator=generator(seed, "velocities"))
    noise = noise.to(latents[0])

    def place(row: Tensor) -> tuple[float, float]:
        x, y = ((row - centre) @ axes).tolist()
        return x, y

    planes = []
    for one in range(2):
        own, other = _cosines(latents[one], means[1 - one], noise)
        planes.append(
            ClassPlane(
                name=names[one],
                images=[place(row) for row in latents[one]],
                mean=place(means[one]),
                own=mean_estimate(own.cpu(), replicates, seed),
                other=mean_estimate(other.cpu(), replicates, seed),
            )
        )
    return ClassVelocities(source=place(noise[0]), classes=(planes[0], planes[1]))


def _plane(latents: tuple[Tensor, Tensor], means: list[Tensor]) -> Tensor:
    """Return orthonormal axes (D,2): from one class mean to the other, and of the largest variance besides.

    Raises:
        ValueError: the class means are equal, or no image differs from the line between them.
    """
    line = means[1] - means[0]
    if not line.norm() > 0:
        raise ValueError("velocities: both classes have the same mean")
    first = F.normalize(line, dim=0)
    centred = torch.cat([rows - mean for rows, mean in zip(latents, means, strict=True)])
    centred = centred - (centred @ first)[:, None] * first
    if not centred.norm() > 0:
        raise ValueError("velocities: the images of a class are all equal")
    # Few rows of many columns: the first principal direction from the small Gram matrix.
    weights = torch.linalg.eigh(centred.double() @ centred.double().T).eigenvectors[:, -1]
    return torch.stack([first, F.normalize(centred.T @ weights.to(centred), dim=0)], dim=1)


def _cosines(rows: Tensor, other_mean: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Return (n,) cosines of the velocities to (n,D) rows with both mean velocities, averaged over (s,D) noise."""
    rest = (rows.sum(0) - rows) / (len(rows) - 1)  # the mean without the image itself
    own, other = rows.new_zeros(len(rows)), rows.new_zeros(len(rows))
    for source in noise:
        velocities = rows - source
        own += F.cosine_similarity(velocities, rest - source)
        other += F.cosine_similarity(velocities, (other_mean - source)[None])
    return own / len(noise), other / len(noise)
