"""`svgpipe train-autoencoder`: the tokenizer, from images (phase 1)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.recipe import AutoencoderSection
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..runtime.progress import Progress, Recorded
from ..runtime.resources import Resources
from ..training.loop import run_training
from ..training.metrics_log import require_wandb
from ..training.ray_train import run_job
from .decoder_run import DECODER_ADVICE, DecoderRun
from .decoder_source import DecoderSource
from .run import MEMORY_ADVICE, AutoencoderRun


def train_autoencoder(
    shards: ShardSet,
    out: Location,
    config: AutoencoderSection,
    *,
    resources: Resources | None = None,
    wandb_project: str | None = None,
    progress: Progress | None = None,
) -> AutoencoderManifest:
    """Train on the training split of `shards` and publish the autoencoder at `out`; run again to resume.

    The backbone is frozen and runs without gradients. After the last step, the alignment scalars of kind svg are
    measured over `calibration_images` and frozen. Losses: models/losses.py, models/vision_loss.py. Dropout and
    alignment: models/residual.py.

    Args:
        shards: training and held-out images.
        out: directory to create or resume.
        config: section `autoencoder` of a recipe.
        resources: workers of a connected Ray; None: train in this process. May change at every resume; results change
            by rounding only.
        wandb_project: also log to Weights & Biases.
        progress: receives the progress.

    Returns:
        The manifest of the autoencoder.

    Raises:
        UsageError: wandb is not installed, or an invalid config.
        ArtifactError: missing weights or images.
        MismatchError: `out` was begun with another config or other shards.
        DivergedError: NaN or infinity in the loss.
        InterruptedRunError: stopped by a signal; the state is saved.
    """
    if wandb_project is not None:
        require_wandb()
    with WorkDir(autoencoder_spec(shards, out, config)) as work:
        if work.finished is not None:
            return work.finished
        if config.trains_with_backbone and config.backbone.is_file:
            from ..networks.backbone import keep_backbone  # here, because it loads timm

            keep_backbone(config.backbone, out)
        start = partial(
            AutoencoderRun, shards=shards.absolute(), out=absolute(out), config=config, wandb_project=wandb_project
        )
        job = partial(run_training, start=start, memory_advice=MEMORY_ADVICE)
        return work.publish(run_job(job, resources, Recorded(progress, out), work.check_lock))


def fine_tune_decoder(
    shards: ShardSet,
    source: DecoderSource,
    out: Location,
    config: AutoencoderSection,
    *,
    resources: Resources | None = None,
    wandb_project: str | None = None,
    progress: Progress | None = None,
) -> AutoencoderManifest:
    """Train the decoder of a finished autoencoder on cached latents and their images; run again to resume.

    The encoder is neither computed nor changed. The result decodes samples of every model that was trained on the
    cache, and encodes as before.

    Args:
        shards: images of the cache.
        source: autoencoder and cache.
        out: directory to create or resume.
        config: section `autoencoder` of a recipe. What belongs to the encoder is taken from the autoencoder; crops are
            those of the cache, and `flip` needs flips in it.
        resources: as in `train_autoencoder`.
        wandb_project: as in `train_autoencoder`.
        progress: as in `train_autoencoder`.

    Returns:
        The manifest of the autoencoder with the new decoder.

    Raises:
        UsageError: as `train_autoencoder`, or the recipe has another decoder, or flips without flips in the cache.
        ArtifactError: missing weights or images.
        MismatchError: `out` was begun with another config or other inputs.
        DivergedError: NaN or infinity in the loss.
        InterruptedRunError: stopped by a signal; the state is saved.
    """
    if wandb_project is not None:
        require_wandb()
    section = source.section(config)
    spec = autoencoder_spec(shards, out, section)
    with WorkDir(replace(spec, inputs={**spec.inputs, **source.inputs})) as work:
        if work.finished is not None:
            return work.finished
        start = partial(
            DecoderRun,
            shards=shards.absolute(),
            out=absolute(out),
            config=section,
            wandb_project=wandb_project,
            source=source.absolute(),
        )
        job = partial(run_training, start=start, memory_advice=DECODER_ADVICE)
        return work.publish(run_job(job, resources, Recorded(progress, out), work.check_lock))


def autoencoder_spec(shards: ShardSet, out: Location, config: AutoencoderSection) -> StageSpec[AutoencoderManifest]:
    """Return what `train_autoencoder` is asked to make."""
    return StageSpec(out, AutoencoderManifest, config.model_dump(mode="json"), {"shards": shards.as_input()})
