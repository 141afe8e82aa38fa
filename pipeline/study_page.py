"""study.html: the tables and charts of a study; and the same tables on the terminal."""

from __future__ import annotations

from dataclasses import dataclass

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.manifests.paper import PAPER_MODELS, PAPER_ROWS
from svgpipe.manifests.study_results import Sampled, StudyResults, VariantResult

from .charts import Drawing, LineChart, curves
from .page import render
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
    """One variant: its name, a note, and its cells."""

    variant: VariantResult
    cells: list[Cell]


@dataclass(frozen=True)
class StudyTable:
    """A table with one row per variant."""

    title: str
    note: str
    columns: list[str]
    rows: list[Row]


def render_study(results: StudyResults, workdir: Location) -> Location:
    """Write study.html, and its charts as PDF.

    Returns:
        Path of the page.
    """
    drawings = _drawings(results)
    path = workdir / PAGE
    page = render(
        "study_template.html",
        results=results,
        tables=tables(results),
        drawings=drawings,
        paper=PAPER_MODELS if any(variant.paper for variant in results.variants) else [],
        missing=[variant for variant in results.variants if variant.state != "finished"],
    )
    write_atomic(path, page)
    for drawing in drawings:
        drawing.save_beside(path)
    return path


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
    rows = []
    for variant in results.variants:
        tokenizer, most = variant.tokenizer, max((s.steps for s in variant.samples), default=0)
        plain = [s for s in variant.samples if s.steps == most and s.guidance == 1]
        guided = [s for s in variant.samples if s.steps == most and s.guidance != 1]
        best = min(guided, key=lambda s: s.frechet_distance.value, default=None)
        rows.append(
            Row(
                variant,
                [
                    _text(None if tokenizer is None else tokenizer.kind),
                    _text(None if tokenizer is None else "x".join(map(str, tokenizer.latent))),
                    _estimate(None if tokenizer is None else tokenizer.reconstruction_distance, "%.2f"),
                    _text(None if variant.parameters is None else f"{variant.parameters / 1e6:.3g} M"),
                    _text(None if variant.epochs is None else f"{variant.epochs:.3g}"),
                    _text(None if not most else str(most)),
                    _distance(results, variant, plain[0] if plain else None),
                    _distance(results, variant, best),
                    _text(None if best is None else f"{best.guidance:g}"),
                ],
            )
        )
    columns = ["tokenizer", "latent", "reconstruction", "parameters", "epochs", "steps"]
    columns += ["no guidance", "guided", "guidance scale"]
    metric = results.metric or "distance"
    note = f"{metric}, of reconstructions and of samples at the most steps, guided with the best scale; lower is better"
    return StudyTable("Reconstruction and generation", note, columns, rows)


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
    rows = []
    for variant in results.variants:
        tokenizer = variant.tokenizer
        rows.append(
            Row(
                variant,
                [
                    _estimate(None if tokenizer is None else tokenizer.psnr, "%.2f"),
                    _estimate(None if tokenizer is None else tokenizer.ssim, "%.3f"),
                    _estimate(None if tokenizer is None else tokenizer.linear_probe, "%.1f", 100),
                    _estimate(variant.velocity_agreement, "%.2f"),
                    _estimate(variant.curvature, "%.3g"),
                    _estimate(variant.one_step_error, "%.3f"),
                ],
            )
        )
    columns = ["PSNR (dB)", "SSIM", "linear probe (%)", "velocity fields", "curvature", "one-step error"]
    note = (
        "velocity fields: difference between two classes, divided by that between two halves of one class; "
        "curvature of the sampling paths and error of a single step: 0 is straight"
    )
    return StudyTable("Latents and paths", note, columns, rows)


def _cost(results: StudyResults) -> StudyTable:
    rows = []
    for variant in results.variants:
        tokenizer = variant.tokenizer
        rows.append(
            Row(
                variant,
                [
                    _text(None if tokenizer is None else f"{tokenizer.bytes_per_image:,.0f}"),
                    _text(None if tokenizer is None else _minutes(tokenizer.training_seconds)),
                    _text(None if tokenizer is None else _minutes(tokenizer.extraction_seconds)),
                    _text(
                        None
                        if tokenizer is None or tokenizer.extraction_rate is None
                        else f"{tokenizer.extraction_rate:,.0f}"
                    ),
                    _text(None if variant.training_seconds is None else _minutes(variant.training_seconds)),
                    _text(None if variant.training_rate is None else f"{variant.training_rate:,.0f}"),
                    _text(None if variant.evaluation_seconds is None else _minutes(variant.evaluation_seconds)),
                ],
            )
        )
    columns = [
        *("bytes per image", "tokenizer (min)", "extraction (min)", "images/s"),
        *("training (min)", "samples/s", "evaluation (min)"),
    ]
    note = "bytes of the cache per image and view; wall time of the run that finished each stage"
    return StudyTable("Cost", note, columns, rows)


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


def _setting(variant: VariantResult, steps: int, guidance: float) -> Sampled | None:
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


def _text(value: str | None) -> Cell:
    return Cell(NONE if value is None else value)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f}"
