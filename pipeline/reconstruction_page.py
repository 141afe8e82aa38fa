"""The result of `svgpipe eval-reconstruction`, as a table and as a page."""

from __future__ import annotations

from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.reconstruction import Reconstructed, ReconstructionManifest, ReconstructionReport
from svgpipe.manifests.selection import choose_evenly, evenly_spread
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.evaluate.decode_latents import decoded_images
from svgpipe.stages.images.image_set import ImageSet

from .page import Grid, lineage, picture, render
from .synsets import shown_names
from .tables import new_table, print_table, with_interval

PAGE = "report.html"
COLUMNS = 8
MEASURES = (
    ("psnr", "PSNR", "%.2f", " dB", "higher is better"),
    ("ssim", "SSIM", "%.4f", "", "higher is better"),
    ("lpips", "LPIPS", "%.4f", "", "lower is better"),
    ("colour_difference", "colour difference", "%.2f", "", "CIEDE2000, lower is better"),
    ("frechet_distance", "Fréchet distance", "%.2f", "", "lower is better"),
    ("kernel_distance", "kernel distance", "%.3g", "", "lower is better"),
)


def show_reconstruction(report: ReconstructionReport) -> None:
    """Print the metrics, one column per set."""
    titles = [_title(result) for result in report.results]
    title = f"{report.num_images} held-out images at {report.image_size} pixels; {report.metric}"
    table = new_table(title, "", *titles, right=titles)
    for key, name, form, unit, _ in MEASURES:
        table.add_row(name, *(with_interval(getattr(result, key), form, unit) for result in report.results))
    print_table(table, *(f"not measured: {reason}" for reason in report.not_measured))


def render_reconstruction(evaluation: Location, autoencoder: Location, shards: ShardSet) -> Location:
    """Write `report.html` into a finished evaluation.

    Returns:
        Its path.
    """
    manifest, report = ReconstructionManifest.read(evaluation), ReconstructionReport.read(evaluation)
    page = render(
        "reconstruction_template.html",
        manifest=manifest,
        report=report,
        measures=[
            (name, what, [with_interval(getattr(result, key), form, unit) for result in report.results])
            for key, name, form, unit, what in MEASURES
        ],
        titles=[_title(result) for result in report.results],
        grid=_grid(evaluation, report, shards),
        autoencoder=AutoencoderManifest.read(autoencoder),
        lineage=lineage(manifest.as_input(evaluation), "reconstructions"),
    )
    path = evaluation / PAGE
    write_atomic(path, page)
    return path


def _grid(evaluation: Location, report: ReconstructionReport, shards: ShardSet) -> Grid:
    """Return a grid with originals in the first row, and one row per set: eight images of different classes."""
    heldout = shards.usable("heldout")
    originals = ImageSet(choose_evenly(heldout, report.num_images), report.image_size)
    labels, names = originals.labels, shown_names(shards.manifest.class_names)
    chosen = _spread_over_classes(labels, COLUMNS)
    pictures = [picture(originals.pixels(i), names[int(labels[i])]) for i in chosen]
    for result in report.results:
        images = decoded_images(evaluation, result.name)
        pictures += [picture(images.pixels(i), _title(result)) for i in chosen]
    rows = ", ".join(["originals", *(_title(result) for result in report.results)])
    return Grid("Images", f"from top to bottom: {rows}", len(chosen), pictures)


def _spread_over_classes(labels: NDArray[np.int64], count: int) -> list[int]:
    """Return at most `count` places of (n,) labels, from evenly spread classes; several per class if there are few."""
    classes = np.unique(labels)
    looked = [np.flatnonzero(labels == classes[c]).tolist() for c in evenly_spread(len(classes), count)]
    in_turn = [place for row in zip_longest(*looked) for place in row if place is not None]
    return sorted(in_turn[:count], key=lambda place: (labels[place], place))


def _title(result: Reconstructed) -> str:
    if result.noise is not None:
        return f"noise {result.noise:g}"
    return {True: "residual on", False: "residual off", None: "reconstruction"}[result.residual]
