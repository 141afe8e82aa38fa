"""Commands that analyse features and models."""

from __future__ import annotations

from typing import Annotated

import typer

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.dense_section import DenseProbeSection
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location, location
from svgpipe.manifests.label_maps import LabelMaps
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.reconstruction import ReconstructionReport
from svgpipe.manifests.shards import ShardSet

from .console import ConsoleProgress
from .options import (
    ANALYSE,
    AddressOption,
    AutoencoderOption,
    CpusOption,
    EmaOption,
    GpusOption,
    HtmlOption,
    JsonOption,
    OutOption,
    PoolOption,
    ProcessesOption,
    ProtocolOption,
    RecipeOption,
    ReferenceOption,
    RequiredRecipeOption,
    SetOption,
    ShardsOption,
    WorkersOption,
    overrides_with,
    page_at,
    positive_numbers,
    resources_of,
)
from .tables import print_result

app = typer.Typer()


@app.command(rich_help_panel=ANALYSE)
def probe(
    cache: Annotated[str, typer.Argument(help="Finished feature cache. No images are read.")],
    validation: Annotated[
        str | None,
        typer.Option("--validation", metavar="DIR", help="Cache of test images. Default: the held-out rows."),
    ] = None,
    rows: Annotated[
        int | None,
        typer.Option("--rows", metavar="N", min=2, help="Maximum number of training and of test rows, evenly spread."),
    ] = None,
    maps: Annotated[
        str | None,
        typer.Option(
            "--maps", metavar="DIR", help="Label maps of the same shards: probe segmentation and depth per grid cell."
        ),
    ] = None,
    validation_maps: Annotated[
        str | None, typer.Option("--validation-maps", metavar="DIR", help="Label maps of the images of --validation.")
    ] = None,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Classify the cached features: linear probe and k-NN on backbone, residual and both; or predict label maps."""  # noqa: DOC501
    from svgpipe.stages.analyze.probe import probe as run_stage

    from .probe_page import render_probe, show_probe

    if maps is None and (recipe or overrides):
        raise UsageError("--recipe and --set change only dense probes; expected also --maps.")
    page = page_at(html)
    opened = FeatureCache(cache)
    tested = None if validation is None else FeatureCache(validation)
    if maps is not None or validation_maps is not None:
        config = load_recipe(recipe, overrides or []).dense_probe
        _probe_maps(opened, tested, _label_maps(maps, validation_maps), config, rows, page, as_json)
        return
    with ConsoleProgress() as progress:
        result = run_stage(opened, tested, rows=rows, progress=progress)
    print_result(result, as_json, show_probe)
    if page is not None:
        render_probe(result, page)
        typer.echo(f"page: {html}", err=as_json)


def _label_maps(maps: str | None, validation_maps: str | None) -> tuple[LabelMaps, LabelMaps | None]:
    if maps is None:
        raise UsageError("--validation-maps: expected also --maps, the label maps of the training images.")
    return LabelMaps(maps), None if validation_maps is None else LabelMaps(validation_maps)


def _probe_maps(
    cache: FeatureCache,
    validation: FeatureCache | None,
    maps: tuple[LabelMaps, LabelMaps | None],
    config: DenseProbeSection,
    rows: int | None,
    page: Location | None,
    as_json: bool,
) -> None:
    from svgpipe.stages.analyze.dense_probe import dense_probe

    from .dense_page import render_dense_probes, show_dense_probes

    with ConsoleProgress() as progress:
        result, examples = dense_probe(
            cache, maps[0], config, validation=validation, validation_maps=maps[1], rows=rows, progress=progress
        )
    print_result(result, as_json, show_dense_probes)
    if page is not None:
        render_dense_probes(result, examples, page)
        typer.echo(f"page: {page}", err=as_json)


@app.command("extract-maps", rich_help_panel=ANALYSE)
def extract_maps(
    shards: ShardsOption,
    out: OutOption,
    recipe: RequiredRecipeOption,
    overrides: SetOption = None,
    workers: ProcessesOption = None,
) -> None:
    """Read the masks (KEY.seg.png) and depth maps (KEY.depth.npy) beside the images, for `probe --maps`."""
    from svgpipe.stages.label_maps.extract_maps import extract_maps as run_stage

    config = load_recipe(recipe, overrides or []).maps
    with ConsoleProgress() as progress:
        manifest = run_stage(ShardSet.open(shards), location(out), config, processes=workers, progress=progress)
    typer.echo(
        f"{out}: {manifest.num_samples} rows of {manifest.size}x{manifest.size} labels: {manifest.num_segmentation} "
        f"masks, {manifest.num_depth} depth maps, {manifest.num_rejected} rejected maps"
    )


@app.command(rich_help_panel=ANALYSE)
def analyze(
    caches: Annotated[list[str], typer.Argument(help="Finished feature caches to compare.")],
    diffusion: Annotated[
        list[str] | None,
        typer.Option(
            "--diffusion", metavar="DIR", help="Model trained on one of the caches, for path straightness. Repeatable."
        ),
    ] = None,
    ema: EmaOption = None,
    classes: Annotated[
        int, typer.Option("--classes", metavar="N", min=2, help="Maximum number of classes, evenly spread.")
    ] = 10,
    per_class: Annotated[
        int, typer.Option("--per-class", metavar="N", min=2, help="Maximum number of images per class.")
    ] = 64,
    velocities: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--velocities", metavar="A B", help="Two classes, by name or number: velocities from noise to their images."
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Seed of splits, noise, t-SNE and bootstrap."),
    ] = 0,
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Measure class distances, agreement of velocity fields, and straightness of sampling paths."""
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
            velocities=velocities,
            weights=ema or "ema",
            seed=seed,
            progress=progress,
        )
    print_result(result, as_json, show_analysis)
    if page is not None:
        render_analysis(result, page)
        typer.echo(f"page: {html}", err=as_json)


