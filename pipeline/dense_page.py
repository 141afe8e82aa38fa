"""The result of `svgpipe probe --maps`, as tables and as a page."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.errors import SvgpipeError
from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.manifests.label_maps import DEPTH
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.analyze.dense_fit import IGNORED
from svgpipe.stages.analyze.dense_probe import DenseProbe, DenseProbes, DenseScores, Example
from svgpipe.stages.images.decode import RGBArray
from svgpipe.stages.images.image_set import ImageSet

from .page import Grid, picture, render
from .tables import new_table, print_table, with_interval

GOLDEN_ANGLE = 0.618034
SHOWN = 128  # minimum number of pixels per side of a map on the page
UNKNOWN_GREY = 200


class _Column(NamedTuple):
    name: str
    field: str
    form: str
    factor: float = 1.0


COLUMNS = {
    "segmentation": [_Column("mean IoU, %", "mean_iou", "%.1f", 100), _Column("accuracy, %", "accuracy", "%.1f", 100)],
    "depth": [
        _Column("RMSE, m", "rmse", "%.3f"),
        _Column("A.Rel", "relative_error", "%.3f"),
        _Column("δ1, %", "within_quarter", "%.1f", 100),
    ],
}


def show_dense_probes(result: DenseProbes) -> None:
    """Print a table per task, with intervals."""
    for probe in result.probes:
        typer.echo(
            f"{probe.task}: {probe.training_images} training images, {probe.test_images} test images "
            f"({probe.tested_on}); {probe.head} head, {probe.steps} steps, {probe.size}x{probe.size} labels per image"
        )
        columns = COLUMNS[probe.task]
        names = ("number", *(column.name for column in columns))
        bootstrap = any(getattr(probe.constant, column.field).low is not None for column in columns)
        title = "95 % bootstrap intervals over the test images" if bootstrap else "without intervals"
        table = new_table(title, "channels", *names, right=names)
        for scores in [probe.constant, *probe.groups]:
            table.add_row(_name(probe, scores), str(scores.channels or ""), *_cells(scores, columns))
        for paper in probe.paper:
            value = f"{paper.mean_iou:.2f}" if probe.task == "segmentation" else f"{paper.rmse:.3f}"
            table.add_row(
                f"paper, {'ADE20K' if probe.task == 'segmentation' else 'NYUv2'}: {paper.features}",
                "",
                value,
                *[""] * (len(columns) - 1),
            )
        print_table(table)


def _name(probe: DenseProbe, scores: DenseScores) -> str:
    if scores is not probe.constant:
        return scores.group
    return "most frequent class" if probe.task == "segmentation" else "mean depth"


def _cells(scores: DenseScores, columns: Sequence[_Column]) -> list[str]:
    return [with_interval(_scaled(getattr(scores, c.field), c.factor), c.form) for c in columns]


def _scaled(value: Estimate, factor: float) -> Estimate:
    low, high = (None if end is None else factor * end for end in (value.low, value.high))
    return Estimate(value=factor * value.value, low=low, high=high, num_images=value.num_images)


def render_dense_probes(result: DenseProbes, examples: Sequence[Example], out: Location) -> None:
    """Write a self-contained page, with the label maps of some test images and what the heads predict."""
    parts = [
        {
            "probe": probe,
            "columns": [column.name for column in COLUMNS[probe.task]],
            "lines": [(_name(probe, s), s.channels, _values(s, probe.task)) for s in [probe.constant, *probe.groups]],
            "grid": _grid(probe, [one for one in examples if one.task == probe.task]),
            "swatches": [(name, _css(colour)) for name, colour in _colours(list(probe.class_iou)).items()],
        }
        for probe in result.probes
    ]
    write_atomic(out, render("dense_template.html", parts=parts))


def _values(scores: DenseScores, task: str) -> list[tuple[str, str]]:
    """Return value and interval of every column."""
    cells = []
    for column in COLUMNS[task]:
        scaled = _scaled(getattr(scores, column.field), column.factor)
        ends = [column.form % end for end in (scaled.low, scaled.high) if end is not None]
        cells.append((column.form % scaled.value, " – ".join(ends)))
    return cells


def _grid(probe: DenseProbe, examples: Sequence[Example]) -> Grid:
    pictures = []
    sources = [_source(example) for example in examples]
    shown = all(source is not None for source in sources)
    for example, source in zip(examples, sources, strict=True):
        if shown and source is not None:
            pictures.append(picture(source, f"image of row {example.row}"))
        limits = _limits(example) if probe.task == DEPTH else (0.0, 1.0)
        for caption, labels in (("label map", example.true), ("predicted", example.predicted)):
            pictures.append(picture(_drawn(probe, labels, limits), f"{caption} of row {example.row}", lossless=True))
    note = "Test images." if shown else "Test images; the shard set is not there, so the images are not shown."
    if probe.task == DEPTH:
        note += " Dark is near. Each image has its own scale. Unknown depths are grey."
    return Grid(f"{probe.task.capitalize()}: label maps and predictions", note, 3 if shown else 2, pictures)


def _source(example: Example) -> RGBArray | None:
    """Return the image, (S,S,3); None if the shard set or the image is gone."""
    cache: FeatureCache = example.cache
    try:
        refs = ShardSet.of_input(cache.manifest.input("shards"), cache.path).refs([example.row])
        return ImageSet(refs, max(SHOWN, example.true.shape[0])).pixels(0)
    except (SvgpipeError, OSError):
        return None


def _limits(example: Example) -> tuple[float, float]:
    both = np.concatenate([example.true.ravel(), example.predicted.ravel()]).astype(np.float64)
    return float(np.nanmin(both)), float(np.nanmax(both))


def _drawn(probe: DenseProbe, labels: NDArray[np.generic], limits: tuple[float, float]) -> RGBArray:
    """Return a label map as a picture of at least SHOWN pixels per side."""
    if probe.task == DEPTH:
        from matplotlib import colormaps

        low, high = limits
        metres = labels.astype(np.float64)
        pixels = (colormaps["viridis"](np.nan_to_num((metres - low) / max(high - low, 1e-9)))[..., :3] * 255).astype(
            np.uint8
        )
        pixels[~np.isfinite(metres)] = UNKNOWN_GREY
    else:
        palette = np.asarray([*_colours(list(probe.class_iou)).values(), (UNKNOWN_GREY,) * 3], np.uint8)
        pixels = palette[labels.astype(np.int64)]  # IGNORED, -1, is the last
    times = -(-SHOWN // len(labels))
    enlarged: RGBArray = np.repeat(np.repeat(pixels, times, axis=0), times, axis=1)
    return enlarged


def _colours(names: Sequence[str]) -> dict[str, tuple[int, int, int]]:
    """Return a colour per class; neighbouring numbers differ in hue and lightness."""
    assert IGNORED == -1
    found = {}
    for number, name in enumerate(names):
        red, green, blue = colorsys.hls_to_rgb(number * GOLDEN_ANGLE % 1, (0.35, 0.55, 0.7)[number % 3], 0.65)
        found[name] = (round(255 * red), round(255 * green), round(255 * blue))
    return found


def _css(colour: tuple[int, int, int]) -> str:
    red, green, blue = colour
    return f"#{red:02x}{green:02x}{blue:02x}"
