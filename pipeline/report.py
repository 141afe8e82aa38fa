"""report.json and the pictures of an evaluation → one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from svgpipe.manifests.checkpoint import AutoencoderManifest, DiffusionManifest
from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation import EvaluationManifest, Measured, Report, SamplerInfo
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.manifests.recipe import EvaluationSection
from svgpipe.stages.evaluate.decode_latents import decoded_images
from svgpipe.stages.evaluate.measure_images import RECONSTRUCTIONS
from svgpipe.stages.evaluate.reference import MIN_IMAGES, RealSets, Reference
from svgpipe.stages.images.image_set import ImageSet
from svgpipe.stages.runtime.selection import choose_evenly, evenly_spread

from .charts import Drawing, LineChart, curve
from .page import Grid, lineage, picture, render

REPORT_PAGE = "report.html"
MAX_COLUMNS = 10
ROWS = 4
LINEAR_UP_TO = 8  # times the least distance of samples: beyond, the chart is logarithmic
SIDE_BY_SIDE = 160  # pictures of all settings together, where they leave a row at least


def render_report(evaluation: Location, autoencoder: Location, diffusion: Location, reference: Reference) -> Location:
    """Write `report.html`, and its charts as PDF beside it, into a finished evaluation; returns the page's path."""
    manifest = EvaluationManifest.read(evaluation)
    report = Report.read(evaluation)
    samples = [r for r in report.results if r.role == "samples"]
    best = min(samples, key=lambda r: r.frechet_distance.value)
    lines: dict[str, Measured] = {r.role: r for r in report.results if r.role != "samples"}
    sets = RealSets.of(reference, EvaluationSection.model_validate(manifest.config), report.image_size)
    distances, path = _distance_chart(samples, lines), evaluation / REPORT_PAGE
    chart = None if distances is None else distances.render()
    curves = _curves(autoencoder / "metrics.jsonl", ("heldout_psnr", "l1", "perceptual"), "autoencoder")
    curves += _curves(diffusion / "metrics.jsonl", ("loss", "heldout_loss"), "diffusion")
    page = render(
        "report_template.html",
        report=report,
        samples=samples,
        best=best,
        lines=lines,
        chart=chart,
        over_steps=distances is not None and distances.x_name == "steps",
        largest=max(r.frechet_distance.value for r in report.results),
        grids=_grids(evaluation, report, samples, best, reference, sets),
        curves=curves,
        lineage=lineage(manifest.as_input(evaluation), "evaluation"),
        autoencoder=AutoencoderManifest.read(autoencoder),
        diffusion=DiffusionManifest.read(diffusion),
        manifest=manifest,
    )
    write_atomic(path, page)
    for drawing in [*([] if chart is None else [chart]), *curves]:
        drawing.save_beside(path)
    return path


