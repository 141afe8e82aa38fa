"""report.json and the pictures of an evaluation → one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

import jinja2
import numpy as np
from PIL import Image

from svgpipe.manifests.checkpoint import AutoencoderManifest, DiffusionManifest
from svgpipe.manifests.evaluation import EvaluationManifest, Measured, Report
from svgpipe.manifests.index import read_index, refs_of_table
from svgpipe.manifests.manifest import InputRef
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.storage import Location, children, write_atomic
from svgpipe.stages.comparison import RECONSTRUCTIONS
from svgpipe.stages.images import RGBArray
from svgpipe.stages.measure import ImageSet
from svgpipe.stages.selection import evenly_spread
from svgpipe.stages.training import read_metrics

REPORT_PAGE = "report.html"
MAX_COLUMNS = 10
ROWS = 4


@dataclass(frozen=True)
class Picture:
    """One image of a grid."""

    data: str
    caption: str


@dataclass(frozen=True)
class Grid:
    """A titled grid of pictures."""

    title: str
    note: str
    columns: int
    pictures: list[Picture]


@dataclass(frozen=True)
class Curve:
    """A line chart as SVG points, with the ends of its axes."""

    title: str
    points: str
    first_step: int
    last_step: int
    low: float
    high: float
    last: float


def render_report(evaluation: Location, autoencoder: Location, diffusion: Location, reference: ShardSet) -> Location:
    """Write `report.html` into a finished evaluation; returns its path. Nothing is measured here."""
    manifest = EvaluationManifest.read(evaluation)
    report = Report.read(evaluation)
    folder = resources.files("svgpipe.pipeline")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(folder.joinpath("report_template.html").read_text())
    samples = [r for r in report.results if r.role == "samples"]
    page = template.render(
        report=report,
        samples=samples,
        best=min(samples, key=lambda r: r.frechet_distance),
        lines={r.role: r for r in report.results if r.role != "samples"},
        largest=max(r.frechet_distance for r in report.results),
        grids=_grids(evaluation, report, samples, reference),
        curves=_curves(autoencoder / "metrics.jsonl", ("heldout_psnr", "l1", "perceptual"), "autoencoder")
        + _curves(diffusion / "metrics.jsonl", ("loss", "heldout_loss"), "diffusion"),
        lineage=_lineage(manifest.as_input(evaluation)),
        autoencoder=AutoencoderManifest.read(autoencoder),
        diffusion=DiffusionManifest.read(diffusion),
        manifest=manifest,
    )
    path = evaluation / REPORT_PAGE
    write_atomic(path, page.encode())
    return path


def _picture(pixels: RGBArray, caption: str) -> Picture:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "WEBP", quality=92)
    return Picture("data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode(), caption)


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
        pictures = [_picture(images.pixels(i), names[int(images.labels[i])]) for i in chosen]
        return Grid(title, note, len({int(images.labels[i]) for i in chosen}) or 1, pictures)

    train, heldout = reference.usable("train"), reference.usable("heldout")
    real = ImageSet(train, size)
    grids = [grid("Real images", "from the training split", real, 2)]
    rebuilt = _decoded(evaluation, RECONSTRUCTIONS, size)
    pool = heldout if len(heldout) >= 2 else train
    originals = ImageSet([pool[i] for i in evenly_spread(len(pool), len(rebuilt))], size)
    chosen = by_class(rebuilt, 1)
    pairs = [_picture(originals.pixels(i), names[int(originals.labels[i])]) for i in chosen]
    pairs += [_picture(rebuilt.pixels(i), "rebuilt") for i in chosen]
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


WIDTH, HEIGHT = 300, 110


def _curves(path: Location, names: Sequence[str], stage: str) -> list[Curve]:
    entries = read_metrics(path)
    curves = []
    for name in names:
        series = [(int(e["step"]), float(e[name])) for e in entries if name in e]
        if len(series) < 2:
            continue
        steps, values = zip(*series, strict=True)
        low, high = min(values), max(values)
        span, length = (high - low) or 1.0, (steps[-1] - steps[0]) or 1
        points = " ".join(
            f"{(s - steps[0]) / length * WIDTH:.1f},{HEIGHT - (v - low) / span * HEIGHT:.1f}" for s, v in series
        )
        title = f"{stage}: {name.replace('_', ' ').replace('heldout', 'held-out')}"
        curves.append(Curve(title, points, steps[0], steps[-1], low, high, values[-1]))
    return curves


def _lineage(ref: InputRef, depth: int = 0, name: str = "evaluation") -> list[tuple[int, str, InputRef]]:
    """This artifact and everything it was made from, depth first."""
    lines = [(depth, name, ref)]
    for child_name, child in ref.inputs.items():
        lines += _lineage(child, depth + 1, child_name)
    return lines
