"""Pictures of the steps of a sampling and of interpolations, as sheets and as animations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location, write_atomic
from svgpipe.manifests.selection import evenly_spread

from ..images.decode import RGBArray, encode_png
from ..networks.sampling import SamplerSettings
from ..runtime.progress import Progress, Silent
from .image_sampler import ImageSampler
from .interpolation import between_classes, between_seeds
from .pictures import sheet, write_frames
from .trajectory import trajectory

STEP_COLUMNS, STEP_ROWS = 9, 8
MAX_IMAGES, MAX_CLASSES = 64, 16  # of an animation: WebP has at most 16,383 pixels per side


def write_steps(
    out: Location,
    sampler: ImageSampler,
    labels: Sequence[int],
    settings: SamplerSettings,
    names: Sequence[str],
    progress: Progress | None = None,
) -> RGBArray:
    """Write NAME.steps.png, some images after some steps, and NAME.steps.webp, all images after every step.

    Args:
        out: NAME.png.
        sampler: the model.
        labels: N class numbers.
        settings: of the sampling.
        names: of all classes.
        progress: receives the progress.

    Returns:
        The samples (N,H,W,3).

    Raises:
        UsageError: too many images, or the solver has no common steps.
    """
    if len(labels) > MAX_IMAGES:
        raise UsageError(f"--show-steps: expected --count of at most {MAX_IMAGES}, found {len(labels)}.")
    states, captions = trajectory(sampler, labels, settings, progress), [names[label] for label in labels]
    steps, rows = evenly_spread(len(states), STEP_COLUMNS), evenly_spread(len(labels), STEP_ROWS)
    cells = [(row, step) for row in rows for step in steps]
    told = [f"{captions[row]}, {f'step {step}' if step else 'noise'}" for row, step in cells]
    picture = sheet(np.stack([states[step, row] for row, step in cells]), told, len(steps))
    write_atomic(out.with_suffix(".steps.png"), encode_png(picture))
    write_frames(out.with_suffix(".steps.webp"), [sheet(state, captions) for state in states])
    return states[-1]


def write_interpolation(
    out: Location,
    sampler: ImageSampler,
    ends: Sequence[int],
    labels: Sequence[int],
    settings: SamplerSettings,
    names: Sequence[str],
    frames: int,
    progress: Progress | None = None,
) -> None:
    """Write NAME.png, an interpolation per row from left to right, and NAME.webp, which shows it over time.

    Args:
        out: NAME.png.
        sampler: the model.
        ends: two classes; or two seeds, if there are labels.
        labels: classes; of each, a row by lerp of the noises and one by slerp.
        settings: of the sampling.
        names: of all classes.
        frames: images per row.
        progress: receives the progress.

    Raises:
        UsageError: too many classes.
    """
    if len(labels) > MAX_CLASSES:
        raise UsageError(f"--interpolate: expected at most {MAX_CLASSES} --classes, found {len(labels)}.")
    shares, shown = np.linspace(0, 1, frames).tolist(), progress or Silent()
    shown.begin("sample", max(1, 2 * len(labels)) * frames, "images")
    rows: dict[str, RGBArray] = {}
    for label in labels:
        by_lerp, by_slerp = between_seeds(sampler, label, ends, shares, settings, shown)
        rows |= {f"{names[label]}, lerp": by_lerp, f"{names[label]}, slerp": by_slerp}
    if not labels:
        rows = {f"{names[ends[0]]} - {names[ends[1]]}": between_classes(sampler, ends, shares, settings, shown)}
    captions = [f"{name} {share:.2f}" for name in rows for share in shares]
    if not labels:  # the names do not fit between small images
        captions = [names[ends[0]], *(f"{share:.2f}" for share in shares[1:-1]), names[ends[1]]]
    write_atomic(out, encode_png(sheet(np.concatenate(list(rows.values())), captions, frames)))
    moments = [np.stack(images) for images in zip(*rows.values(), strict=True)]
    write_frames(out.with_suffix(".webp"), [sheet(images, list(rows)) for images in moments])