@app.command(rich_help_panel=ANALYSE)
def eval_reconstruction(
    autoencoder: AutoencoderOption,
    shards: ShardsOption,
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    pool: PoolOption = None,
    workers: WorkersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Measure the reconstruction of held-out images, with and without the residual branch."""
    from svgpipe.stages.evaluate.reconstruction import eval_reconstruction as run_stage

    from .cluster import runner_for
    from .reconstruction_page import render_reconstruction, show_reconstruction

    config = load_recipe(recipe, overrides or []).reconstruction
    opened, encoder, directory = ShardSet.open(shards), location(autoencoder), location(out)
    resources = resources_of(workers, cpus_per_worker, gpus_per_worker)
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


@app.command(rich_help_panel=ANALYSE)
def evaluate_checkpoints(
    diffusion: Annotated[str, typer.Argument(help="Directory of a training, finished or not.")],
    cache: Annotated[str, typer.Option("--cache", metavar="DIR", help="Feature cache of the training.")],
    autoencoder: AutoencoderOption,
    reference: ReferenceOption,
    out: OutOption,
    recipe: RequiredRecipeOption,
    overrides: SetOption = None,
    steps: Annotated[
        int | None, typer.Option("--steps", metavar="N", min=1, help="Sampling steps. Default: the recipe's largest.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--to", metavar="D,D,…", help="Say how many epochs it takes to these distances.")
    ] = None,
    protocol: ProtocolOption = None,
    ema: EmaOption = None,
    pool: PoolOption = None,
    workers: WorkersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Measure the samples of all checkpoints of a training, without guidance."""
    from svgpipe.stages.evaluate.checkpoints import evaluate_checkpoints as run_stage
    from svgpipe.stages.evaluate.reference import open_reference

    from .checkpoints_page import render_checkpoints, show_checkpoints
    from .cluster import runner_for

    number = None if steps is None else str(steps)
    config = load_recipe(recipe, overrides_with(overrides, protocol=protocol, steps=number, ema=ema)).evaluation
    distances = [] if to is None else positive_numbers(to, "--to")
    directory = location(out)
    shared = directory.parent if pool is None else location(pool)
    resources = resources_of(workers, cpus_per_worker, gpus_per_worker)
    with runner_for(resources, address) as runner, ConsoleProgress() as progress:
        opened = open_reference(reference, count=config.reference_images, pool=shared, progress=progress)
        curve = run_stage(
            location(diffusion),
            FeatureCache(cache),
            location(autoencoder),
            opened,
            directory,
            config,
            pool=shared,
            distances=distances,
            runner=runner,
            progress=progress,
        )
    show_checkpoints(curve)
    typer.echo(f"page: {render_checkpoints(curve, directory)}")
