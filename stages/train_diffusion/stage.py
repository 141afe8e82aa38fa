"""`svgpipe train-diffusion`: the diffusion transformer, from the cache alone (phase 2).

No image, no backbone and no timm model is loaded. Only sample grids load a decoder.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.local_copy import LocalDisk
from svgpipe.manifests.model_manifests import DiffusionManifest, require_decoder
from svgpipe.manifests.workdir import StageSpec, WorkDir
from svgpipe.models.ddpm import ddim_steps

from ..networks.diffusion import require_patches
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import Resources
from ..training.distributed import Strategy
from ..training.loop import run_training
from ..training.metrics_log import require_wandb
from ..training.ray_train import run_job
from .alignment_target import AlignmentTarget, alignment_target
from .data import files_of
from .run import MEMORY_ADVICE, DiffusionRun


def train_diffusion(
    cache: FeatureCache,
    out: Location,
    config: DiffusionSection,
    *,
    align: FeatureCache | None = None,
    autoencoder: Location | None = None,
    resources: Resources | None = None,
    strategy: Strategy = "ddp",
    wandb_project: str | None = None,
    disk: LocalDisk | None = None,
    progress: Progress | None = None,
) -> DiffusionManifest:
    """Train on the valid, not held-out rows of `cache` and publish the model at `out`; run again to resume.

    Args:
        cache: finished feature cache. Nothing else is read.
        out: directory to create or resume.
        config: section `diffusion` of a recipe.
        align: second cache of the same shard set, whose features the model is aligned with. Without it, `config.align`
            means the features of `cache` itself.
        autoencoder: decodes sample grids during training; None: no grids.
        resources: workers of a connected Ray; None: train in this process. May change at every resume; results change
            by rounding only.
        strategy: ddp: every worker holds the model; fsdp2: the model is sharded over the workers.
        wandb_project: also log to Weights & Biases.
        disk: keeps copies of the cache's files on the machine of every worker; does not change results.
        progress: receives the progress.

    Returns:
        The manifest of the model.

    Raises:
        UsageError: no wandb, no training rows, an invalid model, batch, number of workers, disk or `align`.
        MismatchError: `out` was begun with other inputs, or an input does not belong to the cache.
        DivergedError: NaN or infinity.
        InterruptedRunError: stopped by a signal; the state is saved.
    """
    _require_decoder(cache, autoencoder)
    if wandb_project is not None:
        require_wandb()
    target = alignment_target(cache, config, align)
    if disk is not None:
        _check_disk(disk, cache, target, config)
    with WorkDir(diffusion_spec(cache, out, config, align)) as work:
        if work.finished is not None:
            return work.finished
        if resources is not None:  # workers may have another current directory
            cache, target = FeatureCache(absolute(cache.path)), None if target is None else target.absolute()
        decoder = None if autoencoder is None else absolute(autoencoder)
        start = partial(DiffusionRun, cache=cache, target=target, out=absolute(out), config=config, decoder=decoder)
        start = partial(start, strategy=strategy, wandb_project=wandb_project, disk=disk)
        job = partial(run_training, start=start, memory_advice=MEMORY_ADVICE)
        return work.publish(run_job(job, resources, Recorded(progress, out), work.check_lock))


def require_sample_steps(config: DiffusionSection) -> None:
    """Check the number of steps of samples during training.

    Raises:
        UsageError: it is not possible for objective ddpm.
    """
    try:
        _ = ddim_steps(config.sample_steps) if config.objective == "ddpm" else []
    except ValueError as error:
        raise UsageError(f"diffusion.sample_steps: {error}.") from error


def _require_decoder(cache: FeatureCache, autoencoder: Location | None) -> None:
    """Raise the errors of `require_decoder`, if there is an autoencoder."""
    if autoencoder is not None:
        maker, what = cache.manifest.inputs.get("autoencoder"), "Give the autoencoder that extracted the cache."
        require_decoder(str(cache.path), maker, cache.manifest.latent_shape, autoencoder, what)


def _check_disk(disk: LocalDisk, cache: FeatureCache, target: AlignmentTarget | None, config: DiffusionSection) -> None:
    """Check that copies of one or two caches fit.

    Raises:
        UsageError: they do not, or files of the two caches hold other rows.
    """
    disk.check_folder()
    caches = [cache] if target is None or target.own else [cache, target.cache]
    if len({one.store.spec.unit_rows for one in caches}) > 1:
        raise UsageError(
            f"--local-cache: expected two caches with the same number of rows per file, found "
            f"{' and '.join(f'{one.store.spec.unit_rows} ({one.path})' for one in caches)}. Extract both with the same "
            "extract.unit_rows, or train without --local-cache."
        )
    share = replace(disk, num_bytes=disk.num_bytes // len(caches))
    for one in caches:
        share.check_space(one, len(files_of(one, one.training_rows)), config.shuffle_files)


def diffusion_spec(
    cache: FeatureCache, out: Location, config: DiffusionSection, align: FeatureCache | None = None
) -> StageSpec[DiffusionManifest]:
    """Return what `train_diffusion` is asked to make.

    Raises:
        UsageError: the patches of the model do not divide the grid of the cache, `align` without `config.align`, or
            sampling steps that are not possible.
    """
    require_patches(config.model, cache.manifest.latent_shape[:2], str(cache.path))
    require_sample_steps(config)
    inputs = {"cache": cache.manifest.as_input(cache.path)}
    if align is not None:
        if config.align is None:
            raise UsageError(
                "--align: the recipe has no settings for it. Set diffusion.align, for example to {depth: 8}."
            )
        inputs["align"] = align.manifest.as_input(align.path)
    return StageSpec(out, DiffusionManifest, config.model_dump(mode="json"), inputs)
