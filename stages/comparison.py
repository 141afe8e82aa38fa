"""Decoded and real image sets → the numbers of an evaluation report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.evaluation import Measured, Report
from svgpipe.manifests.figure import Figure
from svgpipe.manifests.manifest import digest
from svgpipe.manifests.recipe import EvaluationSection
from svgpipe.manifests.shards import ShardFile, refs_of
from svgpipe.manifests.storage import ABANDONED_S, Location, children, make_directory, remove_partials
from svgpipe.models.distances import FrechetTarget
from svgpipe.stages.figures import mean_figure
from svgpipe.stages.images import psnr
from svgpipe.stages.measure import LOGITS, POOLED, Extractor, ImageSet
from svgpipe.stages.metrics import NEIGHBOURS, Comparison, Features
from svgpipe.stages.progress import Progress
from svgpipe.stages.reference import RealSets, Reference
from svgpipe.stages.sampling import SamplerSettings

RECONSTRUCTIONS, NOISE = "reconstructions", "decoded-noise"
PART = 5000  # images: the unit of resume of extracted features


def compare(
    out: Location,
    reference: Reference,
    sets: RealSets,
    images: dict[str, list[ShardFile]],
    settings: Sequence[SamplerSettings],
    class_names: list[str],
    extractor: Extractor,
    *,
    pool: Location,
    config: EvaluationSection,
    progress: Progress,
) -> Report:
    """Features of every set, then its figures against the reference.

    Args:
        out: evaluation directory; decoded images lie below it.
        reference: what is measured against. sets: its images. images: tars of every decoded set, by name.
        settings: the sweep, in order. class_names: of the diffusion model.
        pool: where features are kept, and found by other evaluations.
        config: batch size of the extractor, on which no number depends but by rounding; seed and number of resamplings.
    """
    size = sets.size
    generated = {name: ImageSet(refs_of(out / "images" / name, shards), size) for name, shards in images.items()}
    real = {"reference": ImageSet(sets.reference, size)} if sets.reference else {}
    everything = {**real, **generated}
    not_measured = []
    if len(sets.heldout) >= 2:
        everything["heldout"] = ImageSet(sets.heldout, size)
    else:
        not_measured.append("held-out real images (the floor): the reference has fewer than two; shard with a holdout")
    if not real:
        not_measured.append(
            "kernel distance, precision, recall and nearest classes: the reference is statistics, not images"
        )
    if RECONSTRUCTIONS not in generated:
        not_measured.append("reconstructions: the reference has no images, or the autoencoder no alignment yet")
    same_classes = sets.class_names == class_names
    if real and not same_classes:
        not_measured.append("share of samples nearest to their own class: the reference has other classes")
    if LOGITS not in extractor.layers:
        not_measured.append("Inception Score: it is defined by Inception's classes, and another extractor was chosen")
    if min(map(len, everything.values())) <= NEIGHBOURS:
        not_measured.append(f"precision and recall of sets of {NEIGHBOURS} images or fewer")
    drawn = {setting.name for setting in settings}
    progress.begin("measure", len(everything))
    for name, image_set in everything.items():
        extracted(pool, name, image_set, extractor, config.batch_size)
        progress.advance(1, name)

    def features(name: str) -> Features:
        """As they were kept just now: those of all sets at a time may be more than memory holds."""
        found = extracted(pool, name, everything[name], extractor, config.batch_size)
        labelled = name != NOISE and (same_classes or name not in drawn)
        labels = torch.from_numpy(everything[name].labels) if labelled else None
        return Features(found[POOLED], found.get(LOGITS) if name != "reference" else None, labels)

    against = features("reference") if real else None
    comparison = Comparison(against, config.bootstrap, config.seed, _target(reference))
    roles: dict[str, Any] = {"heldout": "heldout", RECONSTRUCTIONS: "reconstructions", NOISE: "decoded-noise"}
    results = []
    compared = [*(s.name for s in settings), *(role for role in roles if role in everything)]
    progress.begin("compare", len(compared))
    for name in compared:
        more: dict[str, Any] = {}
        if name == RECONSTRUCTIONS:
            more["psnr"] = _psnr(ImageSet(sets.reconstructed, size), everything[name], config)
        if name in drawn:
            more["sampler"] = next(asdict(s) for s in settings if s.name == name)
        role, count = roles.get(name, "samples"), len(everything[name])
        results.append(Measured(name=name, role=role, num_images=count, **comparison.measure(features(name)), **more))
        progress.advance(1, name)
    return Report(
        metric=extractor.metric,
        extractor=extractor.description,
        reference={
            "kind": reference.kind,
            "description": reference.description,
            "num_images": len(sets.reference) if real else None,
            "content": real["reference"].digest if real else reference.ref.fingerprint,
        },
        image_size=size,
        class_names=class_names,
        results=results,
        not_measured=not_measured,
    )


def _target(reference: Reference) -> FrechetTarget | None:
    statistics = reference.statistics
    return None if statistics is None else FrechetTarget(statistics.mean, statistics.covariance)


def extracted(pool: Location, name: str, images: ImageSet, extractor: Extractor, batch_size: int) -> dict[str, Tensor]:
    """Features of a set, kept by the content of images and extractor, never by name alone."""
    make_directory(pool)
    key = digest([images.digest, extractor.description, extractor.layers])[:16]
    path = pool / f"{name}-{key}.safetensors"
    if path.exists():
        return load_tensors(path)
    remove_partials(pool, idle_s=ABANDONED_S)
    if len(images) <= PART:
        found = extractor.features(images, batch_size)
        save_tensors(path, found)
        return found
    # Kept part by part, so that a kill does not cost the hours that a large set takes.
    parts = [ImageSet(images.refs[start : start + PART], images.size) for start in range(0, len(images), PART)]
    pieces = [extracted(pool / "parts", f"{name}-{key}", part, extractor, batch_size) for part in parts]
    found = {layer: torch.cat([piece[layer] for piece in pieces]) for layer in extractor.layers}
    save_tensors(path, found)
    for part_file in children(pool / "parts"):
        if part_file.name.startswith(f"{name}-{key}-"):
            part_file.unlink(missing_ok=True)
    return found


def _psnr(originals: ImageSet, reconstructions: ImageSet, config: EvaluationSection) -> Figure | None:
    """dB, mean over the images that are not reproduced exactly; None where all are."""
    values = [psnr(originals.pixels(i)[None], reconstructions.pixels(i)[None])[0] for i in range(len(originals))]
    finite = torch.tensor([float(value) for value in values if np.isfinite(value)], dtype=torch.float64)
    return mean_figure(finite, config.bootstrap, config.seed) if len(finite) else None
