"""Commands that show, check, repair and convert artifacts."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import location
from svgpipe.manifests.kinds import artifacts_below
from svgpipe.manifests.manifest import MANIFEST_NAME, write_json
from svgpipe.manifests.model_manifests import AutoencoderManifest, System
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.store_spec import StoreDtype

from .console import ConsoleProgress
from .options import (
    LOOK,
    MEND,
    AddressOption,
    AutoencoderOption,
    CpusOption,
    EmaOption,
    GpusOption,
    HtmlOption,
    JsonOption,
    MaxRejectsOption,
    OutOption,
    ProcessesOption,
    RecipeOption,
    SetOption,
    ShardsOption,
    WorkersOption,
    page_at,
    positive_numbers,
    read_class_names,
    resources_of,
)
from .tables import print_result, show_averages, show_cost, show_diff, show_plan

if TYPE_CHECKING:
    from svgpipe.stages.artifacts.import_diffusion import DiffusionFiles

app = typer.Typer()


@app.command(rich_help_panel=LOOK)
def inspect(
    path: Annotated[str, typer.Argument(help="Artifact, finished or not, or a working directory.")],
    as_json: JsonOption = False,
    html: HtmlOption = None,
) -> None:
    """Show what an artifact holds, its inputs, and whether it is finished."""
    from .inspect import describe, show

    page = page_at(html)
    if page is not None:
        from .cache_page import render_cache

        render_cache(FeatureCache(path), page)
    print_result(describe(location(path)), as_json, show)
    if page is not None:
        typer.echo(f"page: {html}", err=as_json)


@app.command(rich_help_panel=LOOK)
def status(
    path: Annotated[str, typer.Argument(help="Working directory, or one artifact in it.")],
    as_json: JsonOption = False,
) -> None:
    """Show the progress of a running, stopped or finished pipeline."""
    from .status import show_status
    from .status import status as find_status

    print_result(find_status(location(path)), as_json, show_status)


@app.command(rich_help_panel=LOOK)
def verify(
    path: Annotated[str, typer.Argument(help="Artifact, or a working directory.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte: check hashes, checksums and NaN.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check that an artifact is complete and matches its manifest. Exit code 1 if not."""  # noqa: DOC501
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
            several = "s" if len(in_artifact) > 1 else ""
            typer.echo(f"{place}: {f'{len(in_artifact)} problem{several}' if in_artifact else 'whole'} ({how})")
    if any(findings.values()):
        raise typer.Exit(1)


