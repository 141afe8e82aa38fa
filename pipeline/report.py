"""report.json and the pictures of an evaluation → one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from svgpipe.manifests.checkpoint import AutoencoderManifest, DiffusionManifest
from svgpipe.manifests.evaluation import EvaluationManifest, Measured, Report
from svgpipe.manifests.index import read_index, refs_of_table
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.storage import Location, children, write_atomic
from svgpipe.pipeline.page import Curve, Picture, curve, lineage, picture, render
from svgpipe.stages.comparison import RECONSTRUCTIONS
from svgpipe.stages.measure import ImageSet
from svgpipe.stages.selection import evenly_spread

REPORT_PAGE = "report.html"
MAX_COLUMNS = 10
ROWS = 4


@dataclass(frozen=True)
class Grid:
    """A titled grid of pictures."""

    title: str
    note: str
    columns: int
    pictures: list[Picture]


def render_report(evaluation: Location, autoencoder: Location, diffusion: Location, reference: ShardSet) -> Location:
    """Write `report.html` into a finished evaluation; returns its path. Nothing is measured here."""
    manifest = EvaluationManifest.read(evaluation)
    report = Report.read(evaluation)
    samples = [r for r in report.results if r.role == "samples"]
    page = render(
        "report_template.html",
        report=report,
        samples=samples,
        best=min(samples, key=lambda r: r.frechet_distance),
        lines={r.role: r for r in report.results if r.role != "samples"},
        largest=max(r.frechet_distance for r in report.results),
        grids=_grids(evaluation, report, samples, reference),
        curves=_curves(autoencoder / "metrics.jsonl", ("heldout_psnr", "l1", "perceptual"), "autoencoder")
        + _curves(diffusion / "metrics.jsonl", ("loss", "heldout_loss"), "diffusion"),
        lineage=lineage(manifest.as_input(evaluation), "evaluation"),
        autoencoder=AutoencoderManifest.read(autoencoder),
        diffusion=DiffusionManifest.read(diffusion),
        manifest=manifest,
    )
    path = evaluation / REPORT_PAGE
    write_atomic(path, page)
    return path


def _grids(evaluation: Location, report: Report, samples: Sequence[Measured], reference: ShardSet) -> list[Grid]:
    names, size = report.class_names, report.image_size
    columns = min(len(names), MAX_COLUMNS)
    classes = evenly_spread(len(names), columns)

    def by_class(images: ImageSet, rows: int) -> list[int]:
        labels = images.labels
        members = [column for c in classes if (column := np.flatnonzero(labels == c)[:rows].tolist())]
        full_rows = min((len(column) for column in members), default=0)
        return [column[row] for row in range(full_rows) for column in members]

    def grid(title: str, note: str, images: ImageSet, rows: int) -> Grid:
        chosen = by_class(images, rows)
        pictures = [picture(images.pixels(i), names[int(images.labels[i])]) for i in chosen]
        return Grid(title, note, len({int(images.labels[i]) for i in chosen}) or 1, pictures)

    train, heldout = reference.usable("train"), reference.usable("heldout")
    real = ImageSet(train, size)
    grids = [grid("Real images", "from the training split", real, 2)]
    rebuilt = _decoded(evaluation, RECONSTRUCTIONS, size)
    pool = heldout if len(heldout) >= 2 else train
    originals = ImageSet([pool[i] for i in evenly_spread(len(pool), len(rebuilt))], size)
    chosen = by_class(rebuilt, 1)
    pairs = [picture(originals.pixels(i), names[int(originals.labels[i])]) for i in chosen]
    pairs += [picture(rebuilt.pixels(i), "rebuilt") for i in chosen]
    kind = "held-out" if pool is heldout else "training"
    grids.append(Grid("Reconstructions", f"{kind} images above, encoded and decoded below", len(chosen) or 1, pairs))
    for result in samples:
        settings = result.sampler or {}
        title = f"Samples, {settings['steps']} step{'s' if settings['steps'] > 1 else ''}"
        note = f"guidance {settings['guidance']:g}, {settings['solver']}; the same noises in every grid"
        grids.append(grid(title, note, _decoded(evaluation, result.name, size), ROWS))
    return grids


def _decoded(evaluation: Location, name: str, size: int) -> ImageSet:
    """Images of one set, from its tars' own indexes."""
    folder = evaluation / "images" / name
    tars = [path for path in children(folder) if path.suffix == ".tar"]
    refs = [ref for tar in tars for ref in refs_of_table(read_index(tar.with_suffix(".parquet"), None), tar)]
    return ImageSet(refs, size)


def _curves(path: Location, names: Sequence[str], stage: str) -> list[Curve]:
    entries = read_metrics(path)
    curves = []
    for name in names:
        series = [(int(e["step"]), float(e[name])) for e in entries if name in e]
        if len(series) < 2:
            continue
        title = f"{stage}: {name.replace('_', ' ').replace('heldout', 'held-out')}"
        curves.append(curve(title, [step for step, _ in series], [value for _, value in series]))
    return curves
