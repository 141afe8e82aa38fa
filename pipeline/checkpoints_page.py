"""The result of `svgpipe evaluate-checkpoints`, as a table and as a page."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from svgpipe.manifests.checkpoint_curve import CheckpointCurve, Reached
from svgpipe.manifests.filesystem import Location, children, write_atomic
from svgpipe.manifests.paper import PAPER_MODELS
from svgpipe.stages.evaluate.checkpoints import SAMPLES

from .charts import curves
from .page import Picture, picture, render
from .tables import new_table, print_table, with_interval

PAGE_NAME = "checkpoints.html"
PAPER_SIZE = 256  # pixels; at others, the paper's points are not drawn
MAX_ROWS = 20
STRIP_WIDTH = 1280  # pixels; strips of large samples would make a page too large for mail


def show_checkpoints(curve: CheckpointCurve) -> None:
    """Print the distance of every checkpoint, and the epochs to the distances that were asked for."""
    names = ("epochs", "distance")
    table = new_table(f"{curve.metric}, {curve.sampler}, without guidance", "step", *names, right=names)
    for point in curve.points:
        table.add_row(str(point.step), f"{point.epochs:.3g}", with_interval(point.frechet_distance, "%.4g"))
    print_table(table, *(f"epochs to {line}" for line in _reached(curve)))


def _reached(curve: CheckpointCurve) -> list[str]:
    def told(one: Reached) -> str:
        if one.epochs is None:
            return "not reached"
        first = one.step == curve.points[0].step  # there is no earlier checkpoint to interpolate from
        return f"{'at most ' if first else ''}{one.epochs:.3g} (step {one.step})"

    return [f"{one.distance:g}: {told(one)}" for one in curve.reached]


def render_checkpoints(curve: CheckpointCurve, out: Location) -> Location:
    """Write the page into the directory of the curve, and its chart as PDF beside it.

    Returns:
        The page's path.
    """
    path, comparable = out / PAGE_NAME, curve.metric == "FID" and curve.image_size == PAPER_SIZE
    lines = {"samples": [(point.epochs, point.frechet_distance.value) for point in curve.points]}
    paper: dict[str, list[tuple[float, float]]] = {}
    for row in PAPER_MODELS if comparable else ():
        paper.setdefault(f"paper: {row.model}", []).append((row.epochs, row.plain))
    levels = {} if curve.heldout is None else {"held-out real": curve.heldout.value}
    chart = curves("Distance over the training", lines, "epochs", "Fréchet distance", marked=paper, levels=levels)
    page = render(
        "checkpoints_template.html",
        curve=curve,
        chart=chart,
        paper=PAPER_MODELS,
        comparable=comparable,
        rows=_rows(curve, out),
        reached=_reached(curve),
    )
    write_atomic(path, page)
    chart.save_beside(path)
    return path


def _rows(curve: CheckpointCurve, out: Location) -> list[Picture]:
    """Return the samples of the checkpoints of the curve, at most MAX_ROWS, as one picture each."""
    written = {path.stem: path for path in children(out / SAMPLES)}
    chosen = [point for point in curve.points if f"step-{point.step:08d}" in written]
    step = max(1, -(-len(chosen) // MAX_ROWS))
    pictures = []
    for point in chosen[::-1][::step][::-1]:
        with Image.open(io.BytesIO(written[f"step-{point.step:08d}"].read_bytes())) as strip:
            pixels = np.asarray(strip.convert("RGB"))
        caption = f"step {point.step}, {point.epochs:.3g} epochs: {point.frechet_distance.value:.4g}"
        pictures.append(picture(pixels, caption, largest=STRIP_WIDTH))
    return pictures
