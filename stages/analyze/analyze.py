"""`svgpipe analyze`: class distances, agreement of velocity fields, and straightness of sampling paths.

These numbers test the paper's argument for vision features instead of VAE latents, for any cache. Only caches and
diffusion models are read.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.class_names import find_class
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import FrozenModel
from svgpipe.manifests.model_manifests import EMA
from svgpipe.manifests.selection import evenly_spread

from ..networks.diffusion import TrainedDiffusion, open_diffusion
from ..runtime.device import pick_device
from ..runtime.progress import Progress, Silent
from .class_distances import Distances, class_distances, tsne
from .class_velocities import ClassVelocities, class_velocities
from .pooling import channel_groups, pooled, spread
from .straightness import Straightness, straightness
from .velocity_agreement import Agreement, velocity_agreement

CLASSES, PER_CLASS = 10, 64
MAX_IMAGES = 4096  # all pairs are compared
RESAMPLINGS = 100


class MappedImage(FrozenModel):
    """One image on the t-SNE map."""

    x: float
    y: float
    row: int
    label: int


class CacheAnalysis(FrozenModel):
    """Analysis of one cache."""

    cache: str
    fingerprint: str
    backbone: str
    shape: tuple[int, int, int] = Field(description="rows, columns, channels of a latent")
    classes: list[str] = Field(description="Analysed classes, evenly spread over all classes.")
    num_images: int
    distances: list[Distances]
    agreement: list[Agreement] = Field(description="Whole latents, at times from noise (0) to data (1).")
    mean_parted: Estimate | None = Field(description="Mean of `parted` over the times. Most times are near the noise.")
    map: list[MappedImage] = Field(description="t-SNE of pooled, standardised features.")
    velocities: ClassVelocities | None = Field(None, description="Of the two classes that were asked for.")
    straightness: Straightness | None
    not_measured: list[str]


class Analysis(FrozenModel):
    """Result of `svgpipe analyze`, caches in the given order."""

    schema_version: int = Field(4, description="Version of this layout; raised when the meaning of a field changes.")
    seed: int
    caches: list[CacheAnalysis]


def analyze(
    caches: Sequence[FeatureCache],
    models: Sequence[Location] = (),
    *,
    classes: int = CLASSES,
    per_class: int = PER_CLASS,
    velocities: tuple[str, str] | None = None,
    weights: str = EMA,
    seed: int = 0,
    progress: Progress | None = None,
) -> Analysis:
    """Measure every cache, with at most `per_class` valid images of at most `classes` classes, evenly spread.

    Args:
        caches: finished caches.
        models: finished diffusion models or checkpoints. Each belongs to the cache that it was trained on, an imported
            one to the first cache of its autoencoder.
        classes: maximum number of classes.
        per_class: maximum number of images per class.
        velocities: two classes, by name or number, whose velocities are compared; None: none.
        weights: of the models: ema, ema-DECAY or raw.
        seed: of splits, noise, t-SNE and bootstrap.
        progress: receives the progress.

    Returns:
        The measurements of all caches.

    Raises:
        MismatchError: a model that belongs to none of the caches, or two models of the same cache.
        ArtifactError: a cache has fewer than two classes with two valid images.
        UsageError: no such weights or class, or more than 4096 images.
    """
    progress = progress or Silent()
    trained = _assign(caches, models)
    if weights != EMA and not trained:
        raise UsageError(f"--ema {weights}: chooses weights of a model, but no --diffusion is given.")
    for model in trained.values():
        model.weights_name(weights)
    chosen = [_choose(cache, classes, per_class) for cache in caches]
    if (most := max(map(len, chosen))) > MAX_IMAGES:
        raise UsageError(
            f"--classes {classes} and --per-class {per_class}: expected at most {MAX_IMAGES} images per cache, found "
            f"{most}. All pairs are compared; use fewer images."
        )
    pairs = [None if velocities is None else _pair(cache, velocities) for cache in caches]
    analyses = []
    for cache, rows, pair in zip(caches, chosen, pairs, strict=True):
        analysis = _analyze_one(cache, trained.get(cache.manifest.fingerprint), rows, weights, seed, progress)
        analyses.append(analysis if pair is None else _with_velocities(analysis, cache, pair, per_class, seed))
    return Analysis(seed=seed, caches=analyses)


def _assign(caches: Sequence[FeatureCache], models: Sequence[Location]) -> dict[str, TrainedDiffusion]:
    """Return the models by the fingerprint of their cache.

    Raises:
        MismatchError: a model without a cache, or two models of one cache.
    """
    assigned: dict[str, TrainedDiffusion] = {}
    for place in models:
        model = open_diffusion(place)
        belongs = [cache.manifest.fingerprint for cache in caches if _is_of(model, cache)]
        if not belongs:
            imported = model.autoencoder is not None
            what = "is imported, and samples latents of the autoencoder" if imported else "was trained on the cache"
            raise MismatchError(
                f"{place}: {what} {(model.autoencoder or model.cache)[:12]}, which is not one of the given caches: "
                + ", ".join(f"{cache.path} ({_known_by(cache, imported)[:12]})" for cache in caches)
            )
        if belongs[0] in assigned:
            raise MismatchError(f"{place}: {assigned[belongs[0]].directory} belongs to the same cache; give one.")
        assigned[belongs[0]] = model
    return assigned


def _is_of(model: TrainedDiffusion, cache: FeatureCache) -> bool:
    return (model.autoencoder or model.cache) == _known_by(cache, model.autoencoder is not None)


def _known_by(cache: FeatureCache, imported: bool) -> str:
    """Return the fingerprint of the cache, or, for an imported model, of the cache's autoencoder."""
    maker = cache.manifest.inputs.get("autoencoder") if imported else None
    return cache.manifest.fingerprint if maker is None else maker.fingerprint


