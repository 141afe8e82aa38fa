"""One command per stage. Each parses its options, opens the inputs, calls the stage and prints the result.

Stages are imported inside the commands: `svgpipe --help` must not load torch, and training from a cache must not
load timm or webdataset.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.diffusion_section import AlignSection
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import location
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet, expand

from .console import ConsoleProgress
from .options import (
    SOURCE_HELP,
    STAGES,
    AddressOption,
    AutoencoderOption,
    CpusOption,
    EmaOption,
    GpusOption,
    GuidanceOption,
    GuideOption,
    HeldoutLabelsOption,
    HeldoutOption,
    HoldoutOption,
    KeepDamagedOption,
    LocalCacheOption,
    LocalGbOption,
    MaxRejectsOption,
    NpzOption,
    OutOption,
    PngOption,
    PoolOption,
    PresetOption,
    ProcessesOption,
    ProtocolOption,
    RecipeOption,
    ReferenceOption,
    RequiredRecipeOption,
    SetOption,
    ShardsOption,
    StepsOption,
    StoreDtypeOption,
    StrategyOption,
    TrainersOption,
    UnlabelledOption,
    WandbOption,
    WorkersOption,
    local_disk,
    overrides_with,
    read_class_names,
    resources_of,
    trainers_of,
)
from .tables import show_timings

if TYPE_CHECKING:
    from svgpipe.manifests.shards import ShardSetManifest

app = typer.Typer()


@app.command(rich_help_panel=STAGES)
def shard(
    source: Annotated[str, typer.Argument(help=f"JPEG, PNG or WebP images: {SOURCE_HELP}.")],
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    holdout: HoldoutOption = None,
    heldout: HeldoutOption = None,
    heldout_labels: HeldoutLabelsOption = None,
    unlabelled: UnlabelledOption = False,
    keep_damaged: KeepDamagedOption = False,
    workers: ProcessesOption = None,
) -> None:
    """Pack images into WebDataset tars with an index. Archives are not unpacked."""
    from svgpipe.stages.shard.from_images import shard as run_stage

    from .sources import image_sources, local_path

    changed = overrides_with(
        overrides,
        heldout=heldout,
        heldout_labels=heldout_labels,
        unlabelled=unlabelled,
        holdout=holdout,
        keep_damaged=keep_damaged,
    )
    loaded = load_recipe(recipe, changed)
    sources = image_sources(loaded, local_path(source))
    with ConsoleProgress() as progress:
        manifest = run_stage(sources, location(out), loaded.shard, processes=workers, progress=progress)
    typer.echo(_shard_set_line(out, manifest))


@app.command(rich_help_panel=STAGES)
def index(
    tars: Annotated[list[str], typer.Argument(help="Existing tars: 'path/train-{0000..1023}.tar', or several paths.")],
    out: OutOption,
    heldout: Annotated[
        str | None, typer.Option("--heldout", metavar="TARS", help="Tars of images kept out of training.")
    ] = None,
    label_field: Annotated[
        str | None,
        typer.Option(
            "--label-field",
            metavar="NAME",
            help="Take labels from this field of KEY.json (a.b is nested). Default: KEY.cls, or `label` in KEY.json.",
        ),
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option("--class-names", metavar="FILE", help="Class names, one per line; imagenet: its 1,000 synsets."),
    ] = None,
    unlabelled: UnlabelledOption = False,
    decode: Annotated[bool, typer.Option("--decode", help="Decode every image now, not only its header.")] = False,
    keep_damaged: KeepDamagedOption = False,
    workers: ProcessesOption = None,
) -> None:
    """Index existing WebDataset tars in place."""  # noqa: DOC501
    from svgpipe.stages.shard.from_tars import IndexConfig, index_tars
    from svgpipe.stages.shard.tar_members import ScanOptions

    names = read_class_names(class_names)
    if unlabelled and (label_field is not None or names is not None):
        raise UsageError("expected either --unlabelled, or --label-field and --class-names, found both.")
    scan = ScanOptions(label_field, decode or keep_damaged, keep_damaged, unlabelled)
    config = IndexConfig(scan, None if names is None else tuple(names))
    train = [tar for pattern in tars for tar in expand(pattern)]
    held_out = [] if heldout is None else expand(heldout)
    with ConsoleProgress() as progress:
        manifest = index_tars(train, held_out, location(out), config, processes=workers, progress=progress)
    typer.echo(_shard_set_line(out, manifest))


def _shard_set_line(out: str, manifest: ShardSetManifest) -> str:
    """Return the summary of a shard set."""
    rejected = f" (see {out}/rejected.jsonl)" if manifest.num_rejected else ""
    return (
        f"{out}: {manifest.num_images} images of {len(manifest.class_names)} classes in {len(manifest.shards)} tars; "
        f"{manifest.num_inputs} inputs = {manifest.num_images} usable + {manifest.num_rejected} rejected{rejected}"
    )


@app.command(rich_help_panel=STAGES)
def train_autoencoder(
    shards: ShardsOption,
    out: OutOption,
    recipe: RequiredRecipeOption,
    overrides: SetOption = None,
    decoder_only: Annotated[
        bool, typer.Option("--decoder-only", help="Fine-tune the decoder of --from on the latents of --cache.")
    ] = False,
    source: Annotated[
        str | None, typer.Option("--from", metavar="DIR", help="--decoder-only: finished autoencoder.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", metavar="DIR", help="--decoder-only: its cache of the same shards.")
    ] = None,
    workers: TrainersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
    wandb: WandbOption = None,
) -> None:
    """Train the tokenizer: that of SVG, of a vision model alone, SD-VAE or VA-VAE; or fine-tune its decoder."""  # noqa: DOC501
    from svgpipe.stages.train_autoencoder.decoder_source import DecoderSource
    from svgpipe.stages.train_autoencoder.stage import train_autoencoder as run_stage

    from .cluster import training_cluster

    if decoder_only != (source is not None) or decoder_only != (cache is not None):
        raise UsageError("expected --decoder-only, --from and --cache together, or none of them.")

    config = load_recipe(recipe, overrides or []).autoencoder
    opened = ShardSet.open(shards)
    resources = trainers_of(workers, cpus_per_worker=cpus_per_worker, gpus_per_worker=gpus_per_worker, address=address)
    tuned = None
    if source is not None and cache is not None:
        tuned = DecoderSource.open(location(source), FeatureCache(cache), opened)
    with training_cluster(resources, address), ConsoleProgress() as progress:
        manifest = run_stage(
            opened,
            location(out),
            config,
            source=tuned,
            resources=resources,
            wandb_project=wandb,
            progress=progress,
        )
    psnr = "not measured" if manifest.heldout_psnr is None else f"{manifest.heldout_psnr:.2f} dB"
    typer.echo(f"{out}: autoencoder {manifest.fingerprint[:12]}, held-out PSNR {psnr}")


@app.command(rich_help_panel=STAGES)
def extract(
    shards: ShardsOption,
    autoencoder: AutoencoderOption,
    out: OutOption,
    recipe: RecipeOption = None,
    overrides: SetOption = None,
    workers: WorkersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
    store_dtype: StoreDtypeOption = None,
    max_rejects: MaxRejectsOption = 0.001,
    vision_from: Annotated[
        str | None,
        typer.Option(
            "--vision-from",
            metavar="DIR",
            help="Cache of the same shards, vision model and settings: copy its vision features, compute the rest.",
        ),
    ] = None,
) -> None:
    """Encode a shard set into a normalised feature cache."""
    from svgpipe.stages.extract.stage import extract as run_stage

    from .cluster import runner_for

    config = load_recipe(recipe, overrides_with(overrides, store_dtype=store_dtype)).extract
    opened, encoder, directory = ShardSet.open(shards), location(autoencoder), location(out)
    resources = resources_of(workers, cpus_per_worker, gpus_per_worker)
    with runner_for(resources, address) as runner, ConsoleProgress() as progress:
        manifest = run_stage(
            opened,
            encoder,
            directory,
            config,
            max_rejects=max_rejects,
            vision_from=None if vision_from is None else location(vision_from),
            runner=runner,
            progress=progress,
        )
    show_timings(manifest.timings)
    rows, columns, channels = manifest.feature_shape
    typer.echo(
        f"{out}: {manifest.num_samples} samples = {manifest.num_valid} valid + {manifest.num_rejected} rejected, "
        f"{len(manifest.views)} views of {rows}x{columns}x{channels}, {manifest.num_bytes / 1e6:.1f} MB"
    )


@app.command(rich_help_panel=STAGES)
def train_diffusion(
    cache: Annotated[str, typer.Option("--cache", metavar="DIR", help="Finished feature cache. Nothing else is read.")],
    out: OutOption,
    recipe: RequiredRecipeOption,
    overrides: SetOption = None,
    align: Annotated[
        str | None,
        typer.Option(
            "--align", metavar="DIR", help="Second cache of the same shards, whose features the model is aligned with."
        ),
    ] = None,
    autoencoder: Annotated[
        str | None,
        typer.Option("--autoencoder", metavar="DIR", help="Decodes sample grids during training. Default: no grids."),
    ] = None,
    workers: TrainersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    strategy: StrategyOption = None,
    local_cache: LocalCacheOption = None,
    local_gb: LocalGbOption = None,
    address: AddressOption = None,
    wandb: WandbOption = None,
) -> None:
    """Train the diffusion transformer from the cache alone."""
    from svgpipe.stages.train_diffusion.stage import train_diffusion as run_stage

    from .cluster import training_cluster

    config = load_recipe(recipe, overrides or []).diffusion
    if align is not None and config.align is None:
        config = config.model_copy(update={"align": AlignSection()})
    opened, decoder = FeatureCache(cache), None if autoencoder is None else location(autoencoder)
    asked = {"cpus_per_worker": cpus_per_worker, "gpus_per_worker": gpus_per_worker}
    resources = trainers_of(workers, **asked, strategy=strategy, address=address)
    with training_cluster(resources, address), ConsoleProgress() as progress:
        manifest = run_stage(
            opened,
            location(out),
            config,
            align=None if align is None else FeatureCache(align),
            autoencoder=decoder,
            resources=resources,
            strategy=strategy or "ddp",
            wandb_project=wandb,
            disk=local_disk(local_cache, local_gb),
            progress=progress,
        )
    loss = "not measured" if manifest.heldout_loss is None else f"{manifest.heldout_loss:.4f}"
    typer.echo(f"{out}: diffusion model {manifest.fingerprint[:12]}, held-out loss {loss}")


@app.command(rich_help_panel=STAGES)
def sample_and_eval(
    diffusion: Annotated[str, typer.Option("--diffusion", metavar="DIR", help="Finished diffusion model.")],
    autoencoder: AutoencoderOption,
    reference: ReferenceOption,
    out: OutOption,
    recipe: RequiredRecipeOption,
    overrides: SetOption = None,
    preset: PresetOption = None,
    protocol: ProtocolOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    ema: EmaOption = None,
    guide: GuideOption = None,
    npz: NpzOption = False,
    png: PngOption = False,
    pool: PoolOption = None,
    workers: WorkersOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Sample, decode and measure a sweep of steps and guidance; write a report."""
    from svgpipe.stages.evaluate.reference import open_reference
    from svgpipe.stages.evaluate.stage import sample_and_eval as run_stage

    from .cluster import runner_for
    from .report import render_report
    from .run import export_samples

    changed = overrides_with(overrides, preset=preset, protocol=protocol, steps=steps, guidance=guidance, ema=ema)
    config = load_recipe(recipe, changed).evaluation
    model, decoder, directory = location(diffusion), location(autoencoder), location(out)
    shared = directory.parent if pool is None else location(pool)
    resources = resources_of(workers, cpus_per_worker, gpus_per_worker)
    with runner_for(resources, address) as runner, ConsoleProgress() as progress:
        opened = open_reference(reference, count=config.reference_images, pool=shared, progress=progress)
        run_stage(
            model,
            decoder,
            opened,
            directory,
            config,
            guide=None if guide is None else location(guide),
            pool=shared,
            runner=runner,
            progress=progress,
        )
        export_samples(directory, npz=npz, png=png, progress=progress)
    typer.echo(f"report: {render_report(directory, decoder, model, opened)}")
