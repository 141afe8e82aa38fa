"""The alignment of an imported autoencoder, measured by its first extraction or evaluation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from svgpipe.manifests.alignment import ALIGNMENT_NAME, MeasuredAlignment
from svgpipe.manifests.filesystem import Location, absolute
from svgpipe.manifests.lock import locked
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.shards import ShardSet

from ..runtime.progress import Progress
from ..runtime.runner import Runner
from .calibrate import measure_features, training_rows
from .encoder_actor import EncoderOptions


def needs_alignment(autoencoder: Location, manifest: AutoencoderManifest) -> bool:
    """Return whether the autoencoder aligns, but its alignment is not measured yet."""
    section = manifest.section
    aligns = section.kind == "svg" and section.residual.align and manifest.alignment is None
    return aligns and MeasuredAlignment.read(autoencoder) is None


def measure_alignment(
    shards: ShardSet,
    autoencoder: Location,
    manifest: AutoencoderManifest,
    options: EncoderOptions,
    runner: Runner,
    progress: Progress,
) -> None:
    """Measure the four scalars on evenly spread training images, and store them next to the weights permanently.

    Mean and unbiased standard deviation per channel over images and grid, averaged over the backbone channels and over
    the residual channels, as in `Alignment.statistics` for one batch.

    Raises:
        BusyError: another process is measuring them.
        ArtifactError: no image can be decoded.
        OSError: the directory of the autoencoder is not writable.
    """
    with locked(autoencoder):
        if MeasuredAlignment.read(autoencoder) is not None:
            return
        chosen = training_rows(shards, manifest.section.calibration_images)
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
        f"stored in {ALIGNMENT_NAME} for all later use"
    )


def align_for_evaluation(
    shards: ShardSet,
    autoencoder: Location,
    manifest: AutoencoderManifest,
    batch_size: int,
    runner: Runner,
    progress: Progress,
) -> None:
    """Measure the alignment in float32, the precision of evaluations."""
    options = EncoderOptions(absolute(autoencoder), batch_size, "float32")
    measure_alignment(shards, autoencoder, manifest, options, runner, progress)
