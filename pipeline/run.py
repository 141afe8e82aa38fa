"""All stages in order, in one working directory; what is finished and unchanged is skipped."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import MANIFEST_NAME, Manifest
from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.evaluate.reference import shard_reference
from svgpipe.stages.evaluate.stage import sample_and_eval
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.runtime.progress import Progress
from svgpipe.stages.runtime.resources import Resources
from svgpipe.stages.shard.from_folder import shard
from svgpipe.stages.train_autoencoder.stage import train_autoencoder
from svgpipe.stages.train_diffusion.stage import train_diffusion

from .cluster import runner_for, training_cluster
from .demo import write_photographs
from .report import render_report

DEMO_SOURCE = "demo-photographs"
STAGES = ("shards", "autoencoder", "cache", "diffusion", "evaluation")  # directories in a working directory


def run_recipe(
    recipe: Recipe,
    workdir: Location,
    *,
    source: str | None = None,
    resources: Resources | None = None,
    trainers: Resources | None = None,
    address: str | None = None,
    progress: Progress,
) -> Location:
    """Run every stage of `recipe` in `workdir`; returns the report's path. Run again to resume.

    Args:
        source: image folder, instead of the recipe's.
        resources: of the workers that extract and sample.
        trainers: of those that train; None trains in this process.
        address: of a Ray cluster; None is this machine, with Ray only where it is needed.
    Raises:
        UsageError: no source is named anywhere. Whatever the stages raise.
    """
    resources = resources or Resources()
    images = _find_source(source or recipe.source, workdir)
    tars, encoder, cache, model, evaluation = (workdir / name for name in STAGES)
    _stage(tars, progress, lambda: shard(images, tars, recipe.shard, progress=progress))
    shards = ShardSet.open(tars)
    with training_cluster(trainers, address):
        train = partial(train_autoencoder, resources=trainers, progress=progress)
        _stage(encoder, progress, lambda: train(shards, encoder, recipe.autoencoder))
    with runner_for(resources, address) as runner:
        encode = partial(extract, runner=runner, progress=progress)
        _stage(cache, progress, lambda: encode(shards, encoder, cache, recipe.extract))
    with training_cluster(trainers, address):
        learn = partial(train_diffusion, autoencoder=encoder, resources=trainers, progress=progress)
        _stage(model, progress, lambda: learn(FeatureCache(cache), model, recipe.diffusion))
    reference = shard_reference(shards)
    with runner_for(resources, address) as runner:
        evaluate = partial(sample_and_eval, runner=runner, progress=progress)
        _stage(evaluation, progress, lambda: evaluate(model, encoder, reference, evaluation, recipe.evaluation))
    return render_report(evaluation, encoder, model, reference)


def _find_source(source: str | None, workdir: Location) -> Path:
    if source is None:
        raise UsageError("no images: name a folder with --source DIR, or as `source:` in the recipe.")
    if source == DEMO_SOURCE:
        if not isinstance(workdir, Path):
            raise UsageError(f"{workdir}: the demo draws its photographs into the working directory; give a folder.")
        workdir.mkdir(parents=True, exist_ok=True)
        return write_photographs(workdir / "photographs")
    return Path(source)


def _stage(out: Location, progress: Progress, job: Callable[[], Manifest]) -> None:
    finished = (out / MANIFEST_NAME).exists()
    manifest = job()
    state = "finished before, unchanged" if finished else f"finished in {manifest.seconds:.0f} s"
    progress.say(f"{out.name}: {state} ({manifest.fingerprint[:12]})")
