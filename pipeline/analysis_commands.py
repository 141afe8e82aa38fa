"""Commands that look into features and models: what they tell apart, how straight their paths are, what they lose."""

from __future__ import annotations

from typing import Annotated

import typer

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.filesystem import location
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.reconstruction import ReconstructionReport
from svgpipe.manifests.shards import ShardSet

from .console import ConsoleProgress
from .options import (
    AddressOption,
    AutoencoderOption,
    CpusOption,
    GpusOption,
    HtmlOption,
    JsonOption,
    OutOption,
    RecipeOption,
    SetOption,
    ShardsOption,
    WorkersOption,
    page_at,
    resources_of,
)
from .tables import print_result

app = typer.Typer()


@app.command()
def probe(
    cache: Annotated[str, typer.Argument(help="Finished feature cache; nothing else is read.")],
    validation: Annotated[
        str | None, typer.Option("--validation", help="Cache of other images to test on, not the held-out rows.")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=2, help="At most so many training and test rows, evenly spread.")
    ] = None,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """How well the features tell classes apart: linear probe and k-NN of backbone, residual and both."""
    from svgpipe.stages.analyze.probe import probe as run_stage

    from .probe_page import render_probe, show_probe

    page = page_at(html)
    opened = FeatureCache(cache)
    tested = None if validation is None else FeatureCache(validation)
    with ConsoleProgress() as progress:
        result = run_stage(opened, tested, rows=rows, progress=progress)
    print_result(result, as_json, show_probe)
    if page is not None:
        render_probe(result, page)
        typer.echo(f"page: {html}", err=as_json)


@app.command()
def analyze(
    caches: Annotated[list[str], typer.Argument(help="Finished feature caches, to stand side by side.")],
    diffusion: Annotated[
        list[str] | None,
        typer.Option("--diffusion", help="Model of one of the caches: how straight its paths are; may be repeated."),
    ] = None,
    weights: Annotated[str, typer.Option("--ema", help="Of the models: ema-DECAY, ema or raw.")] = "ema",
    classes: Annotated[int, typer.Option("--classes", min=2, help="At most so many, evenly spread.")] = 10,
    per_class: Annotated[int, typer.Option("--per-class", min=2, help="At most so many images of each.")] = 64,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Of halves, noise, t-SNE, bootstrap.")] = 0,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Whether classes lie apart and pull noise apart, and how straight a model's sampling paths are."""
    from svgpipe.stages.analyze.analyze import analyze as run_stage

    from .analysis_page import render_analysis, show_analysis

    page = page_at(html)
    opened = [FeatureCache(cache) for cache in caches]
    with ConsoleProgress() as progress:
        result = run_stage(
            opened,
            [location(model) for model in diffusion or []],
            classes=classes,
            per_class=per_class,
            weights=weights,
            seed=seed,
            progress=progress,
        )
    print_result(result, as_json, show_analysis)
    if page is not None:
        render_analysis(result, page)
        typer.echo(f"page: {html}", err=as_json)


@app.command()
def eval_reconstruction(
    autoencoder: AutoencoderOption,
    shards: ShardsOption,
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    pool: Annotated[
        str | None, typer.Option("--pool", help="Where features are kept and found; default: beside --out.")
    ] = None,
    num_workers: WorkersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """What the autoencoder loses of held-out images, with its residual branch and without. Run again to resume."""
    from svgpipe.stages.evaluate.reconstruction import eval_reconstruction as run_stage

    from .cluster import runner_for
    from .reconstruction_page import render_reconstruction, show_reconstruction

    config = load_recipe(recipe, overrides or []).reconstruction
    opened, encoder, directory = ShardSet.open(shards), location(autoencoder), location(out)
    resources = resources_of(num_workers, cpus_per_worker, gpus_per_worker)
    with runner_for(resources, address) as runner, ConsoleProgress() as progress:
        run_stage(
            encoder,
            opened,
            directory,
            config,
            pool=None if pool is None else location(pool),
            runner=runner,
            progress=progress,
        )
    show_reconstruction(ReconstructionReport.read(directory))
    typer.echo(f"report: {render_reconstruction(directory, encoder, opened)}")