def _analyze_one(
    cache: FeatureCache,
    trained: TrainedDiffusion | None,
    rows: NDArray[np.int64],
    weights: str,
    seed: int,
    progress: Progress,
) -> CacheAnalysis:
    labels = torch.from_numpy(cache.labels[rows].astype(np.int64))
    features = torch.from_numpy(pooled(cache, rows.tolist(), progress))
    features = (features - features.mean(0)) / spread(features)
    groups, missing = channel_groups(cache), list[str]()
    progress.begin("analyze", len(groups) + 2 + (trained is not None), "measurements")
    distances = []
    for name, channels in groups.items():
        try:
            distances.append(class_distances(name, features[:, channels], labels, RESAMPLINGS, seed))
        except ValueError as error:
            missing.append(str(error))
        progress.advance(1, f"distances, {name}")
    places = tsne(features, seed)
    if places is None:
        missing.append("t-SNE: there are fewer than five images, or one channel only")
    progress.advance(1, "t-SNE")
    agreement, parted = _agreement(cache, rows, labels, seed, missing)
    progress.advance(1, "velocity agreement")
    return CacheAnalysis(
        cache=str(cache.path),
        fingerprint=cache.manifest.fingerprint,
        backbone=cache.manifest.backbone,
        shape=cache.manifest.latent_shape,
        classes=[cache.classes[int(c)] for c in np.unique(cache.labels[rows])],
        num_images=len(rows),
        distances=distances,
        agreement=agreement,
        mean_parted=parted,
        map=[
            MappedImage(x=float(x), y=float(y), row=int(row), label=int(cache.labels[row]))
            for (x, y), row in zip([] if places is None else places, [] if places is None else rows, strict=True)
        ],
        straightness=_straightness(trained, weights, seed, progress, missing),
        not_measured=missing,
    )


def _agreement(
    cache: FeatureCache, rows: NDArray[np.int64], labels: Tensor, seed: int, missing: list[str]
) -> tuple[list[Agreement], Estimate | None]:
    """Return `velocity_agreement`; nothing, and the reason in `missing`, if it cannot be measured."""
    try:
        latents = torch.from_numpy(cache.read_latents(rows).astype(np.float32)).flatten(1).to(pick_device())
        agreement, parted, left_out = velocity_agreement(latents, labels, RESAMPLINGS, seed)
    except ValueError as error:
        missing.append(str(error))
        return [], None
    if left_out:
        names = ", ".join(cache.classes[c] for c in left_out)
        missing.append(f"velocity agreement of {names}: far fewer images than in the other classes")
    return agreement, parted


def _pair(cache: FeatureCache, names: tuple[str, str]) -> tuple[int, int]:
    """Return the numbers of two different classes.

    Raises:
        UsageError: there is no such class, or both are the same.
    """
    first, second = (find_class(name, cache.classes, str(cache.path)) for name in names)
    if first == second:
        raise UsageError(f"--velocities: expected two different classes, found {cache.classes[first]} twice.")
    return first, second


def _with_velocities(
    analysis: CacheAnalysis, cache: FeatureCache, pair: tuple[int, int], per_class: int, seed: int
) -> CacheAnalysis:
    """Return the analysis with the velocities of two classes; or with the reason why they are not measured."""
    members = [np.flatnonzero(cache.valid & (cache.labels == number)) for number in pair]
    rows = [own[evenly_spread(len(own), per_class)] for own in members]
    latents = [torch.from_numpy(cache.read_latents(own).astype(np.float32)).flatten(1) for own in rows]
    names = cache.classes[pair[0]], cache.classes[pair[1]]
    try:
        found = class_velocities((latents[0], latents[1]), names, RESAMPLINGS, seed)
    except ValueError as error:
        return analysis.model_copy(update={"not_measured": [*analysis.not_measured, str(error)]})
    return analysis.model_copy(update={"velocities": found})


def _straightness(
    trained: TrainedDiffusion | None, weights: str, seed: int, progress: Progress, missing: list[str]
) -> Straightness | None:
    if trained is None:
        missing.append("curvature of sampling paths: no model of this cache was given (--diffusion)")
        return None
    if trained.objective != "flow":
        missing.append("curvature of sampling paths: the model predicts noise (objective ddpm), not a velocity")
        return None
    name = trained.weights_name(weights)
    model = trained.load(name).to(pick_device())
    result = straightness(model, trained.described(name), RESAMPLINGS, seed, trained.classes)
    progress.advance(1, "straightness")
    return result


def _choose(cache: FeatureCache, classes: int, per_class: int) -> NDArray[np.int64]:
    """Return the rows to analyse: valid ones, in order, of evenly spread classes with at least two valid images.

    Raises:
        ArtifactError: there are fewer than two such classes.
    """
    counts = np.bincount(cache.labels[cache.valid], minlength=len(cache.classes))
    eligible = np.flatnonzero(counts >= 2)
    if len(eligible) < 2:
        raise ArtifactError(
            f"{cache.path}: expected at least two classes with two valid images each, found {len(eligible)}."
        )
    chosen = eligible[evenly_spread(len(eligible), classes)]
    members = (np.flatnonzero(cache.valid & (cache.labels == c)) for c in chosen)
    return np.sort(np.concatenate([m[evenly_spread(len(m), per_class)] for m in members]))
