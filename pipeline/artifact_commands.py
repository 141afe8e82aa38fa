"""Commands that look at artifacts, check them and mend them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.filesystem import location
from svgpipe.manifests.manifest import MANIFEST_NAME, write_json
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.store_spec import StoreDtype

from .console import ConsoleProgress
from .options import (
    AddressOption,
    AutoencoderOption,
    CpusOption,
    GpusOption,
    HtmlOption,
    JsonOption,
    RecipeOption,
    SetOption,
    ShardsOption,
    WorkersOption,
    page_at,
    read_class_names,
    resources_of,
)
from .tables import print_result, show_cost, show_diff, show_plan

app = typer.Typer()


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(help="Any artifact, finished or not, or a working directory.")],
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """What an artifact holds, what it was made from, and whether it is finished."""
    from .inspect import describe, show

    page = page_at(html)
    if page is not None:
        from .cache_page import render_cache

        render_cache(FeatureCache(path), page)
        typer.echo(f"page: {html}")
        return
    print_result(describe(location(path)), as_json, show)


@app.command()
def status(
    path: Annotated[str, typer.Argument(help="A working directory, or any one artifact in it.")],
    as_json: JsonOption = False,
) -> None:
    """How far a running, stopped or finished pipeline has come: stages, time left, last metrics, warnings."""
    from .status import show_status
    from .status import status as find_status

    print_result(find_status(location(path)), as_json, show_status)


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="Any artifact, or a working directory.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: hashes, checksums, NaN.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Whether an artifact is whole and is what its manifest says. Exit code 1 if it is not."""
    from svgpipe.manifests.kinds import artifacts_below  # it loads torch
    from svgpipe.stages.artifacts.verify import verify as run_stage

    places = artifacts_below(location(path))
    with ConsoleProgress() as progress:
        findings = {str(place): run_stage(place, deep=deep, progress=progress) for place in places}
    if as_json:
        as_dicts = {place: list(map(asdict, in_artifact)) for place, in_artifact in findings.items()}
        typer.echo(json.dumps(as_dicts, indent=2))
    else:
        for place, in_artifact in findings.items():
            for finding in in_artifact:
                typer.echo(f"{finding.where}: {finding.problem}")
            how = "every byte was read" if deep else "sizes and small files; --deep reads every byte"
            typer.echo(f"{place}: {f'{len(in_artifact)} problems' if in_artifact else 'whole'} ({how})")
    if any(findings.values()):
        raise typer.Exit(1)


