"""study.html: the tables and charts of a study; and the same tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.manifests.paper import PAPER_MODELS, PAPER_ROWS
from svgpipe.manifests.study_results import Sampled, StudyResults, TokenizerResult, VariantResult

from .charts import Drawing, LineChart, curves
from .page import render, webp_url
from .report import OVERVIEW
from .study import EVALUATION, MODELS
from .tables import new_table, print_table, with_interval

PAGE = "study.html"
# A number is compared with the paper's only if it was measured like it.
PAPER_SAMPLES, PAPER_EPOCHS, PAPER_GUIDANCE = 50_000, 80, (1.0, 1.5, 1.55)
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """One number with its interval, and the paper's number for the same setting."""

    value: str
    interval: str = ""
    paper: str = ""


@dataclass(frozen=True)
class Row:
    """One variant and its cells."""

    variant: VariantResult
    cells: list[Cell]


@dataclass(frozen=True)
class StudyTable:
    """A table with one row per variant."""

    title: str
    note: str
    columns: list[str]
    rows: list[Row]


Columns = dict[str, Callable[[VariantResult], Cell]]
"""Heads of columns, and what they show of a variant."""


def render_study(results: StudyResults, workdir: Location) -> None:
    """Write study.html, and its charts as PDF."""
    drawings = _drawings(results)
    path = workdir / PAGE
    page = render(
        "study_template.html",
        results=results,
        tables=tables(results),
        drawings=drawings,
        pictures=_pictures(results, workdir),
        paper=PAPER_MODELS if any(variant.paper for variant in results.variants) else [],
        missing=[variant for variant in results.variants if variant.state != "finished"],
    )
    write_atomic(path, page)
    for drawing in drawings:
        drawing.save_beside(path)


def _pictures(results: StudyResults, workdir: Location) -> list[tuple[VariantResult, str]]:
    """Return the overview pictures of the variants that have samples, as data URLs."""
    places = [(v, workdir / MODELS / v.name / EVALUATION / OVERVIEW) for v in results.variants if v.samples]
    return [(variant, webp_url(place.read_bytes())) for variant, place in places if place.exists()]


def show_study(results: StudyResults) -> None:
    """Print the tables."""
    for table in tables(results):
        shown = new_table(table.title, "", *table.columns, right=table.columns)
        for row in table.rows:
            shown.add_row(row.variant.name, *(f"{cell.value}{_in_brackets(cell)}" for cell in row.cells))
        print_table(shown)
    for variant in results.variants:
        if variant.state != "finished":
            print_table(new_table(""), f"{variant.name}: {variant.state}. {variant.message or ''}")


def _in_brackets(cell: Cell) -> str:
    return "".join(f" ({text})" for text in (cell.interval, cell.paper and f"paper {cell.paper}") if text)


def tables(results: StudyResults) -> list[StudyTable]:
    """Return the tables of a study that hold a number."""
    made = [_overview(results), *_by_steps(results), _latents(results), _cost(results)]
    return [table for table in made if any(cell.value != NONE for row in table.rows for cell in row.cells)]


def _overview(results: StudyResults) -> StudyTable:
    """Return a table in the shape of the paper's Table 1: reconstruction, training, distances at the most steps."""
    metric = results.metric or "distance"
    note = f"{metric}, of reconstructions and of samples at the most steps, guided with the best scale; lower is better"
    columns: Columns = {
        "tokenizer": _of_tokenizer(lambda t: _text(t.kind)),
        "latent": _of_tokenizer(lambda t: _text("x".join(map(str, t.latent)))),
        "reconstruction": _of_tokenizer(lambda t: _estimate(t.reconstruction_distance, "%.2f")),
        "parameters": lambda v: _text(None if v.parameters is None else f"{v.parameters / 1e6:.3g} M"),
        "epochs": lambda v: _text(None if v.epochs is None else f"{v.epochs:.3g}"),
        "steps": lambda v: _number(_most_steps(v)),
        "no guidance": lambda v: _distance(results, v, _setting(v, _most_steps(v), 1.0)),
        "guided": lambda v: _distance(results, v, _best_guided(v)),
        "guidance scale": lambda v: _text(None if (best := _best_guided(v)) is None else f"{best.guidance:g}"),
    }
    return _table(results, "Reconstruction and generation", note, columns)


def _most_steps(variant: VariantResult) -> int | None:
    return max((s.steps for s in variant.samples), default=None)


def _best_guided(variant: VariantResult) -> Sampled | None:
    """Return the guided setting with the lowest distance, of those with the most steps."""
    guided = [s for s in variant.samples if s.steps == _most_steps(variant) and s.guidance != 1]
    return min(guided, key=lambda s: s.frechet_distance.value, default=None)


def _by_steps(results: StudyResults) -> list[StudyTable]:
    """Return tables in the shape of the paper's Table 2: distance by the number of steps, one per guidance."""
    found = []
    for guidance in sorted({s.guidance for variant in results.variants for s in variant.samples}):
        steps = sorted({s.steps for v in results.variants for s in v.samples if s.guidance == guidance})
        rows = [
            Row(v, [_distance(results, v, _setting(v, count, guidance)) for count in steps]) for v in results.variants
        ]
        title = "Steps, without guidance" if guidance == 1 else f"Steps, guidance {guidance:g}"
        note = f"{results.metric}, by the number of sampling steps; lower is better"
        found.append(StudyTable(title, note, [str(count) for count in steps], rows))
    return found


