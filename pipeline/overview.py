"""The overview picture of an evaluation: real images, reconstructions, and samples with few and many steps.

One row per set, one column per class. It is at the top of the report and next to it as `report-overview.webp`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from svgpipe.manifests.evaluation import Measured, Report, SamplerInfo
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.selection import choose_evenly
from svgpipe.stages.evaluate.decode_latents import decoded_images
from svgpipe.stages.evaluate.measure_images import RECONSTRUCTIONS
from svgpipe.stages.evaluate.reference import RealSets
from svgpipe.stages.images.decode import RGBArray
from svgpipe.stages.images.image_set import ImageSet

MAX_COLUMNS = 8
TILE, GAP, LABEL_WIDTH = 96, 4, 160  # pixels
# On a transparent background: the grey can be read on white and on black.
FONT_SIZE, GREY = 21, (118, 123, 132)
QUALITY = 85


@dataclass(frozen=True)
class Row:
    """A set of images with its label."""

    label: str
    images: list[RGBArray]


def overview_rows(evaluation: Location, report: Report, best: Measured, sets: RealSets) -> list[Row]:
    """Return up to MAX_COLUMNS images per set, one per class, with the same order of classes in all rows.

    The samples have the guidance scale of the best setting, are sorted by steps, and start from the same noise.
    """
    rows = []
    if sets.reconstructed:
        originals = ImageSet(sets.reconstructed, report.image_size)
        places = _one_per_class(originals)
        rows.append(_row("real", originals, places))
        if any(r.role == "reconstructions" for r in report.results):
            rows.append(_row("reconstructed", decoded_images(evaluation, RECONSTRUCTIONS), places))
    samples = {sampler_of(r).steps: r for r in report.results if _has_guidance_of(best, r)}
    for steps, result in sorted(samples.items()):
        images = decoded_images(evaluation, result.name)
        rows.append(_row(f"{steps} step{'s' if steps > 1 else ''}", images, _one_per_class(images)))
    return rows


def sampler_of(result: Measured) -> SamplerInfo:
    """Return the sampler settings of a set of samples."""
    assert result.sampler is not None, "samples carry their settings"
    return result.sampler


def _has_guidance_of(best: Measured, result: Measured) -> bool:
    sampler, wanted = result.sampler, sampler_of(best)
    return sampler is not None and (sampler.guidance, sampler.repeat) == (wanted.guidance, wanted.repeat)


def _one_per_class(images: ImageSet) -> list[int]:
    """Return the places of the first image of each class, up to MAX_COLUMNS; of any images if there is one class."""
    classes, first = np.unique(images.labels, return_index=True)
    return choose_evenly(first.tolist() if len(classes) > 1 else list(range(len(images))), MAX_COLUMNS)


def _row(label: str, images: ImageSet, places: Sequence[int]) -> Row:
    return Row(label, [images.pixels(i) for i in places])


def overview_webp(rows: Sequence[Row]) -> bytes:
    """Return the rows as one WebP image, each with its label on the left."""
    columns = max(len(row.images) for row in rows)
    size = (LABEL_WIDTH + columns * (TILE + GAP), len(rows) * (TILE + GAP) - GAP)
    sheet = Image.new("RGBA", size)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for number, row in enumerate(rows):
        top = number * (TILE + GAP)
        draw.text((0, top + TILE / 2), row.label, GREY, font, anchor="lm")
        for column, pixels in enumerate(row.images):
            tile = Image.fromarray(pixels).resize((TILE, TILE), Image.Resampling.LANCZOS)
            sheet.paste(tile, (LABEL_WIDTH + column * (TILE + GAP), top))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=QUALITY)
    return buffer.getvalue()