def _grids(
    evaluation: Location,
    report: Report,
    samples: Sequence[Measured],
    best: Measured,
    reference: Reference,
    sets: RealSets,
) -> list[Grid]:
    names, size = report.class_names, report.image_size

    def by_class(images: ImageSet, rows: int) -> list[int]:
        labels = images.labels
        classes = np.unique(labels)
        if len(classes) == 1:  # as of a folder without class folders
            return list(evenly_spread(len(labels), rows * MAX_COLUMNS))
        shown = choose_evenly(classes.tolist(), MAX_COLUMNS)
        members = [np.flatnonzero(labels == label)[:rows].tolist() for label in shown]
        full_rows = min((len(column) for column in members), default=0)
        return [column[row] for row in range(full_rows) for column in members]

    def grid(title: str, note: str, images: ImageSet, rows: int, of: Sequence[str] | None) -> Grid:
        chosen = by_class(images, rows)
        pictures = [picture(images.pixels(i), _caption(images, i, of)) for i in chosen]
        kinds = len({int(images.labels[i]) for i in chosen})
        return Grid(title, note, kinds if kinds > 1 else max(1, min(MAX_COLUMNS, len(chosen))), pictures)

    grids = []
    if sets.reference:
        note = "from the training split" if reference.kind == "shards" else f"from {reference.description}"
        grids.append(grid("Real images", note, ImageSet(sets.reference, size), 2, reference.class_names))
    if any(r.role == "reconstructions" for r in report.results):
        rebuilt = decoded_images(evaluation, RECONSTRUCTIONS)
        originals = ImageSet(sets.reconstructed, size)
        chosen = by_class(rebuilt, 1)
        captions = [_caption(originals, i, reference.class_names) for i in chosen]
        pairs = [picture(originals.pixels(i), what) for i, what in zip(chosen, captions, strict=True)]
        pairs += [picture(rebuilt.pixels(i), "rebuilt") for i in chosen]
        kind = "held-out" if len(sets.heldout) >= MIN_IMAGES else "reference"
        note = f"{kind} images above, encoded and decoded below"
        grids.append(Grid("Reconstructions", note, len(chosen) or 1, pairs))
    rows = max(1, min(MAX_COLUMNS, SIDE_BY_SIDE // len(samples)))
    if len({_sampler(r).steps for r in samples}) > 1:
        for guidance in dict.fromkeys(_sampler(r).guidance for r in samples):
            of_one = [r for r in samples if _sampler(r).guidance == guidance]
            title = f"Steps side by side, guidance {guidance:g}"
            grids.append(_side_by_side(evaluation, names, title, "steps", of_one, rows))
    elif len(samples) > 1:
        steps = _sampler(best).steps
        title = f"Guidance side by side, {steps} step{'s' if steps > 1 else ''}"
        grids.append(_side_by_side(evaluation, names, title, "guidance", samples, rows))
    settings = _sampler(best)
    title = f"Samples, {settings.steps} step{'s' if settings.steps > 1 else ''}"
    note = f"guidance {settings.guidance:g}, {settings.solver}; the setting of least distance"
    grids.append(grid(title, note, decoded_images(evaluation, best.name), ROWS, names))
    return grids


def _caption(images: ImageSet, i: int, names: Sequence[str] | None) -> str:
    """The class, where there are names."""
    return "image" if names is None else names[int(images.labels[i])]


def _side_by_side(
    evaluation: Location,
    names: Sequence[str],
    title: str,
    varied: Literal["steps", "guidance"],
    samples: Sequence[Measured],
    count: int,
) -> Grid:
    """The first sample of up to `count` classes in a row each, a column for each of the settings."""
    sets = [decoded_images(evaluation, r.name) for r in samples]
    labels = sets[0].labels
    drawn, first = np.unique(labels, return_index=True)
    rows = [int(first[c]) for c in evenly_spread(len(drawn), count)]
    values = [f"{getattr(_sampler(r), varied):g}" for r in samples]
    pictures = [
        picture(images.pixels(row), f"{names[int(labels[row])]}, {value}")
        for row in rows
        for value, images in zip(values, sets, strict=True)
    ]
    note = f"the same noise in every row; {varied} {', '.join(values)} from left to right"
    return Grid(title, note, len(values), pictures)


def _sampler(result: Measured) -> SamplerInfo:
    assert result.sampler is not None, "samples carry their settings"
    return result.sampler


def _distance_chart(samples: Sequence[Measured], lines: dict[str, Measured]) -> LineChart | None:
    """Distance against steps, a line for each guidance; against guidance, where there is one number of steps.

    None for a single setting.
    """
    if len(samples) < 2:
        return None
    over_steps = len({_sampler(r).steps for r in samples}) > 1

    def place(r: Measured) -> float:
        return _sampler(r).steps if over_steps else _sampler(r).guidance

    xs = sorted({place(r) for r in samples})
    series: dict[str, list[Estimate]] = {}
    for r in sorted(samples, key=place):
        distance, at = r.frechet_distance, _sampler(r)
        several = "s" if at.steps > 1 else ""
        name = f"guidance {at.guidance:g}" if over_steps else f"{at.steps} step{several}"
        series.setdefault(name, []).append(distance)
    words = {"heldout": "held-out real", "reconstructions": "reconstructions", "decoded-noise": "decoded noise"}
    levels = {words[role]: r.frechet_distance.value for role, r in lines.items()}
    across = "steps" if over_steps else "guidance"
    title = f"Distance against {across}"
    far = _far_apart(series, levels)
    return LineChart(title, across, "Fréchet distance", xs, series, levels, logarithmic=far)


def _far_apart(series: dict[str, list[Estimate]], levels: dict[str, float]) -> bool:
    """Whether the ceiling would press the samples into the bottom of a linear axis."""
    samples = [v.value for estimates in series.values() for v in estimates]
    return min(*samples, *levels.values()) > 0 and max(*samples, *levels.values()) > LINEAR_UP_TO * min(samples)


def _curves(path: Location, names: Sequence[str], stage: str) -> list[Drawing]:
    entries = read_metrics(path)
    curves = []
    for name in names:
        series = [(int(e["step"]), float(e[name])) for e in entries if name in e]
        if len(series) < 2:
            continue
        title = f"{stage}: {name.replace('_', ' ').replace('heldout', 'held-out')}"
        curves.append(curve(title, [step for step, _ in series], [value for _, value in series], "step"))
    return curves