@app.command()
def repair(
    cache: Annotated[str, typer.Argument(help="Finished feature cache that `verify` has found damaged.")],
    shards: Annotated[str | None, typer.Option("--shards", help="Its shards, if they have moved.")] = None,
    autoencoder: Annotated[str | None, typer.Option("--autoencoder", help="Its autoencoder, if it has moved.")] = None,
    num_workers: WorkersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Extract again exactly what `verify --deep` names, back to the content that was published."""
    from svgpipe.stages.artifacts.repair import repair as run_stage

    from .cluster import runner_for

    resources = resources_of(num_workers, cpus_per_worker, gpus_per_worker)
    with runner_for(resources, address) as runner, ConsoleProgress() as progress:
        findings = run_stage(
            location(cache),
            shards=None if shards is None else ShardSet.open(shards),
            autoencoder=None if autoencoder is None else location(autoencoder),
            runner=runner,
            progress=progress,
        )
    for finding in findings:
        typer.echo(f"mended: {finding.where}: {finding.problem}")
    typer.echo(f"{cache}: whole, with the content that was published")


@app.command()
def requantize(
    cache: Annotated[str, typer.Argument(help="Finished feature cache.")],
    out: Annotated[str, typer.Argument(help="Cache to create or resume.")],
    store_dtype: Annotated[StoreDtype, typer.Option("--store-dtype", help="Of the new cache.")] = "int8",
    autoencoder: Annotated[
        str | None, typer.Option("--autoencoder", help="To decode with; default: where the cache says it lay.")
    ] = None,
    diffusion: Annotated[
        str | None, typer.Option("--diffusion", help="Model trained on the cache: what happens to its held-out loss.")
    ] = None,
) -> None:
    """The same cache in another dtype, and what that costs. Run again to resume."""
    from svgpipe.stages.artifacts.requantize import requantize as run_stage
    from svgpipe.stages.artifacts.requantize_cost import COST_NAME, measure_cost

    source, target = location(cache), location(out)
    with ConsoleProgress() as progress:
        run_stage(source, target, store_dtype, progress=progress)
    reference = FeatureCache(source)
    where = location(autoencoder or reference.manifest.inputs["autoencoder"].path)
    cost = measure_cost(
        reference,
        FeatureCache(target),
        autoencoder=where if autoencoder or (where / MANIFEST_NAME).exists() else None,
        diffusion=None if diffusion is None else location(diffusion),
    )
    write_json(target / COST_NAME, cost.model_dump(mode="json"))
    show_cost(cost)


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Diffusion model, run in progress, or RUN/checkpoints/step-….")],
    out: Annotated[str, typer.Argument(help="New folder: model.safetensors, statistics, config.json.")],
    weights: Annotated[str, typer.Option("--ema", help="ema-DECAY, ema (the recipe's first) or raw.")] = "ema",
) -> None:
    """The weights of a diffusion model as plain safetensors, to use without the pipeline."""
    from svgpipe.stages.artifacts.export import export as run_stage

    exported = run_stage(location(source), location(out), weights)
    typer.echo(f"{exported.directory}: {exported.weights} of step {exported.step}")


@app.command()
def import_official(
    autoencoder: Annotated[Path, typer.Option("--autoencoder", help="Lightning checkpoint of the SVG autoencoder.")],
    out: Annotated[str, typer.Option("--out", help="Folder that will hold `autoencoder` and `diffusion`.")],
    diffusion: Annotated[
        Path | None, typer.Option("--diffusion", help="Checkpoint of the transformer: ema, model or bare.")
    ] = None,
    stats: Annotated[Path | None, typer.Option("--stats", help="dinov3_sp_stats.pt, which --diffusion needs.")] = None,
    class_names: Annotated[
        Path | None, typer.Option("--class-names", help="Of the transformer's labels, one per line, in their order.")
    ] = None,
) -> None:
    """Released SVG checkpoints → an autoencoder and a diffusion model that all other commands take."""
    from svgpipe.stages.artifacts.import_official import import_official as run_stage

    names = read_class_names(class_names)
    for imported in run_stage(autoencoder, location(out), diffusion=diffusion, stats=stats, class_names=names):
        typer.echo(f"{imported.directory}: {imported.what} ({imported.fingerprint[:12]}); {imported.used} tensors used")
        for reason, keys in imported.ignored.items():
            typer.echo(f"  left aside: {len(keys)} {'entry' if len(keys) == 1 else 'entries'}, {keys[0]} …: {reason}")
    typer.echo("The alignment of the residual is in no official file: the first extraction or evaluation measures it.")


@app.command()
def plan(
    shards: ShardsOption,
    autoencoder: AutoencoderOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    sample: Annotated[int, typer.Option("--sample", min=1, help="Images to encode for the estimate.")] = 64,
    num_workers: Annotated[int, typer.Option("--num-workers", min=1, help="Workers to plan for.")] = 1,
    deadline: Annotated[
        float | None, typer.Option("--deadline", min=0.001, help="Hours until the cache must be there.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What `extract` will take: hours, gigabytes per view and dtype, workers for a deadline. Writes nothing."""
    from svgpipe.stages.extract.cost import estimate_cost

    config = load_recipe(recipe, overrides or []).extract
    with ConsoleProgress() as progress:
        cost = estimate_cost(
            ShardSet.open(shards),
            location(autoencoder),
            config,
            sample=sample,
            num_workers=num_workers,
            deadline_hours=deadline,
            progress=progress,
        )
    print_result(cost, as_json, show_plan)


@app.command()
def diff(
    one: Annotated[str, typer.Argument(help="Feature cache that differences are measured against.")],
    two: Annotated[str, typer.Argument(help="Another cache of the same images.")],
    rows: Annotated[int, typer.Option("--rows", min=0, help="Evenly spread rows to compare; 0 is all.")] = 4096,
    as_json: JsonOption = False,
) -> None:
    """How much the features of the same images differ: bfloat16 and float32, say, or old and new weights."""
    from svgpipe.stages.artifacts.diff import diff as run_stage

    with ConsoleProgress() as progress:
        difference = run_stage(FeatureCache(one), FeatureCache(two), rows=rows or None, progress=progress)
    print_result(difference, as_json, show_diff)
