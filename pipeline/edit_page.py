"""The result of `svgpipe edit`: pictures and a page."""

from __future__ import annotations

import numpy as np

from svgpipe.manifests.filesystem import Location, make_directory, write_atomic
from svgpipe.stages.images.decode import RGBArray, encode_png
from svgpipe.stages.networks.sampling import SamplerSettings
from svgpipe.stages.sample.edit import Box, Edited

from .page import Grid, picture, render

PAGE = "edit.html"
FRAME = np.array([255, 60, 60], np.uint8)  # colour of the box on the source


def write_edit(
    out: Location,
    edited: Edited,
    box: Box,
    settings: SamplerSettings,
    *,
    image: str,
    model: str,
    class_name: str,
    source_name: str | None,
    t_edit: float,
) -> Location:
    """Write source.png, mask.png, reconstruction.png, result-N.png and the page into `out`.

    Returns:
        The path of the page.
    """
    mask = np.repeat((edited.mask * 255).round().astype(np.uint8)[..., None], 3, axis=-1)
    make_directory(out)
    named = {"source": edited.source, "mask": mask, "reconstruction": edited.reconstruction}
    named |= {f"result-{number}": result for number, result in enumerate(edited.results)}
    for name, pixels in named.items():
        write_atomic(out / f"{name}.png", encode_png(pixels))
    kept = f"reconstruction, {edited.outside_of_reconstruction:.2f} dB"
    given = [
        picture(_framed(edited.source, box), "source"),
        picture(mask, "mask", lossless=True),
        picture(edited.reconstruction, kept),
    ]
    results = [
        picture(pixels, f"result {number}, {value:.2f} dB")
        for number, (pixels, value) in enumerate(zip(edited.results, edited.outside, strict=True))
    ]
    page = render(
        "edit_template.html",
        image=image,
        model=model,
        box=box,
        class_name=class_name,
        source_name=source_name,
        t_edit=t_edit,
        settings=settings,
        given=Grid("Given", "the box, the softened mask, and the image as the autoencoder keeps it", 3, given),
        results=Grid("Results", f"as {class_name}, each from noise of its own", min(4, len(results)), results),
        outside_of_reconstruction=edited.outside_of_reconstruction,
    )
    write_atomic(out / PAGE, page)
    return out / PAGE


def _framed(pixels: RGBArray, box: Box) -> RGBArray:
    """Return the image with the outline of the box."""
    x, y, width, height = box
    framed = pixels.copy()
    framed[[y, y + height - 1], x : x + width] = FRAME
    framed[y : y + height, [x, x + width - 1]] = FRAME
    return framed
