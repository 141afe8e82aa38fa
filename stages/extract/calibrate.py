"""The calibration pass of an extraction: channel statistics and int8 steps, over evenly spread training rows.

The extraction stores them in its journal, so that every resume normalises with the same numbers.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.calibration import MIN_STD, Calibration, given_calibration, measured_calibration
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.moments import Moments
from svgpipe.manifests.recipe import ExtractSection
from svgpipe.manifests.selection import choose_evenly
from svgpipe.manifests.shards import ShardSet

from ..runtime.progress import Progress
from ..runtime.runner import Runner, Steps
from .cpu_tasks import CollectMoments, ReadImages, UnitRows
from .encoder_actor import EncoderOptions, EncodeUnits
from .quantization import SAMPLED_VECTORS, int8_scales
from .vision_source import VisionSource


def calibrate(
    shards: ShardSet,
    encoder: AutoencoderManifest,
    options: EncoderOptions,
    config: ExtractSection,
    runner: Runner,
    progress: Progress,
    source: VisionSource | None = None,
) -> Calibration:
    """Measure the calibration; with `config.factor` only the int8 steps; with `source` only the residual channels.

    Returns:
        Mean, standard deviation and int8 steps.

    Raises:
        ArtifactError: no chosen image can be decoded.
    """
    if source is not None and encoder.residual_channels == 0:
        return source.complete(None)
    given = None
    if config.factor is not None:
        given = given_calibration(0.0, 1 / config.factor, encoder.channels, encoder.distribution)
        if config.store_dtype != "int8":
            return given
    chosen = training_rows(shards, config.calibration_images)
    total, vectors = measure_features(shards, chosen, encoder.image_size, options, runner, progress, "calibrate")
    calibration = given or measured_calibration(total, encoder.distribution)
    constant = np.flatnonzero(total.std[: encoder.channels] < MIN_STD)
    if constant.size and encoder.distribution == "point":
        first = 0 if source is None else len(source.group)
        progress.say(f"channels {(first + constant).tolist()} are constant; stored without division")
    if source is not None:
        return source.complete(calibration)
    if config.store_dtype != "int8":
        return calibration
    return replace(calibration, scale=int8_scales((vectors - calibration.mean) / calibration.std))


def training_rows(shards: ShardSet, count: int) -> list[int]:
    """Return evenly spread usable rows of the training split; of all rows if everything is held out."""
    rows = shards.rows
    usable = np.flatnonzero(~rows.rejected)
    training = np.flatnonzero(~rows.heldout & ~rows.rejected)
    pool = training if len(training) else usable
    return choose_evenly(pool.tolist(), count) if len(pool) else []


def measure_features(
    shards: ShardSet,
    chosen: list[int],
    image_size: int,
    options: EncoderOptions,
    runner: Runner,
    progress: Progress,
    name: str,
) -> tuple[Moments, NDArray[np.float32]]:
    """Return the moments of the features of the chosen rows, and some of their vectors (n,C).

    Raises:
        ArtifactError: none of them can be decoded.
    """
    size = options.batch_size
    units = [UnitRows(number, chosen[i : i + size]) for number, i in enumerate(range(0, len(chosen), size))]
    progress.begin(name, len(chosen), "images")
    # Merged in order. Results that come early are kept until their turn.
    early: dict[int, Moments] = {}
    total: Moments | None = None
    merged = 0
    samples: dict[int, NDArray[np.float32]] = {}
    steps = Steps(
        ReadImages(shards, image_size),
        partial(EncodeUnits, options=options),
        CollectMoments(-(-SAMPLED_VECTORS // max(1, len(units)))),
    )
    for done in runner.run(units, steps):
        early[done.unit], samples[done.unit] = done.moments, done.sample
        while merged in early:
            part = early.pop(merged)
            total = (Moments.empty(len(part.mean)) if total is None else total).merge(part)
            merged += 1
        progress.advance(len(units[done.unit].rows))
    if total is None or total.count == 0:
        raise ArtifactError(f"{shards.directory}: none of {len(chosen)} calibration images could be decoded.")
    return total, np.concatenate([samples[i] for i in sorted(samples)])
