"""Decoded and real image sets → the numbers of an evaluation report."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.evaluation import Measured, ReferenceRecord, SamplerRecord
from svgpipe.manifests.figure import Figure
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import Json, digest, read_json, write_json
from svgpipe.manifests.recipe import EvaluationSection
from svgpipe.manifests.shards import ShardFile, refs_of
from svgpipe.manifests.storage import ABANDONED_S, Location, children, make_directory, remove_partials
from svgpipe.models.distances import FrechetTarget

from ..images.decode import psnr
from ..images.image_set import ImageSet
from ..networks.sampling import SamplerSettings
from ..runtime.device import pick_device
from ..runtime.progress import Progress
from .features import LOGITS, POOLED, Extractor, software
from .intervals import mean_figure
from .metrics import NEIGHBOURS, Comparison, Features
from .reference import RealSets, Reference

HELDOUT, RECONSTRUCTIONS, NOISE = "heldout", "reconstructions", "decoded-noise"
LINES = (HELDOUT, RECONSTRUCTIONS, NOISE)  # to read the samples by, each a role of its own name
REFERENCE = "reference"
PART = 5000  # images: the unit of resume of extracted features


@dataclass(frozen=True)
class Compared:
    """What a report says of the sets that were compared."""

    reference: ReferenceRecord
    results: list[Measured]
    not_measured: list[str]


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
) -> Compared:
    """Features of every set, then its figures against the reference; run again to resume.

    Args:
        out: evaluation directory; decoded images lie below it.
        reference: what is measured against. sets: its images. images: tars of every decoded set, by name.
        settings: the sweep, in order. class_names: of the diffusion model.
        pool: where features are kept, and found by other evaluations.
        config: batch size of the extractor, on which no number depends but by rounding; seed and number of resamplings.
    """
    size = sets.size
    everything = {REFERENCE: ImageSet(sets.reference, size)} if sets.reference else {}
    everything |= {name: ImageSet(refs_of(out / "images" / name, shards), size) for name, shards in images.items()}
    if len(sets.heldout) >= 2:
        everything[HELDOUT] = ImageSet(sets.heldout, size)
    progress.begin("measure", len(everything))
    for name, image_set in everything.items():
        extracted(pool, image_set, extractor, config.batch_size)
        progress.advance(1, name)
    drawn = {setting.name: setting for setting in settings}
    same_classes = sets.class_names == class_names

    def features(name: str) -> Features:
        """As they were kept just now: those of all sets at a time may be more than memory holds."""
        found = extracted(pool, everything[name], extractor, config.batch_size)
        labelled = name != NOISE and (same_classes or name not in drawn)
        labels = torch.from_numpy(everything[name].labels) if labelled else None
        return Features(found[POOLED], found.get(LOGITS) if name != REFERENCE else None, labels)

    against = ReferenceRecord(
        kind=reference.kind,
        description=reference.description,
        num_images=len(sets.reference) or None,
        content=everything[REFERENCE].digest if sets.reference else reference.ref.fingerprint,
    )

    @functools.cache  # made when it is first asked for: where all is kept, the reference need not be loaded
    def comparison() -> Comparison:
        real = features(REFERENCE) if sets.reference else None
        return Comparison(real, config.bootstrap, config.seed, _target(reference))

    def measure(name: str) -> Json:
        more: dict[str, Any] = {}
        if name == RECONSTRUCTIONS:
            more["psnr"] = _psnr(ImageSet(sets.reconstructed, size), everything[name], config)
        if name in drawn:
            more["sampler"] = SamplerRecord(**asdict(drawn[name]))
        role = "samples" if name in drawn else name
        figures = comparison().measure(features(name))
        found = Measured(name=name, role=role, num_images=len(everything[name]), **figures, **more)
        return found.model_dump(mode="json")

    decides = [against.model_dump(), extractor.description.model_dump(), config.bootstrap, config.seed, same_classes]
    names = [*drawn, *(line for line in LINES if line in everything)]
    journal = Journal(out / "journal" / "compare")  # of 50,000 images, the intervals take minutes
    progress.begin("compare", len(names))
    results = []
    for number, name in enumerate(names):
        key = digest([software(), *decides, name, everything[name].digest])
        results.append(Measured.model_validate(journal.kept(number, key, functools.partial(measure, name))))
        progress.advance(1, name)
    smallest = min(map(len, everything.values()))
    missing = _not_measured(everything, extractor, smallest, same_classes=same_classes)
    missing += [
        f"what guidance {s.guidance:g} does in {s.steps} steps: {s.guidance_mode} acts at none of their times"
        for s in settings
        if s.guidance != 1 and not s.acts
    ]
    return Compared(against, results, missing)


def _not_measured(
    everything: dict[str, ImageSet], extractor: Extractor, smallest: int, *, same_classes: bool
) -> list[str]:
    """What is missing, and why."""
    reasons = []
    if HELDOUT not in everything:
        reasons.append("held-out real images (the floor): the reference has fewer than two; shard with a holdout")
    if REFERENCE not in everything:
        reasons.append(
            "kernel distance, precision, recall and nearest classes: the reference is statistics, not images"
        )
    if RECONSTRUCTIONS not in everything:
        reasons.append("reconstructions: the reference has no images, or the autoencoder no alignment yet")
    if REFERENCE in everything and not same_classes:
        reasons.append("share of samples nearest to their own class: the reference has other classes")
    if LOGITS not in extractor.layers:
        reasons.append("Inception Score: it is defined by Inception's classes, and another extractor was chosen")
    if smallest <= NEIGHBOURS and REFERENCE in everything:
        reasons.append(f"precision and recall of sets of {NEIGHBOURS} images or fewer")
    return reasons


def _target(reference: Reference) -> FrechetTarget | None:
    statistics, device = reference.statistics, pick_device()
    return None if statistics is None else FrechetTarget(statistics.mean.to(device), statistics.covariance.to(device))


def extracted(
    pool: Location, images: ImageSet, extractor: Extractor, batch_size: int, prefix: str = ""
) -> dict[str, Tensor]:
    """Features of a set, kept by the content of images and extractor; `prefix`: of the file's name, for parts."""
    make_directory(pool)
    key = digest([images.digest, extractor.description.model_dump(), extractor.layers])[:16]
    path = pool / f"{prefix}{key}.safetensors"
    if (whole := _kept(path)) is not None:
        return whole
    remove_partials(pool, idle_s=ABANDONED_S)
    if len(images) <= PART:
        return _keep(path, extractor.features(images, batch_size))
    # Kept part by part, so that a kill does not cost the hours that a large set takes.
    parts = [ImageSet(images.refs[start : start + PART], images.size) for start in range(0, len(images), PART)]
    pieces = [extracted(pool / "parts", part, extractor, batch_size, f"{key}-") for part in parts]
    found = _keep(path, {layer: torch.cat([piece[layer] for piece in pieces]) for layer in extractor.layers})
    for part_file in children(pool / "parts"):
        if part_file.name.startswith(f"{key}-"):
            part_file.unlink(missing_ok=True)
    return found


def _keep(path: Location, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write features, then the file's hash beside them."""
    write_json(path.with_suffix(".json"), {"sha256": save_tensors(path, found)})
    return found


def _kept(path: Location) -> dict[str, Tensor] | None:
    """Features as they were written; None where there are none, or others than these."""
    try:
        return load_tensors(path, str(read_json(path.with_suffix(".json"))["sha256"]))
    except (ArtifactError, KeyError):
        return None


def _psnr(originals: ImageSet, reconstructions: ImageSet, config: EvaluationSection) -> Figure | None:
    """dB, mean over the images that are not reproduced exactly; None where all are."""
    values = [psnr(originals.pixels(i)[None], reconstructions.pixels(i)[None])[0] for i in range(len(originals))]
    finite = torch.tensor([float(value) for value in values if np.isfinite(value)], dtype=torch.float64)
    return mean_figure(finite, config.bootstrap, config.seed) if len(finite) else None
