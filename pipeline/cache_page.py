"""`svgpipe inspect CACHE --html`: a page about a feature cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.stages.artifacts.cache_statistics import CacheStatistics
from svgpipe.stages.artifacts.contact_sheet import HISTOGRAM_RANGE, contact_sheet
from svgpipe.stages.images.decode import RGBArray

from .charts import curve
from .page import lineage, picture, render
from .synsets import shown_name

SAMPLES = 24


def render_cache(cache: FeatureCache, out: Location, samples: int = SAMPLES) -> None:
    """Write the page of `cache` to `out`, with source images and reconstructions if their artifacts exist."""
    statistics = CacheStatistics.of(cache)
    sheet = contact_sheet(cache, samples)
    channels, word = len(statistics.mean), next(iter(statistics.groups))
    energy = np.cumsum(statistics.eigenvalues) / max(float(statistics.eigenvalues.sum()), 1e-12)
    order = list(range(1, channels + 1))
    pictures = [
        {
            "row": row,
            "class_name": shown_name(row.class_name),
            "shown": [
                picture(pixels, caption, lossless=caption != "source")
                for pixels, caption in (
                    (row.source, "source"),
                    (row.features, word),
                    (row.residual, "residual"),
                    (row.decoded, "decoded"),
                )
                if pixels is not None
            ],
        }
        for row in sheet.rows
    ]
    curves = [
        curve("cumulative share of variance", order, energy.tolist(), "components"),
        curve("mean per channel", order, statistics.mean.tolist(), "channel"),
        curve("standard deviation per channel", order, statistics.std.tolist(), "channel"),
    ]
    page = render(
        "cache_template.html",
        manifest=cache.manifest,
        word=word,
        shape=cache.shape,
        statistics=statistics,
        sheet=sheet,
        pictures=pictures,
        columns=max(len(entry["shown"]) for entry in pictures),  # type: ignore[arg-type]
        maps=[
            (name, group.stop - group.start, picture(_heat(sheet.histogram[group]), name, lossless=True))
            for name, group in statistics.groups.items()
        ],
        histogram_range=HISTOGRAM_RANGE,
        curves=curves,
        lineage=lineage(cache.manifest.as_input(cache.path), "cache"),
    )
    write_atomic(out, page)
    for drawing in curves:
        drawing.save_beside(out)


def _heat(histogram: NDArray[np.float64]) -> RGBArray:
    """Return (channel, bin) fractions as a picture: one column per channel, large values at the top, darker: denser."""
    density = histogram.T[::-1] / max(float(histogram.max()), 1e-12)
    ink = np.asarray([179, 70, 14]) / 255
    shade = np.sqrt(density)[..., None]
    return np.asarray((1 - shade * (1 - ink)) * 255, np.uint8)
