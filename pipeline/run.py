"""All stages in order, in one working directory. Finished, unchanged stages are skipped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import typer

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.local_copy import LocalDisk
from svgpipe.manifests.manifest import MANIFEST_NAME, PLAN_NAME, Manifest
from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.evaluate.export_images import export_npz, export_png
from svgpipe.stages.evaluate.reference import shard_reference
from svgpipe.stages.evaluate.stage import sample_and_eval
from svgpipe.stages.extract.rejects import MAX_REJECTS
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.runtime.progress import Progress
from svgpipe.stages.runtime.resources import Resources
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.train_autoencoder.stage import train_autoencoder
from svgpipe.stages.train_diffusion.stage import train_diffusion
from svgpipe.stages.training.distributed import Strategy

from .cluster import runner_for, training_cluster
from .demo import write_photographs
from .report import render_report
from .sources import DEMO_SOURCE, image_sources, source_folder

STAGES = ("shards", "autoencoder", "cache", "diffusion", "evaluation")  # directories in a working directory


@dataclass(frozen=True)
class RunOptions:
    """Options of `svgpipe run` that are not part of the recipe.

    Attributes:
        resources: workers that extract and sample.
        trainers: training workers; None: train in this process.
        address: Ray cluster; None: this machine, with Ray only if needed.
        strategy: see `train_diffusion`.
        wandb_project: see `train_diffusion`.
        disk: see `train_diffusion`.
        max_rejects: see `extract`.
        guide: see `sample_and_eval`.
        pool: see `sample_and_eval`.
        npz: also write the samples as .npz.
        png: also write the samples as .png files.
    """

    resources: Resources = field(default_factory=Resources)
    trainers: Resources | None = None
    address: str | None = None
    strategy: Strategy = "ddp"
    wandb_project: str | None = None
    disk: LocalDisk | None = None
    max_rejects: float = MAX_REJECTS
    guide: Location | None = None
    pool: Location | None = None
    npz: bool = False
    png: bool = False


def run_recipe(recipe: Recipe, workdir: Location, options: RunOptions, progress: Progress) -> Location:
    """Run every stage of `recipe` in `workdir`. Run again to resume.

    Returns:
        Path of the report.

    Raises:
        UsageError: no image folder is given.
        SvgpipeError: a stage failed.
    """
    _write_demo_source(recipe.source, workdir)
    images = image_sources(recipe, source_folder(recipe.source, workdir))
    tars, encoder, cache, model, evaluation = (workdir / name for name in STAGES)
    _stage(tars, progress, lambda: shard(images, tars, recipe.shard, progress=progress))
    shards = ShardSet.open(tars)
    trainers, wandb = options.trainers, options.wandb_project
    with training_cluster(trainers, options.address):
        train = partial(train_autoencoder, resources=trainers, wandb_project=wandb, progress=progress)
        _stage(encoder, progress, lambda: train(shards, encoder, recipe.autoencoder))
    with runner_for(options.resources, options.address) as runner:
        encode = partial(extract, max_rejects=options.max_rejects, runner=runner, progress=progress)
        _stage(cache, progress, lambda: encode(shards, encoder, cache, recipe.extract))
    with training_cluster(trainers, options.address):
        learn = partial(train_diffusion, resources=trainers, wandb_project=wandb, progress=progress)
        learn = partial(learn, autoencoder=encoder, strategy=options.strategy, disk=options.disk)
        _stage(model, progress, lambda: learn(FeatureCache(cache), model, recipe.diffusion))
    reference = shard_reference(shards)
    with runner_for(options.resources, options.address) as runner:
        evaluate = partial(sample_and_eval, guide=options.guide, pool=options.pool, runner=runner, progress=progress)
        _stage(evaluation, progress, lambda: evaluate(model, encoder, reference, evaluation, recipe.evaluation))
        export_samples(evaluation, npz=options.npz, png=options.png, progress=progress)
    return render_report(evaluation, encoder, model, reference)


def export_samples(evaluation: Location, *, npz: bool, png: bool, progress: Progress) -> None:
    """Write the samples of a finished evaluation in the requested formats, and print where."""
    written = [*(export_npz(evaluation, progress) if npz else []), *(export_png(evaluation, progress) if png else [])]
    for path in written:
        typer.echo(f"images: {path}")


def require_demo(source: str | None, workdir: Location) -> None:
    """Check that a working directory was not made from other images, if the demo's photographs are asked for.

    Raises:
        UsageError: it was.
    """
    if source != DEMO_SOURCE or source_folder(source, workdir).exists():
        return
    if any((workdir / STAGES[0] / name).exists() for name in (MANIFEST_NAME, PLAN_NAME)):
        raise UsageError(
            f"{workdir}: was made from other images than the demo's photographs, which the recipe names as its "
            "source. Give the image folder with --source DIR, or as `source:` in the recipe."
        )


def _write_demo_source(source: str | None, workdir: Location) -> None:
    folder = source_folder(source, workdir)
    require_demo(source, workdir)
    if source == DEMO_SOURCE:
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_photographs(folder)


def _stage(out: Location, progress: Progress, job: Callable[[], Manifest]) -> None:
    finished = (out / MANIFEST_NAME).exists()
    manifest = job()
    state = "finished before, unchanged" if finished else f"finished in {manifest.seconds:.0f} s"
    progress.say(f"{out.name}: {state} ({manifest.fingerprint[:12]})")
    rejected = getattr(manifest, "num_rejected", 0)
    if rejected:
        progress.say(f"{out.name}: warning: {rejected} images were rejected, see {out / 'rejected.jsonl'}")
