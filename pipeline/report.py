"""The page of an evaluation: report.json and its pictures as one self-contained HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation import EvaluationManifest, Measured, Report
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.manifests.model_manifests import AutoencoderManifest, DiffusionManifest
from svgpipe.manifests.selection import choose_evenly, evenly_spread
from svgpipe.stages.evaluate.decode_latents import decoded_images
from svgpipe.stages.evaluate.measure_images import RECONSTRUCTIONS
from svgpipe.stages.evaluate.neighbour_metrics import MIN_HELDOUT
from svgpipe.stages.evaluate.reference import MIN_IMAGES, RealSets, Reference
from svgpipe.stages.images.image_set import ImageSet

from .charts import Drawing, LineChart, curve
from .nearest_section import nearest_section
from .overview import overview_rows, overview_webp, sampler_of
from .page import Grid, lineage, picture, render, webp_url
from .synsets import shown_names

REPORT_PAGE, OVERVIEW = "report.html", "report-overview.webp"
MAX_COLUMNS = 10
ROWS = 4
LINEAR_UP_TO = 8  # decoded noise / best samples; above this ratio the chart is logarithmic
SIDE_BY_SIDE = 160  # maximum number of pictures in the grids of all settings


def render_report(evaluation: Location, autoencoder: Location, diffusion: Location, reference: Reference) -> Location:
    """Write `report.html` into a finished evaluation, its overview as WebP and its charts as PDF beside it.

    Returns:
        The page's path.
    """
    manifest = EvaluationManifest.read(evaluation)
    report = Report.read(evaluation)
    samples = [r for r in report.results if r.sampler is not None and r.sampler.repeat == 0]  # of the first seed
    best = min(samples, key=lambda r: r.frechet_distance.value)
    lines: dict[str, Measured] = {r.role: r for r in report.results if r.role != "samples"}
    sets = RealSets.of(reference, EvaluationSection.model_validate(manifest.config), report.image_size)
    distances, path = _distance_chart(samples, lines), evaluation / REPORT_PAGE
    chart = None if distances is None else distances.render()
    curves = _curves(autoencoder / "metrics.jsonl", ("heldout_psnr", "l1", "perceptual"), "autoencoder")
    curves += _curves(diffusion / "metrics.jsonl", ("loss", "heldout_loss"), "diffusion")
    overview = overview_webp(overview_rows(evaluation, report, best, sets))
    nearest = None
    if best.nearest is not None:
        real = ImageSet(sets.reference, report.image_size)
        nearest = nearest_section(best, decoded_images(evaluation, best.name), lines, real)
    page = render(
        "report_template.html",
        overview=webp_url(overview),
        report=report,
        samples=samples,
        best=best,
        lines=lines,
        chart=chart,
        nearest=nearest,
        min_heldout=MIN_HELDOUT,
        new_images="reconstructed held-out images" if "reconstructions" in lines else "the held-out images",
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
    write_atomic(path.with_name(OVERVIEW), overview)
    near = [] if nearest is None else [nearest.chart]
    for drawing in [*([] if chart is None else [chart]), *near, *curves]:
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
    names, size = shown_names(report.class_names), report.image_size
    real_names = None if reference.class_names is None else shown_names(reference.class_names)

    def by_class(images: ImageSet, rows: int) -> list[int]:
        labels = images.labels
        classes = np.unique(labels)
        if len(classes) == 1:  # for example a folder without class folders
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
        grids.append(grid("Real images", note, ImageSet(sets.reference, size), 2, real_names))
    if any(r.role == "reconstructions" for r in report.results):
        rebuilt = decoded_images(evaluation, RECONSTRUCTIONS)
        originals = ImageSet(sets.reconstructed, size)
        chosen = by_class(rebuilt, 1)
        captions = [_caption(originals, i, real_names) for i in chosen]
        pairs = [picture(originals.pixels(i), what) for i, what in zip(chosen, captions, strict=True)]
        pairs += [picture(rebuilt.pixels(i), "rebuilt") for i in chosen]
        kind = "held-out" if len(sets.heldout) >= MIN_IMAGES else "reference"
        note = f"first row: {kind} images; second row: encoded and decoded"
        grids.append(Grid("Reconstructions", note, len(chosen) or 1, pairs))
    rows = max(1, min(MAX_COLUMNS, SIDE_BY_SIDE // len(samples)))
    if len({sampler_of(r).steps for r in samples}) > 1:
        for guidance in dict.fromkeys(sampler_of(r).guidance for r in samples):
            of_one = [r for r in samples if sampler_of(r).guidance == guidance]
            title = f"Steps side by side, guidance {guidance:g}"
            grids.append(_side_by_side(evaluation, names, title, "steps", of_one, rows))
    elif len(samples) > 1:
        title = f"Guidance side by side, {sampler_of(best).named_steps}"
        grids.append(_side_by_side(evaluation, names, title, "guidance", samples, rows))
    settings = sampler_of(best)
    title = f"Samples, {settings.named_steps}"
    some = "" if settings.guidance_channels is None else f" of {settings.guidance_channels} channels"
    some += " by the auxiliary head" if settings.internal else ""
    note = f"guidance {settings.guidance:g}{some}, {settings.solver}; the setting with the smallest distance"
    grids.append(grid(title, note, decoded_images(evaluation, best.name), ROWS, names))
    return grids


def _caption(images: ImageSet, i: int, names: Sequence[str] | None) -> str:
    """Return the class name, if there are names."""
    return "image" if names is None else names[int(images.labels[i])]


def _side_by_side(
    evaluation: Location,
    names: Sequence[str],
    title: str,
    varied: Literal["steps", "guidance"],
    samples: Sequence[Measured],
    count: int,
) -> Grid:
    """Return the first sample of up to `count` classes, one row each, with one column per setting."""
    sets = [decoded_images(evaluation, r.name) for r in samples]
    labels = sets[0].labels
    drawn, first = np.unique(labels, return_index=True)
    rows = [int(first[c]) for c in evenly_spread(len(drawn), count)]
    values = [f"{getattr(sampler_of(r), varied):g}" for r in samples]
    pictures = [
        picture(images.pixels(row), f"{names[int(labels[row])]}, {value}")
        for row in rows
        for value, images in zip(values, sets, strict=True)
    ]
    note = f"each row starts from the same noise; columns: {varied} {', '.join(values)}"
    return Grid(title, note, len(values), pictures)


def _distance_chart(samples: Sequence[Measured], lines: dict[str, Measured]) -> LineChart | None:
    """Return the chart of distance against steps, one line per guidance scale; None for a single setting.

    With one number of steps: distance against guidance.
    """
    if len(samples) < 2:
        return None
    over_steps = len({sampler_of(r).steps for r in samples}) > 1

    def place(r: Measured) -> float:
        return sampler_of(r).steps if over_steps else sampler_of(r).guidance

    xs = sorted({place(r) for r in samples})
    series: dict[str, list[Estimate]] = {}
    for r in sorted(samples, key=place):
        distance, at = r.frechet_distance, sampler_of(r)
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
    """Return whether decoded noise is so far away that a linear axis would compress the samples."""
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
