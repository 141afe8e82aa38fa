"""Commands for the whole pipeline: run it, try the demo, print a recipe."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from svgpipe.manifests.filesystem import Location, location
from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.recipe_loader import builtin_names, load_recipe, recipe_yaml
from svgpipe.manifests.study import Study, Variant, builtin_studies, load_study
from svgpipe.manifests.study_results import StudyResults

from .console import ConsoleProgress
from .options import (
    RUN,
    SOURCE_HELP,
    AddressOption,
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
    PngOption,
    PoolOption,
    PresetOption,
    ProtocolOption,
    SetOption,
    StepsOption,
    StoreDtypeOption,
    StrategyOption,
    TrainWorkersOption,
    UnlabelledOption,
    WandbOption,
    WorkdirOption,
    WorkersOption,
    local_disk,
    overrides_with,
    resources_of,
)

if TYPE_CHECKING:
    from .run import RunOptions

app = typer.Typer()
RecipeArgument = Annotated[str, typer.Argument(help="Built-in recipe or .yaml file.")]
SourceOption = Annotated[
    str | None, typer.Option("--source", metavar="DIR", help=f"Images: {SOURCE_HELP}. Default: the recipe's.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print which stages would run, and why. Write nothing.")]


@app.command(rich_help_panel=RUN)
def run(
    recipe: RecipeArgument,
    workdir: WorkdirOption,
    source: SourceOption = None,
    overrides: SetOption = None,
    dry_run: DryRunOption = False,
    holdout: HoldoutOption = None,
    heldout: HeldoutOption = None,
    heldout_labels: HeldoutLabelsOption = None,
    unlabelled: UnlabelledOption = False,
    keep_damaged: KeepDamagedOption = False,
    store_dtype: StoreDtypeOption = None,
    max_rejects: MaxRejectsOption = 0.001,
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
    train_workers: TrainWorkersOption = None,
    strategy: StrategyOption = None,
    local_cache: LocalCacheOption = None,
    local_gb: LocalGbOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
    wandb: WandbOption = None,
) -> None:
    """Run all stages in order. Finished, unchanged stages are skipped."""
    from .run import RunOptions

    changed = overrides_with(overrides, source=source, heldout=heldout, heldout_labels=heldout_labels)
    changed = overrides_with(changed, unlabelled=unlabelled, holdout=holdout, keep_damaged=keep_damaged)
    changed = overrides_with(changed, store_dtype=store_dtype, preset=preset, protocol=protocol)
    changed = overrides_with(changed, steps=steps, guidance=guidance, ema=ema)
    options = RunOptions(
        resources=resources_of(workers, cpus_per_worker, gpus_per_worker),
        trainers=None if train_workers is None else resources_of(train_workers, cpus_per_worker, gpus_per_worker),
        address=address,
        strategy=strategy or "ddp",
        wandb_project=wandb,
        disk=local_disk(local_cache, local_gb),
        max_rejects=max_rejects,
        guide=None if guide is None else location(guide),
        pool=None if pool is None else location(pool),
        npz=npz,
        png=png,
    )
    _run(load_recipe(recipe, changed), location(workdir), options, dry_run)


@app.command(rich_help_panel=RUN)
def study(
    study: Annotated[str, typer.Argument(help=f"Built-in study ({', '.join(builtin_studies())}) or .yaml file.")],
    workdir: WorkdirOption,
    only: Annotated[
        str | None, typer.Option("--only", metavar="NAME,NAME,…", help="Make only these variants. Default: all.")
    ] = None,
    source: SourceOption = None,
    overrides: SetOption = None,
    max_rejects: MaxRejectsOption = 0.001,
    workers: WorkersOption = None,
    train_workers: TrainWorkersOption = None,
    strategy: StrategyOption = None,
    cpus_per_worker: CpusOption = None,
    gpus_per_worker: GpusOption = None,
    address: AddressOption = None,
) -> None:
    """Train and measure all variants of a study over one shard set; write their tables."""
    from .run import RunOptions

    loaded = load_study(study, overrides_with(overrides, source=source))
    chosen = loaded.chosen(None if only is None else [name.strip() for name in only.split(",") if name.strip()])
    options = RunOptions(
        resources=resources_of(workers, cpus_per_worker, gpus_per_worker),
        trainers=None if train_workers is None else resources_of(train_workers, cpus_per_worker, gpus_per_worker),
        address=address,
        strategy=strategy or "ddp",
        max_rejects=max_rejects,
    )
    _run_study(loaded, chosen, location(workdir), options)


def _run_study(loaded: Study, chosen: list[Variant], workdir: Location, options: RunOptions) -> None:
    """Run a study, and write its page after every variant, also if some failed.

    Raises:
        Exit: a variant failed.
    """
    from .study import StudyRun
    from .study_page import PAGE, render_study, show_study
    from .study_results import collect

    def publish(failures: dict[str, str], reference: str) -> None:
        results = collect(loaded, workdir, failures, reference)
        results.write(workdir)
        render_study(results, workdir)

    with ConsoleProgress() as progress:
        run = StudyRun(loaded, workdir, options, progress, publish)
        run.run(chosen)
    show_study(StudyResults.read(workdir))
    typer.echo(f"page: {workdir / PAGE}")
    if run.failures:
        raise typer.Exit(1)


def _run(loaded: Recipe, workdir: Location, options: RunOptions, dry_run: bool) -> None:
    from .dry_run import show_dry_run
    from .preflight import check_before_run
    from .run import run_recipe

    check_before_run(loaded, workdir, options, weights=not dry_run)
    if dry_run:
        show_dry_run(loaded, workdir, options)
        return
    with ConsoleProgress() as progress:
        report = run_recipe(loaded, workdir, options, progress)
    typer.echo(f"report: {report}")


@app.command(rich_help_panel=RUN)
def demo(workdir: WorkdirOption = "runs/demo", overrides: SetOption = None, dry_run: DryRunOption = False) -> None:
    """Run the whole pipeline on eight photographs, on a CPU, without downloads."""
    run(recipe="demo", workdir=workdir, overrides=overrides, dry_run=dry_run)
    if dry_run:
        return
    work = shlex.quote(workdir)
    rebuilt = f"--autoencoder {work}/autoencoder --shards {work}/shards --out {work}/reconstruction"
    typer.echo(
        "next (the last command downloads the weights of LPIPS):\n"
        f"  svgpipe probe {work}/cache --html {work}/probe.html\n"
        f"  svgpipe analyze {work}/cache --diffusion {work}/diffusion --html {work}/analysis.html\n"
        f"  svgpipe eval-reconstruction {rebuilt} --recipe demo"
    )


@app.command(rich_help_panel=RUN)
def recipe(
    name: Annotated[str | None, typer.Argument(help="Built-in recipe or .yaml file.")] = None,
    overrides: SetOption = None,
) -> None:
    """Print a resolved recipe as YAML. Without a name: list the built-in recipes."""
    if name is None and not overrides:
        typer.echo("\n".join(builtin_names()))
        return
    typer.echo(recipe_yaml(load_recipe(name, overrides or [])), nl=False)
