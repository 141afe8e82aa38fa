"""`svgpipe probe`: linear classification and nearest neighbours on the features of a cache.

Only the cache is read, no images and no backbone.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from svgpipe.manifests.alignment import require_same_alignment
from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.manifest import FrozenModel, InputRef, require_same
from svgpipe.manifests.model_manifests import encoder_of
from svgpipe.manifests.paper import PAPER_PROBES, PaperProbe
from svgpipe.manifests.selection import evenly_spread
from svgpipe.models.probes import fit_linear, knn_votes
from svgpipe.models.seeds import generator

from ..evaluate.intervals import share_estimate
from ..runtime.device import pick_device
from ..runtime.progress import Progress, Silent
from .pooling import channel_groups, pooled, spread

NEIGHBOURS = 20
DECAYS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
TUNING_SHARE = 0.1


class GroupProbe(FrozenModel):
    """Top-1 accuracies of one group of channels, with Wilson intervals."""

    group: str = Field(description="backbone, residual or both.")
    channels: int
    linear: Estimate
    knn: Estimate
    weight_decay: float = Field(description="Of the linear probe; chosen on a tenth of the training rows.")


class Probe(FrozenModel):
    """Result of `svgpipe probe`."""

    cache: str
    fingerprint: str
    tested_on: str = Field(description="Held-out rows of the same cache, or the validation cache.")
    classes: int
    training_images: int
    test_images: int
    neighbours: int
    most_frequent: Estimate = Field(description="Accuracy of always predicting the most frequent training class.")
    groups: list[GroupProbe]
    paper: list[PaperProbe] = Field(
        default_factory=PAPER_PROBES.copy,
        description="The paper's values for ImageNet; its protocol may differ from this one.",
    )


def probe(
    cache: FeatureCache,
    validation: FeatureCache | None = None,
    *,
    rows: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Probe:
    """Fit on valid training rows; test on held-out rows of `cache` or on all valid rows of `validation`.

    Features are averaged over the grid and standardised with the training rows. The linear probe is a softmax
    regression (`fit_linear`). Neighbours vote by cosine (`knn_votes`). Intervals are Wilson intervals over the test
    images.

    Args:
        cache: finished cache to train on.
        validation: cache of test images; None: the held-out rows of `cache`.
        rows: maximum number of training and of test rows, evenly spread; None: all.
        seed: of the split that chooses the weight decay.
        progress: receives the progress.

    Returns:
        Accuracies per group of channels.

    Raises:
        UsageError: no test rows, or a validation cache that holds the training images.
        MismatchError: a validation cache of another autoencoder or alignment, or with other classes.
        ArtifactError: fewer than two classes, or damaged features.
    """
    progress = progress or Silent()
    tested, training, test = probed_rows(cache, validation, rows)
    classes = len(cache.classes)
    y, y_test = _labels(cache, training), _labels(tested, test)
    if len(y.unique()) < 2 or not len(test):
        raise ArtifactError(
            f"{cache.path}: expected training rows of at least two classes and a test row, "
            f"found {len(y.unique())} classes and {len(test)} test rows."
        )
    x, x_test = _features(cache, training, progress), _features(tested, test, progress)
    mean, std = x.mean(0), spread(x)
    x, x_test = (x - mean) / std, (x_test - mean) / std
    groups = channel_groups(cache)
    progress.begin("probe", len(groups), "channel groups")
    results = []
    for name, channels in groups.items():
        results.append(_probe_group(name, x[:, channels], y, x_test[:, channels], y_test, classes, seed))
        progress.advance(1, name)
    return Probe(
        cache=str(cache.path),
        fingerprint=cache.manifest.fingerprint,
        tested_on="held-out rows" if validation is None else str(validation.path),
        classes=classes,
        training_images=len(training),
        test_images=len(test),
        neighbours=NEIGHBOURS,
        most_frequent=_accuracy(torch.full_like(y_test, int(y.bincount().argmax())), y_test),
        groups=results,
    )


def _labels(cache: FeatureCache, rows: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(cache.labels[rows].astype(np.int64)).to(pick_device())


def _features(cache: FeatureCache, rows: NDArray[np.int64], progress: Progress) -> Tensor:
    return torch.from_numpy(pooled(cache, rows.tolist(), progress)).to(pick_device())


def probed_rows(
    cache: FeatureCache, validation: FeatureCache | None, rows: int | None
) -> tuple[FeatureCache, NDArray[np.int64], NDArray[np.int64]]:
    """Return the cache to test on, rows of `cache` to train on, and rows of the other to test on.

    Args:
        cache: finished cache to train on.
        validation: cache of test images; None: the held-out rows of `cache`.
        rows: maximum number of training and of test rows, evenly spread; None: all.

    Raises:
        UsageError: there are no held-out rows, or the validation cache holds the training images.
        MismatchError: a validation cache of another autoencoder or alignment, or with other classes.
    """
    training = cache.training_rows
    if validation is None:
        tested, test = cache, cache.heldout_rows
        if not len(test):
            raise UsageError(
                f"{cache.path}: has no held-out rows to test on. Give a cache of other images with --validation, "
                "or make the cache with held-out rows (--holdout, --heldout)."
            )
    else:
        _require_comparable(cache, validation)
        tested, test = validation, np.flatnonzero(validation.valid)
    training, test = (chosen[evenly_spread(len(chosen), rows)] for chosen in (training, test))
    return tested, training, test


def _probe_group(
    name: str, x: Tensor, y: Tensor, x_test: Tensor, y_test: Tensor, classes: int, seed: int
) -> GroupProbe:
    decay = _best_decay(x, y, classes, seed)
    linear = fit_linear(x, y, classes, decay)(x_test).argmax(1)
    votes = knn_votes(x, y, x_test, classes, NEIGHBOURS).argmax(1)
    return GroupProbe(
        group=name,
        channels=x.shape[1],
        linear=_accuracy(linear, y_test),
        knn=_accuracy(votes, y_test),
        weight_decay=decay,
    )


def _accuracy(predicted: Tensor, labels: Tensor) -> Estimate:
    return share_estimate(predicted == labels, interval=True)


def _best_decay(x: Tensor, y: Tensor, num_classes: int, seed: int) -> float:
    """Return the best of DECAYS by accuracy on a random tenth of the training rows; of equal ones the largest."""
    order = torch.randperm(len(x), generator=generator(seed, "probe")).to(x.device)
    held, kept = order.split([max(1, round(TUNING_SHARE * len(x))), len(x) - max(1, round(TUNING_SHARE * len(x)))])
    scores = {
        decay: (fit_linear(x[kept], y[kept], num_classes, decay)(x[held]).argmax(1) == y[held]).double().mean().item()
        for decay in DECAYS
    }
    return max(DECAYS, key=lambda decay: (scores[decay], decay))


def _require_comparable(cache: FeatureCache, validation: FeatureCache) -> None:
    ours, theirs = cache.manifest.inputs, validation.manifest.inputs
    same_source = "Extract both caches with the same autoencoder."
    if "autoencoder" in ours or "autoencoder" in theirs:
        validator, own = (one.manifest.input("autoencoder") for one in (validation, cache))
        if encoder_of(validator) != encoder_of(own):
            require_same(str(validation.path), validator, own, what_to_do=same_source)
    if (expected := cache.manifest.latent_shape) != (found := validation.manifest.latent_shape):
        raise MismatchError(f"{validation.path}: expected latents of {expected}, found {found}. {same_source}")
    require_same_alignment(validation.path, cache.path)
    not_heldout = bool((validation.valid & ~validation.heldout).any())  # held-out rows are never trained on
    one, other = (
        inputs.get("shards") or manifest.as_input(path)
        for inputs, manifest, path in (
            (ours, cache.manifest, cache.path),
            (theirs, validation.manifest, validation.path),
        )
    )
    if one.fingerprint == other.fingerprint or (not_heldout and _share_tars(one, other)):
        raise UsageError(
            f"{validation.path}: holds images of {cache.path} itself. Omit --validation to test on the held-out rows, "
            "or give a cache of other images."
        )
    if (names := _first_difference(cache.classes, validation.classes)) is not None:
        raise MismatchError(
            f"{validation.path}: expected the {len(cache.classes)} classes of {cache.path} in the same order, found "
            f"{len(validation.classes)}; the first difference: {names[0]!r} there, {names[1]!r} here."
        )


def _share_tars(one: InputRef, other: InputRef) -> bool:
    """Return whether two inputs, each a shard set or a part of one, share a tar."""
    if one.config.get("of", one.fingerprint) != other.config.get("of", other.fingerprint):
        return False
    parts = [set(ref.config["only"]) for ref in (one, other) if "only" in ref.config]
    return len(parts) < 2 or bool(parts[0] & parts[1])


def _first_difference(ours: Sequence[str], theirs: Sequence[str]) -> tuple[str | None, str | None] | None:
    for i in range(max(len(ours), len(theirs))):
        one, two = (names[i] if i < len(names) else None for names in (ours, theirs))
        if one != two:
            return one, two
    return None