@app.command(rich_help_panel=MEND)
def repair(
    cache: Annotated[str, typer.Argument(help="Finished feature cache with damaged units.")],
    shards: Annotated[
        str | None, typer.Option("--shards", metavar="DIR", help="Shard set of the cache, if it was moved.")
    ] = None,
    autoencoder: Annotated[
        str | None, typer.Option("--autoencoder", metavar="DIR", help="Autoencoder of the cache, if it was moved.")
    ] = None,
    workers: WorkersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Extract again the units of a cache that `verify --deep` reports as damaged."""
    from svgpipe.stages.artifacts.repair import repair as run_stage

    from .cluster import runner_for

    resources = resources_of(workers, cpus_per_worker, gpus_per_worker)
    with runner_for(resources, address) as runner, ConsoleProgress() as progress:
        findings = run_stage(
            location(cache),
            shards=None if shards is None else ShardSet.open(shards),
            autoencoder=None if autoencoder is None else location(autoencoder),
            runner=runner,
            progress=progress,
        )
    for finding in findings:
        typer.echo(f"repaired: {finding.where}: {finding.problem}")
    typer.echo(f"{cache}: complete, with the published content")


@app.command(rich_help_panel=MEND)
def requantize(
    cache: Annotated[str, typer.Argument(help="Finished feature cache.")],
    out: OutOption,
    store_dtype: Annotated[StoreDtype, typer.Option("--store-dtype", help="Dtype of the new cache.")] = "int8",
    autoencoder: Annotated[
        str | None,
        typer.Option(
            "--autoencoder", metavar="DIR", help="Decodes both caches. Default: the one recorded in the cache."
        ),
    ] = None,
    diffusion: Annotated[
        str | None,
        typer.Option("--diffusion", metavar="DIR", help="Model trained on the cache; compares its held-out loss."),
    ] = None,
) -> None:
    """Convert a cache to another dtype and measure the loss."""
    from svgpipe.stages.artifacts.requantize import requantize as run_stage
    from svgpipe.stages.artifacts.requantize_cost import COST_NAME, measure_cost

    source, target = location(cache), location(out)
    with ConsoleProgress() as progress:
        run_stage(source, target, store_dtype, progress=progress)
    reference = FeatureCache(source)
    recorded = reference.manifest.inputs.get("autoencoder")
    decoder = None if recorded is None else recorded.place(source)
    if autoencoder is not None:
        decoder = location(autoencoder)
    elif decoder is not None and not (decoder / MANIFEST_NAME).exists():
        decoder = None
    cost = measure_cost(
        reference,
        FeatureCache(target),
        autoencoder=decoder,
        diffusion=None if diffusion is None else location(diffusion),
    )
    write_json(target / COST_NAME, cost.model_dump(mode="json"))
    show_cost(cost)


@app.command(rich_help_panel=MEND)
def export(
    source: Annotated[str, typer.Argument(help="Finished diffusion model, unfinished run, or RUN/checkpoints/step-….")],
    out: Annotated[
        str, typer.Option("--out", metavar="DIR", help="New folder for model.safetensors, statistics and config.json.")
    ],
    ema: EmaOption = None,
) -> None:
    """Export the weights of a diffusion model as plain safetensors."""
    from svgpipe.stages.artifacts.export import export as run_stage

    exported = run_stage(location(source), location(out), ema or "ema")
    typer.echo(f"{exported.directory}: {exported.weights} of step {exported.step}")


@app.command(rich_help_panel=MEND)
def import_official(
    autoencoder: Annotated[
        Path, typer.Option("--autoencoder", metavar="FILE", help="SVG's Lightning checkpoint, SD-VAE or VA-VAE.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="DIR", help="Directory for `autoencoder` and `diffusion`.")],
    diffusion: Annotated[
        Path | None,
        typer.Option("--diffusion", metavar="FILE", help="Transformer of SVG, DiT, SiT, REPA or LightningDiT."),
    ] = None,
    stats: Annotated[
        Path | None,
        typer.Option("--stats", metavar="FILE", help="dinov3_sp_stats.pt of SVG, latents_stats.pt of LightningDiT."),
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option("--factor", metavar="X", min=1e-6, help="Factor of the latents. DiT, SiT, REPA: 0.18215."),
    ] = None,
    system: Annotated[
        System | None, typer.Option("--system", help="Needed for DiT and SiT, whose files look the same.")
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option("--heads", metavar="N", min=1, help="Attention heads, for sizes that are not published."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", metavar="N", min=8, help="SD-VAE, VA-VAE: pixels. Default: 256.")
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            "--class-names",
            metavar="FILE",
            help="Class names of the transformer, one per line, in label order; `imagenet`: the 1,000 synsets.",
        ),
    ] = None,
) -> None:
    """Import released checkpoints as an autoencoder and a diffusion model."""
    from svgpipe.stages.artifacts.import_official import import_official as run_stage

    files = _transformer_files(diffusion, stats, factor, read_class_names(class_names), system, heads)
    for imported in run_stage(autoencoder, location(out), diffusion=files, image_size=image_size):
        typer.echo(f"{imported.directory}: {imported.what} ({imported.fingerprint[:12]}); {imported.used} tensors used")
        for reason, keys in imported.ignored.items():
            several = f"{len(keys)} entries, {keys[0]} …" if len(keys) > 1 else keys[0]
            typer.echo(f"  not used: {several}: {reason}")
    if AutoencoderManifest.read(location(out) / "autoencoder").section.kind == "svg":
        typer.echo("Official files hold no alignment. The first extraction or evaluation measures it.")


def _transformer_files(diffusion: Path | None, *described: Any) -> DiffusionFiles | None:
    """Return the transformer's file with what describes it; None without a file.

    Raises:
        UsageError: something describes a file that is not given.
    """
    from svgpipe.stages.artifacts.import_diffusion import DiffusionFiles

    if diffusion is None and any(value is not None for value in described):
        raise UsageError(
            "--stats, --factor, --class-names, --system and --heads are about --diffusion: give it as well."
        )
    return None if diffusion is None else DiffusionFiles(diffusion, *described)


@app.command(rich_help_panel=MEND)
def import_latents(
    source: Annotated[
        Path,
        typer.Argument(
            help="Latents: .safetensors (LightningDiT), .npy with dataset.json (edm2, REPA; a .zip too), or class "
            "folders of .npz (MAR)."
        ),
    ],
    out: OutOption,
    heldout: Annotated[
        Path | None, typer.Option("--heldout", metavar="PATH", help="The same for rows kept out of training.")
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(
            "--class-names",
            metavar="FILE",
            help="Class names, one per line, in label order; imagenet: its 1,000 synsets.",
        ),
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(
            "--factor",
            metavar="F",
            help="Normalise by this factor, as 0.18215 for SD-VAE. Default: latents_stats.pt beside the latents, or "
            "mean and standard deviation measured per channel.",
        ),
    ] = None,
    encoder: Annotated[
        str, typer.Option("--encoder", metavar="NAME", help="What made the latents, for pages.")
    ] = "unknown",
    max_rejects: MaxRejectsOption = 0.001,
    workers: ProcessesOption = None,
) -> None:
    """Make a feature cache of latents that other programs computed."""
    from svgpipe.stages.import_latents.stage import Import
    from svgpipe.stages.import_latents.stage import import_latents as run_stage

    wanted = Import(source, heldout, read_class_names(class_names), factor, encoder)
    with ConsoleProgress() as progress:
        manifest = run_stage(wanted, location(out), max_rejects=max_rejects, processes=workers, progress=progress)
    rows, columns, channels = manifest.latent_shape
    drawn = ", drawn from stored means and deviations" if manifest.distribution == "gaussian" else ""
    typer.echo(
        f"{out}: {manifest.num_samples} samples = {manifest.num_valid} valid + {manifest.num_rejected} rejected, "
        f"{len(manifest.views)} views; latents {rows}x{columns}x{channels}{drawn}; {len(manifest.class_names)} classes"
    )


@app.command(rich_help_panel=MEND)
def ema(
    model: Annotated[str, typer.Argument(help="Finished diffusion model, trained with diffusion.power_averages.")],
    sigma: Annotated[
        str, typer.Option("--sigma", metavar="S[,S]", help="Lengths of averages, relative to the training.")
    ],
    evaluate: Annotated[
        str | None,
        typer.Option("--evaluate", metavar="CACHE", help="Measure samples of each in the latent space of its cache."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make averages of the weights of any length after the training: weights `power-SIGMA` for --ema."""
    from svgpipe.stages.artifacts.reconstruct_averages import reconstruct_averages

    sigmas = positive_numbers(sigma, "--sigma")
    cache = None if evaluate is None else FeatureCache(evaluate)
    with ConsoleProgress() as progress:
        averages = reconstruct_averages(location(model), sigmas, evaluate=cache, progress=progress)
    print_result([asdict(average) for average in averages], as_json, lambda _: show_averages(model, averages))


@app.command(rich_help_panel=LOOK)
def plan(
    shards: ShardsOption,
    autoencoder: AutoencoderOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    sample: Annotated[
        int, typer.Option("--sample", metavar="N", min=1, help="Images to encode for the estimate.")
    ] = 64,
    workers: Annotated[int, typer.Option("--workers", metavar="N", min=1, help="Workers to plan for.")] = 1,
    deadline: Annotated[
        float | None,
        typer.Option("--deadline", metavar="HOURS", min=0.001, help="Hours available; prints the workers needed."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate time, disk space and number of workers of `extract`."""
    from svgpipe.stages.extract.cost import estimate_cost

    config = load_recipe(recipe, overrides or []).extract
    with ConsoleProgress() as progress:
        cost = estimate_cost(
            ShardSet.open(shards),
            location(autoencoder),
            config,
            sample=sample,
            num_workers=workers,
            deadline_hours=deadline,
            progress=progress,
        )
    print_result(cost, as_json, show_plan)


@app.command(rich_help_panel=LOOK)
def diff(
    one: Annotated[str, typer.Argument(help="First feature cache: the baseline.")],
    two: Annotated[str, typer.Argument(help="Second cache of the same images.")],
    rows: Annotated[
        int, typer.Option("--rows", metavar="N", min=0, help="Number of rows to compare, evenly spread; 0: all.")
    ] = 4096,
    as_json: JsonOption = False,
) -> None:
    """Compare the features of the same images in two caches."""
    from svgpipe.stages.artifacts.diff import diff as run_stage

    with ConsoleProgress() as progress:
        difference = run_stage(FeatureCache(one), FeatureCache(two), rows=rows or None, progress=progress)
    print_result(difference, as_json, show_diff)