def _latents(results: StudyResults) -> StudyTable:
    note = (
        "velocity fields: difference between two classes, divided by that between two halves of one class; "
        "curvature of the sampling paths and error of a single step: 0 is straight"
    )
    columns: Columns = {
        "PSNR (dB)": _of_tokenizer(lambda t: _estimate(t.psnr, "%.2f")),
        "SSIM": _of_tokenizer(lambda t: _estimate(t.ssim, "%.3f")),
        "linear probe (%)": _of_tokenizer(lambda t: _estimate(t.linear_probe, "%.1f", 100)),
        "velocity fields": lambda v: _estimate(v.velocity_agreement, "%.2f"),
        "curvature": lambda v: _estimate(v.curvature, "%.3g"),
        "one-step error": lambda v: _estimate(v.one_step_error, "%.3f"),
    }
    return _table(results, "Latents and paths", note, columns)


def _cost(results: StudyResults) -> StudyTable:
    note = (
        "bytes of the cache per image and view; wall time of the run that finished each stage; images/s of the "
        "extraction (copied: without the vision model, whose features another variant had computed)"
    )
    columns: Columns = {
        "bytes per image": _of_tokenizer(lambda t: _number(t.bytes_per_image)),
        "tokenizer (min)": _of_tokenizer(lambda t: _minutes(t.training_seconds)),
        "extraction (min)": _of_tokenizer(lambda t: _minutes(t.extraction_seconds)),
        "images/s": _of_tokenizer(_extraction_rate),
        "training (min)": lambda v: _minutes(v.training_seconds),
        "samples/s": lambda v: _number(v.training_rate),
        "evaluation (min)": lambda v: _minutes(v.evaluation_seconds),
    }
    return _table(results, "Cost", note, columns)


def _of_tokenizer(cell: Callable[[TokenizerResult], Cell]) -> Callable[[VariantResult], Cell]:
    return lambda variant: Cell(NONE) if variant.tokenizer is None else cell(variant.tokenizer)


def _table(results: StudyResults, title: str, note: str, columns: Columns) -> StudyTable:
    rows = [Row(variant, [cell(variant) for cell in columns.values()]) for variant in results.variants]
    return StudyTable(title, note, list(columns), rows)


def _drawings(results: StudyResults) -> list[Drawing]:
    """Return the charts: distance against steps without guidance, and learning curves."""
    drawings = []
    steps = _common_steps(results)
    series = {
        v.title: [s.frechet_distance for count in steps if (s := _setting(v, count, 1.0)) is not None]
        for v in results.variants
    }
    series = {name: values for name, values in series.items() if values and len(values) == len(steps)}
    if series and len(steps) > 1:
        levels = {} if results.heldout_distance is None else {"held-out images": results.heldout_distance.value}
        measure = "FID" if results.metric == "FID" else "Fréchet distance"
        chart = LineChart("Distance against steps", "sampling steps", measure, steps, series, levels, logarithmic=True)
        drawings.append(chart.render())
    for title, attribute, y_name in (
        ("Held-out loss", "heldout_loss", "mean squared error"),
        ("Distance of latents", "latent_distance", "over that of real rows"),
    ):
        lines = {v.title: [(p.step, p.value) for p in getattr(v, attribute)] for v in results.variants}
        lines = {name: points for name, points in lines.items() if len(points) > 1}
        if lines:
            drawings.append(curves(title, lines, "training step", y_name))
    return drawings


def _common_steps(results: StudyResults) -> list[int]:
    """Return the numbers of steps that most variants were sampled with, without guidance."""
    sets = [sorted(s.steps for s in v.samples if s.guidance == 1) for v in results.variants]
    return max(filter(None, sets), key=lambda steps: (sets.count(steps), len(steps)), default=[])


def _setting(variant: VariantResult, steps: int | None, guidance: float) -> Sampled | None:
    return next((s for s in variant.samples if (s.steps, s.guidance) == (steps, guidance)), None)


def _distance(results: StudyResults, variant: VariantResult, sampled: Sampled | None) -> Cell:
    """Return a distance, beside the paper's where the setting is the paper's."""
    if sampled is None:
        return Cell(NONE)
    cell = _estimate(sampled.frechet_distance, "%.4g")
    if results.metric != "FID" or results.num_samples != PAPER_SAMPLES or variant.paper is None:
        return cell
    if variant.epochs is None or round(variant.epochs) != PAPER_EPOCHS or sampled.guidance not in PAPER_GUIDANCE:
        return cell
    names = (f"{sampled.steps} steps", f"{sampled.steps} steps, 80 epochs")
    row = next((r for r in PAPER_ROWS if r.setting in names and r.guided == (sampled.guidance != 1)), None)
    value = None if row is None else getattr(row, variant.paper)
    return cell if value is None else Cell(cell.value, cell.interval, f"{value:g}")


def _estimate(estimate: Estimate | None, form: str, factor: float = 1) -> Cell:
    if estimate is None:
        return Cell(NONE)
    scaled = Estimate(
        value=factor * estimate.value,
        low=None if estimate.low is None else factor * estimate.low,
        high=None if estimate.high is None else factor * estimate.high,
        num_images=estimate.num_images,
    )
    value, _, interval = with_interval(scaled, form).partition(" (")
    return Cell(value, interval.removesuffix(")"))


def _extraction_rate(tokenizer: TokenizerResult) -> Cell:
    return Cell(_number(tokenizer.extraction_rate).value, "copied" if tokenizer.vision_features_copied else "")


def _text(value: str | None) -> Cell:
    return Cell(NONE if value is None else value)


def _number(value: float | None) -> Cell:
    return _text(None if value is None else f"{value:,.0f}")


def _minutes(seconds: float | None) -> Cell:
    return _text(None if seconds is None else f"{seconds / 60:.1f}")
