"""One command per stage, and those that run all of them. Thin: parse, open inputs, call one stage, say the result.

Stages are imported inside the commands: `svgpipe --help` must not load torch, and training from a cache must not
load timm or webdataset.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal

import typer

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.filesystem import location
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet, expand
from svgpipe.manifests.store_spec import StoreDtype

from .console import ConsoleProgress
from .options import (
    AddressOption,
    AutoencoderOption,
    CpusOption,
    GpusOption,
    MaxRejectsOption,
    OutOption,
    RecipeOption,
    SetOption,
    ShardsOption,
    TrainersOption,
    WandbOption,
    WorkersOption,
    read_class_names,
    resources_of,
    trainers_of,
)
from .tables import show_timings

app = typer.Typer()


@app.command()
def shard(
    source: Annotated[Path, typer.Argument(help="Folder of class folders with JPEG, PNG or WebP images.")],
    out: Annotated[str, typer.Argument(help="Shard set to create or resume.")],
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    holdout: Annotated[
        float | None, typer.Option(min=0, max=0.99, help="Fraction of every class kept out of training.")
    ] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 is one per core.")] = 0,
) -> None:
    """Image folder → WebDataset tars with an index. Run again to resume."""
    from svgpipe.stages.shard.from_folder import shard as run_stage

    extra = [] if holdout is None else [f"shard.holdout={holdout}"]
    config = load_recipe(recipe, [*(overrides or []), *extra]).shard
    with ConsoleProgress() as progress:
        manifest = run_stage(source, location(out), config, workers=workers, progress=progress)
    typer.echo(
        f"{out}: {manifest.num_images} images of {len(manifest.class_names)} classes in {len(manifest.shards)} tars; "
        f"{manifest.num_inputs} inputs = {manifest.num_images} stored + {manifest.num_rejected} rejected"
        + (f" (see {out}/rejected.jsonl)" if manifest.num_rejected else "")
    )


@app.command()
def index(
    tars: Annotated[str, typer.Argument(help="Tars that others made: 'path/train-{0000..1023}.tar'.")],
    out: Annotated[str, typer.Argument(help="Shard set to create or resume; the tars stay where they are.")],
    heldout: Annotated[str | None, typer.Option("--heldout", help="Tars of images kept out of training.")] = None,
    label_field: Annotated[str, typer.Option("--label-field", help="Label in KEY.json; a.b is nested.")] = "label",
    class_names: Annotated[Path | None, typer.Option("--class-names", help="One class name per line.")] = None,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image now, not only its header.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0 is one per core.")] = 0,
) -> None:
    """Tars made by others → a shard set that refers to them. Run again to resume."""
    from svgpipe.stages.shard.from_tars import IndexConfig, index_tars

    names = read_class_names(class_names)
    config = IndexConfig(label_field, None if names is None else tuple(names), decode)
    with ConsoleProgress() as progress:
        manifest = index_tars(
            expand(tars),
            [] if heldout is None else expand(heldout),
            location(out),
            config,
            processes=workers or None,
            progress=progress,
        )
    typer.echo(
        f"{out}: {manifest.num_images} images of {len(manifest.class_names)} classes in {len(manifest.shards)} tars; "
        f"{manifest.num_inputs} inputs = {manifest.num_images} usable + {manifest.num_rejected} rejected"
        + (f" (see {out}/rejected.jsonl)" if manifest.num_rejected else "")
    )


@app.command()
def train_autoencoder(
    shards: ShardsOption,
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    num_workers: TrainersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
    wandb: WandbOption = None,
) -> None:
    """Residual encoder and decoder beside the frozen backbone. Run again to resume."""
    from svgpipe.stages.train_autoencoder.stage import train_autoencoder as run_stage

    from .cluster import training_cluster

    config = load_recipe(recipe, overrides or []).autoencoder
    opened = ShardSet.open(shards)
    resources = trainers_of(
        num_workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker, address=address
    )
    with training_cluster(resources, address), ConsoleProgress() as progress:
        manifest = run_stage(opened, location(out), config, resources=resources, wandb_project=wandb, progress=progress)
    psnr = "not measured" if manifest.heldout_psnr is None else f"{manifest.heldout_psnr:.2f} dB"
    typer.echo(f"{out}: autoencoder {manifest.fingerprint[:12]}, held-out PSNR {psnr}")


@app.command()
def extract(
    shards: ShardsOption,
    autoencoder: AutoencoderOption,
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    num_workers: WorkersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
    store_dtype: Annotated[
        StoreDtype | None, typer.Option("--store-dtype", help="int8 takes less than half the bytes of float16.")
    ] = None,
    max_rejects: MaxRejectsOption = 0.001,
) -> None:
    """Shard set → normalised feature cache, on Ray workers. Run again to resume."""
    from svgpipe.stages.extract.stage import extract as run_stage

    from .cluster import runner_for

    extra = [] if store_dtype is None else [f"extract.store_dtype={store_dtype}"]
    config = load_recipe(recipe, [*(overrides or []), *extra]).extract
    opened = ShardSet.open(shards)
    resources = resources_of(num_workers, cpus_per_worker, gpus_per_worker)
    with runner_for(resources, address) as runner, ConsoleProgress() as progress:
        manifest = run_stage(
            opened,
            location(autoencoder),
            location(out),
            config,
            max_rejects=max_rejects,
            runner=runner,
            progress=progress,
        )
    show_timings(manifest.timings)
    rows, columns, channels = manifest.feature_shape
    typer.echo(
        f"{out}: {manifest.num_samples} samples = {manifest.num_valid} valid + {manifest.num_rejected} rejected, "
        f"{len(manifest.views)} views of {rows}x{columns}x{channels}, {manifest.num_bytes / 1e6:.1f} MB"
    )


@app.command()
def train_diffusion(
    cache: Annotated[str, typer.Option("--cache", help="Finished feature cache; nothing else is needed.")],
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    autoencoder: Annotated[
        str | None, typer.Option("--autoencoder", help="Only for sample grids while training.")
    ] = None,
    num_workers: TrainersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    strategy: Annotated[
        Literal["ddp", "fsdp2"] | None,
        typer.Option("--strategy", help="Several workers: each holds the model (default), or a part of it."),
    ] = None,
    address: AddressOption = None,
    wandb: WandbOption = None,
) -> None:
    """Diffusion transformer, purely from the cache. Run again to resume."""
    from svgpipe.stages.train_diffusion.stage import train_diffusion as run_stage

    from .cluster import training_cluster

    config = load_recipe(recipe, overrides or []).diffusion
    opened = FeatureCache(cache)
    decoder = None if autoencoder is None else location(autoencoder)
    resources = trainers_of(
        num_workers,
        cpus_per_worker=cpus_per_worker,
        gpus_per_worker=gpus_per_worker,
        strategy=strategy,
        address=address,
    )
    with training_cluster(resources, address), ConsoleProgress() as progress:
        manifest = run_stage(
            opened,
            location(out),
            config,
            autoencoder=decoder,
            resources=resources,
            strategy=strategy or "ddp",
            wandb_project=wandb,
            progress=progress,
        )
    loss = "not measured" if manifest.heldout_loss is None else f"{manifest.heldout_loss:.4f}"
    typer.echo(f"{out}: diffusion model {manifest.fingerprint[:12]}, held-out loss {loss}")


def _numbers(text: str | None, name: str) -> list[str]:
    return [] if text is None else [f"evaluation.{name}=[{text}]"]


@app.command()
def sample_and_eval(
    diffusion: Annotated[str, typer.Option("--diffusion", help="Finished diffusion model.")],
    autoencoder: AutoencoderOption,
    reference: Annotated[
        str,
        typer.Option(
            "--reference", help="What to measure against: shard set, image folder, or .npz with mu and sigma."
        ),
    ],
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    steps: Annotated[str | None, typer.Option("--steps", help="For example 5,10,25.")] = None,
    guidance: Annotated[str | None, typer.Option("--guidance", help="For example 1.0,1.5.")] = None,
    weights: Annotated[str | None, typer.Option("--ema", help="ema-DECAY, ema (the recipe's first) or raw.")] = None,
    guide: Annotated[
        str | None, typer.Option("--guide", help="Autoguidance by a worse model, or checkpoint, of the same cache.")
    ] = None,
    npz: Annotated[bool, typer.Option("--npz", help="Also the samples as .npz files for the ADM evaluator.")] = False,
    png: Annotated[bool, typer.Option("--png", help="Also the samples as folders of .png files.")] = False,
    pool: Annotated[
        str | None, typer.Option("--pool", help="Where latents and features are kept and found; default: beside --out.")
    ] = None,
    num_workers: WorkersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """A sweep of steps and guidance: latents, images, distances, report. Run again to resume."""
    from svgpipe.stages.evaluate.export_images import export_npz, export_png
    from svgpipe.stages.evaluate.reference import open_reference
    from svgpipe.stages.evaluate.stage import sample_and_eval as run_stage

    from .cluster import runner_for
    from .report import render_report

    extra = _numbers(steps, "steps") + _numbers(guidance, "guidance")
    extra += [] if weights is None else [f'evaluation.weights="{weights}"']
    config = load_recipe(recipe, [*(overrides or []), *extra]).evaluation
    opened = open_reference(reference)
    resources = resources_of(num_workers, cpus_per_worker, gpus_per_worker)
    model, decoder, directory = location(diffusion), location(autoencoder), location(out)
    with runner_for(resources, address) as runner, ConsoleProgress() as progress:
        run_stage(
            model,
            decoder,
            opened,
            directory,
            config,
            guide=None if guide is None else location(guide),
            pool=None if pool is None else location(pool),
            runner=runner,
            progress=progress,
        )
        written = [*(export_npz(directory, progress) if npz else []), *(export_png(directory, progress) if png else [])]
    for path in written:
        typer.echo(f"images: {path}")
    typer.echo(f"report: {render_report(directory, decoder, model, opened)}")


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="Built-in recipe or a .yaml file.")],
    workdir: Annotated[str, typer.Option("--workdir", help="Holds one directory per stage.")],
    source: Annotated[str | None, typer.Option("--source", help="Image folder, instead of the recipe's.")] = None,
    overrides: SetOption = None,
    num_workers: WorkersOption = None,
    train_workers: Annotated[
        int | None, typer.Option("--train-workers", min=1, help="Training workers on Ray; without it, this process.")
    ] = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """All stages in order, skipping what is finished and unchanged. Run again to resume."""

    from .run import run_recipe

    loaded = load_recipe(recipe, overrides or [])
    resources = resources_of(num_workers, cpus_per_worker, gpus_per_worker)
    trainers = None if train_workers is None else resources_of(train_workers, cpus_per_worker, gpus_per_worker)
    with ConsoleProgress() as progress:
        report = run_recipe(
            loaded,
            location(workdir),
            source=source,
            resources=resources,
            trainers=trainers,
            address=address,
            progress=progress,
        )
    typer.echo(f"report: {report}")


@app.command()
def demo(
    workdir: Annotated[str, typer.Option("--workdir", help="Holds one directory per stage.")] = "runs/demo",
    overrides: SetOption = None,
) -> None:
    """The whole pipeline on eight photographs, on a CPU, with no account and no download."""
    run(recipe="demo", workdir=workdir, overrides=overrides)
    work = shlex.quote(workdir)
    rebuilt = f"--autoencoder {work}/autoencoder --shards {work}/shards --out {work}/reconstruction"
    typer.echo(
        "to look further (the last one fetches the weights of LPIPS, where there is a network):\n"
        f"  svgpipe probe {work}/cache --html {work}/probe.html\n"
        f"  svgpipe analyze {work}/cache --diffusion {work}/diffusion --html {work}/analysis.html\n"
        f"  svgpipe eval-reconstruction {rebuilt} --recipe demo"
    )
