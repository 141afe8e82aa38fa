"""`svgpipe run --dry-run`: what each stage would do, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.errors import MismatchError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.lock import describe, owner_of
from svgpipe.manifests.manifest import MANIFEST_NAME, PLAN_NAME
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.progress_file import read_progress
from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.workdir import StageSpec
from svgpipe.stages.evaluate.plan import EvaluationPlan
from svgpipe.stages.evaluate.reference import shard_reference
from svgpipe.stages.extract.stage import cache_spec
from svgpipe.stages.shard.changes import require_unchanged
from svgpipe.stages.shard.from_images import shard_spec, spec_without_source
from svgpipe.stages.shard.scan import scan
from svgpipe.stages.train_autoencoder.stage import autoencoder_spec
from svgpipe.stages.train_diffusion.stage import diffusion_spec

from .run import STAGES, RunOptions
from .sources import DEMO_SOURCE, image_sources, source_folder
from .tables import new_table, print_table


@dataclass(frozen=True)
class DryRunRow:
    """What `run` would do with one stage."""

    stage: str
    action: str  # skip, resume, run, refuse, unknown
    why: str


def dry_run(recipe: Recipe, workdir: Location, options: RunOptions) -> list[DryRunRow]:
    """Return what `run_recipe` would do, in the order of the stages. Nothing is written.

    Raises:
        UsageError: no image folder is given, or it holds no images.
        ArtifactError: a damaged manifest, or an image that was changed after it was sharded.
    """
    if recipe.source == DEMO_SOURCE and not source_folder(recipe.source, workdir).exists():
        rows = [DryRunRow(STAGES[0], "run", "not started; the demo's photographs are written first")]
    else:
        rows = []
        for spec in _specs(recipe, workdir, options):
            rows.append(_row(spec))
            if rows[-1].action != "skip":
                break
    done = len(rows)
    return [*rows, *(_later_row(workdir / STAGES[i], STAGES[i - 1], rows[-1]) for i in range(done, len(STAGES)))]


def _specs(recipe: Recipe, workdir: Location, options: RunOptions) -> Iterator[StageSpec[Any]]:
    """Yield the spec of each stage. Its inputs must be finished before it is taken."""
    tars, encoder, cache, model, evaluation = (workdir / name for name in STAGES)
    images = image_sources(recipe, source_folder(recipe.source, workdir))
    kept = None if images.train.exists() else spec_without_source(images, tars, recipe.shard)
    if kept is not None:
        yield kept
    else:
        files = scan(images)[1]
        yield shard_spec(images, files, tars, recipe.shard)
        require_unchanged(tars, files, record=False)
    shards = ShardSet.open(tars)
    yield autoencoder_spec(shards, encoder, recipe.autoencoder)
    yield cache_spec(shards, AutoencoderManifest.read(encoder).as_input(encoder), cache, recipe.extract)
    yield diffusion_spec(FeatureCache(cache), model, recipe.diffusion)
    reference = shard_reference(shards)
    yield EvaluationPlan.resolve(model, encoder, reference, evaluation, recipe.evaluation, guide=options.guide).spec


def _row(spec: StageSpec[Any]) -> DryRunRow:
    name = spec.path.name
    try:
        state, _ = spec.state()
    except MismatchError as error:
        return DryRunRow(name, "refuse", str(error))
    if state == "finished":
        return DryRunRow(name, "skip", "finished, unchanged")
    if state == "extended":
        return DryRunRow(name, "resume", "finished with fewer steps; continues from its last checkpoint")
    progress, owner = read_progress(spec.path), owner_of(spec.path)
    done = "" if progress is None else f": {progress.task} {progress.done} of {progress.total} {progress.unit}"
    if owner is not None:
        return DryRunRow(name, "refuse", f"{spec.path}: {describe(owner).rstrip('.')}{done}")
    if state == "new" and progress is None:  # an evaluation has sampled into the pool before it writes here
        return DryRunRow(name, "run", "not started")
    return DryRunRow(name, "resume", f"begun with the same config and inputs{done}")


def _later_row(out: Location, needed: str, first: DryRunRow) -> DryRunRow:
    """Return the row of a stage whose inputs do not exist yet: it needs the stage `needed`, behind `first`."""
    if first.action == "refuse":
        return DryRunRow(out.name, "unknown", f"not reached: {first.stage} is refused")
    holds = next((name for name in (MANIFEST_NAME, PLAN_NAME) if (out / name).exists()), None)
    if holds is None:
        return DryRunRow(out.name, "run", f"not started; needs {needed}")
    state = "finished" if holds == MANIFEST_NAME else "begun"
    return DryRunRow(out.name, "unknown", f"{state}; valid only if {needed} ends as the one that it was made from")


def show_dry_run(recipe: Recipe, workdir: Location, options: RunOptions) -> None:
    """Print what `run_recipe` would do.

    Raises:
        MismatchError: `run` would refuse a stage.
    """
    rows = dry_run(recipe, workdir, options)
    table = new_table("", "stage", "action", "why")
    for row in rows:
        table.add_row(row.stage, row.action, row.why.splitlines()[0] if row.action != "refuse" else "see below")
    print_table(table)
    for row in rows:
        if row.action == "refuse":
            raise MismatchError(row.why)
