"""Decoded and real image sets → the numbers of an evaluation report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.evaluation import Measured, Report
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.manifest import digest
from svgpipe.manifests.recipe import EvaluationSection
from svgpipe.manifests.shards import ShardFile, ShardSet, refs_of
from svgpipe.manifests.storage import Location, make_directory
from svgpipe.models.distances import frechet_distance, nearest_class_accuracy
from svgpipe.stages.images import psnr
from svgpipe.stages.measure import Extractor, ImageSet, kernel_distance
from svgpipe.stages.progress import Progress
from svgpipe.stages.sampling import SamplerSettings
from svgpipe.stages.selection import evenly_spread

RECONSTRUCTIONS, NOISE = "reconstructions", "decoded-noise"


@dataclass(frozen=True)
class RealSets:
    """Real images of the reference: what is measured against, the floor, and what is reconstructed."""

    reference: list[ImageRef]
    heldout: list[ImageRef]
    reconstructed: list[ImageRef]
    size: int
    class_names: list[str]

    @classmethod
    def of(cls, shards: ShardSet, config: EvaluationSection, size: int) -> RealSets:
        """Choose them from a shard set. Raises ArtifactError with fewer than two training images."""
        train, heldout = shards.usable("train"), shards.usable("heldout")
        if len(train) < 2:
            raise ArtifactError(f"{shards.directory}: expected at least two reference images, found {len(train)}.")
        reference = [train[i] for i in evenly_spread(len(train), config.reference_images)]
        floor = [heldout[i] for i in evenly_spread(len(heldout), config.num_samples)]
        pool = heldout if len(heldout) >= 2 else train
        reconstructed = [pool[i] for i in evenly_spread(len(pool), config.num_samples)]
        return cls(reference, floor, reconstructed, size, shards.manifest.class_names)


def compare(
    out: Location,
    sets: RealSets,
    images: dict[str, list[ShardFile]],
    settings: Sequence[SamplerSettings],
    class_names: list[str],
    extractor: Extractor,
    *,
    batch_size: int,
    progress: Progress,
) -> Report:
    """Features of every set, then distances to the reference.

    Args:
        out: evaluation directory; decoded images lie below it, features are kept there.
        sets: real images. images: tars of every decoded set, by name.
        settings: the sweep, in order. class_names: of the diffusion model.
        batch_size: of the extractor; no number depends on it but by rounding.
    """
    size = sets.size
    generated = {name: ImageSet(refs_of(out / "images" / name, shards), size) for name, shards in images.items()}
    everything = {"reference": ImageSet(sets.reference, size), **generated}
    not_measured = []
    if len(sets.heldout) >= 2:
        everything["heldout"] = ImageSet(sets.heldout, size)
    else:
        not_measured.append("held-out real images (the floor): the reference has fewer than two; shard with a holdout")
    same_classes = sets.class_names == class_names
    if not same_classes:
        not_measured.append("share of samples nearest to their own class: the reference has other classes")
    progress.begin("measure", len(everything))
    features = {}
    for name, image_set in everything.items():
        features[name] = _features(out / "features", name, image_set, extractor, batch_size)
        progress.advance(1, name)

    def labels_of(name: str) -> Tensor:
        return torch.from_numpy(everything[name].labels)

    reference, labels = features["reference"], labels_of("reference")

    def measured(name: str, role: Any, **more: Any) -> Measured:
        mean, std = kernel_distance(features[name], reference)
        has_labels = role != NOISE and (same_classes or role != "samples")
        return Measured(
            name=name,
            role=role,
            num_images=len(features[name]),
            frechet_distance=frechet_distance(features[name], reference),
            kernel_distance=mean,
            kernel_distance_std=std,
            class_accuracy=nearest_class_accuracy(reference, labels, features[name], labels_of(name))
            if has_labels
            else None,
            **more,
        )

    results = [measured(s.name, "samples", sampler=asdict(s)) for s in settings]
    if "heldout" in features:
        results.append(measured("heldout", "heldout"))
    originals = ImageSet(sets.reconstructed, size)
    quality = _mean_psnr(originals, everything[RECONSTRUCTIONS])
    results.append(measured(RECONSTRUCTIONS, "reconstructions", psnr=quality))
    results.append(measured(NOISE, "decoded-noise"))
    return Report(
        metric=extractor.metric,
        extractor=extractor.description,
        reference={"num_images": len(sets.reference), "content": everything["reference"].digest, "split": "train"},
        image_size=size,
        class_names=class_names,
        results=results,
        not_measured=not_measured,
    )


def _features(folder: Location, name: str, images: ImageSet, extractor: Extractor, batch_size: int) -> Tensor:
    """Features of a set, kept by the content of images and extractor, never by name alone."""
    make_directory(folder)
    key = digest([images.digest, extractor.description])[:16]
    path = folder / f"{name}-{key}.safetensors"
    if path.exists():
        return load_tensors(path)["features"]
    found = extractor.features(images, batch_size)
    save_tensors(path, {"features": found})
    return found


def _mean_psnr(originals: ImageSet, reconstructions: ImageSet) -> float | None:
    """dB, mean over images; None where every one is reproduced exactly."""
    values = [psnr(originals.pixels(i)[None], reconstructions.pixels(i)[None])[0] for i in range(len(originals))]
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else None
