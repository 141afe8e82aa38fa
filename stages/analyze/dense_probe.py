"""`svgpipe probe --maps`: segmentation and depth from the features of a cache, by a head per grid cell.

Only the cache and the label maps are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.dense_section import DenseProbeSection
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.label_maps import DEPTH, SEGMENTATION, LabelMaps
from svgpipe.manifests.manifest import FrozenModel, differing_fields
from svgpipe.manifests.paper import PAPER_DENSE, PaperDense

from ..evaluate.intervals import mean_estimate, picks, quantile_estimate
from ..runtime.device import pick_device
from ..runtime.progress import Progress, Silent
from .dense_fit import DenseHead, MappedRows, constant_prediction, measures
from .pooling import channel_groups
from .probe import probed_rows

EXAMPLES = 6
TASKS = (SEGMENTATION, DEPTH)
LABEL_KEYS = {SEGMENTATION: ("classes",), DEPTH: ("min_depth", "max_depth")}  # of the section maps


class DenseScores(FrozenModel):
    """Measures of one head, with 95 % bootstrap intervals over the test images."""

    group: str = Field(description="backbone, residual or both; or the constant prediction.")
    channels: int = Field(description="0: no features are used.")
    mean_iou: Estimate | None = Field(
        None, description="Mean over the classes in the test maps; of all test images together."
    )
    accuracy: Estimate | None = Field(None, description="Share of labelled cells of the maps with the right class.")
    rmse: Estimate | None = Field(None, description="Metres, mean over images.")
    relative_error: Estimate | None = Field(None, description="|error| / depth (A.Rel), mean over images.")
    within_quarter: Estimate | None = Field(None, description="Share within a factor of 1.25, mean over images.")


class DenseProbe(FrozenModel):
    """Result of one task."""

    cache: str
    fingerprint: str
    maps: str
    maps_fingerprint: str
    task: Literal["segmentation", "depth"]
    head: str
    steps: int
    size: int = Field(description="Labels per side, at which heads are trained and tested.")
    tested_on: str
    training_images: int
    test_images: int
    constant: DenseScores = Field(description="Of the most frequent class, or of the mean depth, everywhere.")
    groups: list[DenseScores]
    class_iou: dict[str, float | None] = Field(
        description="Of the last group, by class; null: not in the test maps. Empty for depth."
    )
    paper: list[PaperDense] = Field(default_factory=PAPER_DENSE.copy)


class DenseProbes(FrozenModel):
    """Result of `svgpipe probe --maps`."""

    probes: list[DenseProbe]


@dataclass(frozen=True)
class Example:
    """A test image: its row in the tested cache, its label map, and what the head of the last group predicts, (S,S)."""

    task: str
    cache: FeatureCache
    row: int
    true: NDArray[np.generic]
    predicted: NDArray[np.generic]


def dense_probe(
    cache: FeatureCache,
    maps: LabelMaps,
    config: DenseProbeSection,
    *,
    validation: FeatureCache | None = None,
    validation_maps: LabelMaps | None = None,
    rows: int | None = None,
    progress: Progress | None = None,
) -> tuple[DenseProbes, list[Example]]:
    """Train a head per task and group of channels on training rows; test on held-out rows or on another cache.

    Args:
        cache: finished cache to train on.
        maps: label maps of the same shard set.
        config: section `dense_probe` of a recipe.
        validation: cache of test images; None: the held-out rows of `cache`.
        validation_maps: their label maps; needed with `validation`.
        rows: maximum number of training and of test rows, evenly spread; None: all.
        progress: receives the progress.

    Returns:
        The measures, and some test images with their predictions.

    Raises:
        UsageError: only one of `validation` and `validation_maps`, or no test rows.
        MismatchError: label maps of other shards or with other labels, or a cache of another autoencoder.
        ArtifactError: too few rows have a map, or a file is damaged.
    """
    if (validation is None) != (validation_maps is None):
        raise UsageError("expected --validation and --validation-maps together, or neither.")
    tested_maps = validation_maps or maps
    tested, training, test = probed_rows(cache, validation, rows)
    for one, its_maps in ((cache, maps), (tested, tested_maps)):
        _require_same_rows(one, its_maps)
    _require_same_labels(maps, tested_maps)
    progress, device = progress or Silent(), pick_device()
    pairs = {task: (_mapped(cache, maps, task, training), _mapped(tested, tested_maps, task, test)) for task in TASKS}
    tasks = [pair for pair in pairs.values() if all(len(data.rows) for data in pair)]
    if not tasks:
        counts = ", ".join(f"{task} {len(one.rows)} and {len(other.rows)}" for task, (one, other) in pairs.items())
        raise ArtifactError(
            f"{maps.path}: expected training and test rows with a map of one task, found of {len(training)} and "
            f"{len(test)} rows: {counts}."
        )
    progress.begin("train heads", len(tasks) * len(channel_groups(cache)) * config.steps, "steps")
    found = [_probe_task(one, other, config, device, progress) for one, other in tasks]
    return DenseProbes(probes=[probe for probe, _ in found]), [example for _, some in found for example in some]


def _require_same_rows(cache: FeatureCache, maps: LabelMaps) -> None:
    """Check that row i is the same image in both.

    Raises:
        MismatchError: they were made from other shard sets.
    """
    if "shards" not in cache.manifest.inputs:
        raise MismatchError(f"{cache.path}: was not extracted from a shard set, so no label maps belong to its rows.")
    ours, theirs = cache.manifest.input("shards"), maps.manifest.input("shards")
    if ours.fingerprint != theirs.fingerprint:
        raise MismatchError(
            f"{maps.path}: expected maps of the shard set of {cache.path} ({ours.path}, {ours.fingerprint[:12]}), "
            f"found those of {theirs.path} ({theirs.fingerprint[:12]}). Run svgpipe extract-maps on the former."
        )


def _require_same_labels(maps: LabelMaps, others: LabelMaps) -> None:
    """Check that labels mean the same in both.

    Raises:
        MismatchError: they do not.
    """
    common = set(maps.names) & set(others.names)
    keys = ["size", *(key for task, of_task in LABEL_KEYS.items() if task in common for key in of_task)]
    expected, found = ({key: one.manifest.config[key] for key in keys} for one in (maps, others))
    if lines := differing_fields(expected, found, "maps"):
        raise MismatchError(
            f"{others.path}: other label maps than {maps.path}: {'; '.join(lines)}. Extract both with one recipe."
        )


def _mapped(cache: FeatureCache, maps: LabelMaps, task: str, rows: NDArray[np.int64]) -> MappedRows:
    """Return the rows that have a map."""
    chosen = np.intersect1d(rows, maps.rows(task)) if task in maps.names else rows[:0]
    return MappedRows(cache, maps, task, chosen)


def _probe_task(
    data: MappedRows, test: MappedRows, config: DenseProbeSection, device: torch.device, progress: Progress
) -> tuple[DenseProbe, list[Example]]:
    constant = constant_prediction(data)
    size, kind = data.maps.manifest.size, torch.long if data.task == SEGMENTATION else torch.float32

    def everywhere(features: Tensor) -> Tensor:
        return torch.full((len(features), size, size), constant, dtype=kind)

    scores = []
    per_image = torch.zeros(0)
    for name, channels in channel_groups(data.cache).items():
        head = DenseHead(data, channels, config, device)
        head.fit(progress.advance)
        per_image = measures(test, head.predict)
        scores.append(_scores(name, channels.stop - channels.start, test.task, per_image, config))
    probe = DenseProbe(
        cache=str(data.cache.path),
        fingerprint=data.cache.manifest.fingerprint,
        maps=str(data.maps.path),
        maps_fingerprint=data.maps.manifest.fingerprint,
        task=SEGMENTATION if data.task == SEGMENTATION else "depth",
        head=config.head,
        steps=config.steps,
        size=size,
        tested_on="held-out rows" if test.cache is data.cache else str(test.cache.path),
        training_images=len(data.rows),
        test_images=len(test.rows),
        constant=_scores("constant", 0, test.task, measures(test, everywhere), config),
        groups=scores,
        class_iou=_class_iou(data.maps, per_image) if data.task == SEGMENTATION else {},
    )
    return probe, _examples(test, head)


def _scores(group: str, channels: int, task: str, per_image: Tensor, config: DenseProbeSection) -> DenseScores:
    count, seed = config.bootstrap, config.seed
    if task == SEGMENTATION:
        sums = [per_image[pick].sum(0) for pick in picks(len(per_image), count, seed)]
        iou, accuracy = (
            quantile_estimate([measure(one) for one in sums], measure(per_image.sum(0)), len(per_image))
            for measure in (_mean_iou, _accuracy)
        )
        return DenseScores(group=group, channels=channels, mean_iou=iou, accuracy=accuracy)
    rmse, relative, within = (mean_estimate(per_image[:, i], count, seed) for i in range(3))
    return DenseScores(group=group, channels=channels, rmse=rmse, relative_error=relative, within_quarter=within)


def _mean_iou(sums: Tensor) -> float:
    """(3,K) intersections, unions and labelled cells of all images together → mean over the classes with a cell.

    Returns:
        The mean IoU.
    """
    intersection, union, cells = sums
    return float((intersection / union)[cells > 0].mean())


def _accuracy(sums: Tensor) -> float:
    return float(sums[0].sum() / sums[2].sum())


def _class_iou(maps: LabelMaps, per_image: Tensor) -> dict[str, float | None]:
    sums = zip(maps.manifest.classes, *per_image.sum(0).tolist(), strict=True)
    return {name: both / union if cells else None for name, both, union, cells in sums}


def _examples(test: MappedRows, head: DenseHead) -> list[Example]:
    """Return the first test images."""
    places = range(min(EXAMPLES, len(test.rows)))
    unflipped = [False] * len(places)
    predicted, true = head.predict(test.features(places, unflipped)).numpy(), test.labels(places, unflipped).numpy()
    return [Example(test.task, test.cache, int(test.rows[i]), true[i], predicted[i]) for i in places]
