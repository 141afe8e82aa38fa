"""The part of an evaluation page about copies: the samples that are closest to reference images, beside these."""

from __future__ import annotations

from dataclasses import dataclass

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation import Measured
from svgpipe.manifests.nearest_images import QUANTILES, NearestImages
from svgpipe.stages.images.image_set import ImageSet

from .charts import Drawing, LineChart
from .page import Grid, picture

SHOWN = 10  # pairs


@dataclass(frozen=True)
class NearestSection:
    """Pairs of a set and the reference images nearest to them, and the distances of this set and of others."""

    nearest: NearestImages
    grid: Grid
    chart: Drawing


def nearest_section(samples: Measured, images: ImageSet, lines: dict[str, Measured], real: ImageSet) -> NearestSection:
    """Return the section of measured samples.

    Args:
        samples: with `nearest`.
        images: of the samples.
        lines: reference lines by role.
        real: reference images, in the order in which they were measured.
    """
    nearest = samples.nearest
    assert nearest is not None, "measured where the reference has images"
    shown = nearest.closest[:SHOWN]
    pictures = [picture(images.pixels(pair.image), f"{pair.image}: {pair.distance:.3g}") for pair in shown]
    pictures += [picture(real.pixels(pair.reference), pair.name) for pair in shown]
    note = "first row: samples with their number and distance; second row: the nearest reference images"
    sets = {"samples": nearest}
    for role, name in (("heldout", "held-out real"), ("reconstructions", "reconstructions")):
        if role in lines and (other := lines[role].nearest) is not None:
            sets[name] = other
    series = {
        name: [Estimate(value=distance, num_images=0) for distance in found.distances] for name, found in sets.items()
    }
    levels = {} if nearest.threshold is None else {"threshold": nearest.threshold}
    chart = LineChart(
        "Distance to the nearest reference image",
        "quantile of the images, %",
        "distance in feature space",
        [100 * level for level in QUANTILES],
        series,
        levels,
    )
    return NearestSection(nearest, Grid("Closest pairs", note, len(shown), pictures), chart.render())
