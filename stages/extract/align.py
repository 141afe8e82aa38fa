"""The alignment of an imported autoencoder, measured once, by the first extraction or evaluation that uses it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from svgpipe.manifests.alignment import ALIGNMENT_NAME, MeasuredAlignment
from svgpipe.manifests.checkpoint import AutoencoderManifest
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.lock import locked
from svgpipe.manifests.recipe import AutoencoderSection
from svgpipe.manifests.shards import ShardSet

from ..runtime.progress import Progress
from ..runtime.runner import Runner
from .calibrate import measure_features, training_rows
from .encoder_actor import EncoderOptions


def needs_alignment(autoencoder: Location, manifest: AutoencoderManifest) -> bool:
    """Whether it aligns, but nobody has measured how."""
    residual = AutoencoderSection.model_validate(manifest.config).residual
    aligns = residual.enabled and residual.align and manifest.alignment is None
    return aligns and MeasuredAlignment.read(autoencoder) is None


def measure_alignment(
    shards: ShardSet,
    autoencoder: Location,
    manifest: AutoencoderManifest,
    options: EncoderOptions,
    runner: Runner,
    progress: Progress,
) -> None:
    """Measure the four scalars over evenly spread training images and put them beside the weights, once and for all.

    Mean and unbiased standard deviation of every channel over images and grid, each averaged over the backbone's and
    over the residual's channels, as `Alignment.statistics` has them for one batch.

    Raises:
        BusyError: another extraction is measuring them. ArtifactError: no image can be decoded.
        OSError: the autoencoder's directory cannot be written to.
    """
    with locked(autoencoder):
        if MeasuredAlignment.read(autoencoder) is not None:
            return
        chosen = training_rows(shards, AutoencoderSection.model_validate(manifest.config).calibration_images)
        unaligned = replace(options, aligned=False)
        total, _ = measure_features(shards, chosen, manifest.image_size, unaligned, runner, progress, "align")
        std = total.std * np.sqrt(total.count / max(1, total.count - 1))
        groups = slice(0, manifest.frozen_channels), slice(manifest.frozen_channels, None)
        frozen, residual = ((float(total.mean[g].mean()), float(std[g].mean())) for g in groups)
        MeasuredAlignment(scalars=(*frozen, *residual), images=len(chosen), shards=shards.manifest.fingerprint).write(
            autoencoder
        )
    progress.say(
        f"{autoencoder}: was imported without an alignment; measured on {len(chosen)} images of {shards.directory} and "
        f"kept in {ALIGNMENT_NAME} for all that encodes with it from now on"
    )


def align_for_evaluation(
    shards: ShardSet,
    autoencoder: Location,
    manifest: AutoencoderManifest,
    batch_size: int,
    runner: Runner,
    progress: Progress,
) -> None:
    """`measure_alignment` in float32, as evaluations reconstruct."""
    options = EncoderOptions(absolute(autoencoder), batch_size, "float32")
    measure_alignment(shards, autoencoder, manifest, options, runner, progress)
