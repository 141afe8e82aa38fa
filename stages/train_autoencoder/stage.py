"""`svgpipe train-autoencoder`: the tokenizer, from images (phase 1)."""

from __future__ import annotations

from functools import partial

from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.model_manifests import AutoencoderManifest
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
    source: DecoderSource | None = None,
    resources: Resources | None = None,
    wandb_project: str | None = None,
    progress: Progress | None = None,
) -> AutoencoderManifest:
    """Train on the training split of `shards` and publish the autoencoder at `out`; run again to resume.

    The backbone is frozen and runs without gradients. After the last step, the alignment scalars of kind svg are
    measured over `calibration_images` and frozen. Losses: models/losses.py, models/vision_loss.py. Dropout and
    alignment: models/residual.py.

    With `source`, only the decoder of a finished autoencoder is trained, on cached latents. The encoder is neither
    computed nor changed, so the result also decodes samples of every model that was trained on the cache.

    Args:
        shards: training and held-out images.
        out: directory to create or resume.
        config: section `autoencoder` of a recipe. With `source`, settings of the encoder are not read, and crops are
            those of the cache.
        source: autoencoder and cache whose decoder is fine-tuned; None: a new autoencoder is trained.
        resources: workers of a connected Ray; None: train in this process. May change at every resume; results change
            by rounding only.
        wandb_project: also log to Weights & Biases.
        progress: receives the progress.

    Returns:
        The manifest of the autoencoder.

    Raises:
        UsageError: wandb is not installed, or an invalid config, or one that does not fit `source`.
        ArtifactError: missing weights or images.
        MismatchError: `out` was begun with another config or other shards.
        DivergedError: NaN or infinity in the loss.
        InterruptedRunError: stopped by a signal; the state is saved.
    """
    if wandb_project is not None:
        require_wandb()
    if source is not None:
        config = source.section(config)
    encodes = source is not None and config.encodes_with_backbone  # then the backbone lies beside the source
    with WorkDir(autoencoder_spec(shards, out, config, source)) as work:
        if work.finished is not None:
            return work.finished
        if config.trains_with_backbone and config.backbone.is_file and not encodes:
            from ..networks.backbone import keep_backbone  # here, because it loads timm

            keep_backbone(config.backbone, out)
        run = AutoencoderRun if source is None else partial(DecoderRun, source=source.absolute())
        start = partial(run, shards=shards.absolute(), out=absolute(out), config=config, wandb_project=wandb_project)
        job = partial(run_training, start=start, memory_advice=MEMORY_ADVICE if source is None else DECODER_ADVICE)
        return work.publish(run_job(job, resources, Recorded(progress, out), work.check_lock))


def autoencoder_spec(
    shards: ShardSet, out: Location, config: AutoencoderSection, source: DecoderSource | None = None
) -> StageSpec[AutoencoderManifest]:
    """Return what `train_autoencoder` is asked to make."""
    inputs = {"shards": shards.as_input()} | ({} if source is None else source.inputs)
    return StageSpec(out, AutoencoderManifest, config.model_dump(mode="json"), inputs)
