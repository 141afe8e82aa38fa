"""`svgpipe train-diffusion`: the diffusion transformer, from the cache alone (phase 2).

No image, no backbone and no timm model is loaded. Only sample grids load a decoder.
"""

from __future__ import annotations

from functools import partial

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.local_copy import LocalDisk
from svgpipe.manifests.model_manifests import DiffusionManifest, require_decoder
from svgpipe.manifests.recipe import DiffusionSection
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..networks.diffusion import require_patches
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import Resources
from ..training.distributed import Strategy
from ..training.loop import run_training
from ..training.metrics_log import require_wandb
from ..training.ray_train import run_job
from .data import files_of
from .run import MEMORY_ADVICE, DiffusionRun


def train_diffusion(
    cache: FeatureCache,
    out: Location,
    config: DiffusionSection,
    *,
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
        UsageError: wandb is not installed, no training rows, an invalid model, batch or number of workers, or a disk
            that is too small.
        MismatchError: `out` was begun with another cache or config, or `autoencoder` did not make the cache.
        DivergedError: NaN or infinity.
        InterruptedRunError: stopped by a signal; the state is saved.
    """
    if autoencoder is not None:
        maker, what = cache.manifest.inputs.get("autoencoder"), "Give the autoencoder that extracted the cache."
        require_decoder(str(cache.path), maker, cache.manifest.latent_shape, autoencoder, what)
    if wandb_project is not None:
        require_wandb()
    if disk is not None:
        disk.check_folder()
        disk.check_space(cache, len(files_of(cache, cache.training_rows)), config.shuffle_files)
    with WorkDir(diffusion_spec(cache, out, config)) as work:
        if work.finished is not None:
            return work.finished
        start = partial(
            DiffusionRun,
            cache=FeatureCache(absolute(cache.path)) if resources is not None else cache,
            out=absolute(out),
            config=config,
            decoder=None if autoencoder is None else absolute(autoencoder),
            strategy=strategy,
            wandb_project=wandb_project,
            disk=disk,
        )
        job = partial(run_training, start=start, memory_advice=MEMORY_ADVICE)
        return work.publish(run_job(job, resources, Recorded(progress, out), work.check_lock))


def diffusion_spec(cache: FeatureCache, out: Location, config: DiffusionSection) -> StageSpec[DiffusionManifest]:
    """Return what `train_diffusion` is asked to make.

    Raises:
        UsageError: the patches of the model do not divide the grid of the cache.
    """
    require_patches(config.model, cache.manifest.latent_shape[:2], str(cache.path))
    inputs = {"cache": cache.manifest.as_input(cache.path)}
    return StageSpec(out, DiffusionManifest, config.model_dump(mode="json"), inputs)
