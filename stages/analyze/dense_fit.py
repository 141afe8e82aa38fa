"""Training and testing of one head on cached features and label maps.

Legend: B n images, C channels, h w the grid, S labels per side, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.dense_section import DenseProbeSection
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.label_maps import DEPTH, SEGMENTATION, UNLABELLED, LabelMaps
from svgpipe.models.dense_heads import (
    LinearHead,
    PyramidHead,
    depth_errors,
    depth_loss,
    depth_of_bins,
    overlaps,
    upsample,
)
from svgpipe.models.seeds import generator, seed_of

from ..training.optimizer import learning_rate, set_learning_rate

IGNORED = -1
TEST_BATCH = 16


@dataclass(frozen=True)
class MappedRows:
    """Rows of a cache that have a label map.

    Attributes:
        task: segmentation or depth.
        rows: (n,) of the cache and of the maps.
    """

    cache: FeatureCache
    maps: LabelMaps
    task: str
    rows: NDArray[np.int64]

    def features(self, places: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """Return (B,C,h,w) float32 of some of the rows, normalised; flipped ones from the view of mirrored images."""
        views = np.zeros(len(places), np.int64)
        if any(flipped):
            views[np.asarray(flipped)] = self.cache.views.index("flip")
        values = self.cache.read_latents(self.rows[places], views)
        return torch.from_numpy(np.moveaxis(np.asarray(values, np.float32), 3, 1).copy())

    def labels(self, places: Sequence[int], flipped: Sequence[bool]) -> Tensor:
        """Return (B,S,S): int64 class indexes with IGNORED, or float32 metres with NaN."""
        maps = self.maps.read(self.task, self.rows[places].tolist())
        maps[np.asarray(flipped, np.bool_)] = maps[np.asarray(flipped, np.bool_)][..., ::-1]
        if self.task == DEPTH:
            return torch.from_numpy(maps)
        numbers = maps.astype(np.int64)
        return torch.from_numpy(np.where(numbers == UNLABELLED, IGNORED, numbers))

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features and labels of all rows, in order."""
        for start in range(0, len(self.rows), TEST_BATCH):
            places = range(start, min(start + TEST_BATCH, len(self.rows)))
            yield self.features(places, [False] * len(places)), self.labels(places, [False] * len(places))


class DenseHead:
    """One head, for one group of channels of one task."""

    def __init__(self, data: MappedRows, channels: slice, config: DenseProbeSection, device: torch.device) -> None:
        self.data, self.channels, self.config, self.device = data, channels, config, device
        manifest = data.maps.manifest
        self.size, self.classes, self.max_depth = manifest.size, len(manifest.classes), manifest.max_depth
        self.min_depth = float(manifest.config["min_depth"])
        outputs = self.classes if data.task == SEGMENTATION else config.bins
        width = channels.stop - channels.start
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(config.seed, "dense head", data.task))
            head = LinearHead(width, outputs) if config.head == "linear" else PyramidHead(width, outputs, config.width)
        self.head: nn.Module = head.to(device)

    def fit(self, step_done: Callable[[], None]) -> None:
        """Train the head; `step_done` is called after every step."""
        config = self.config
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        can_flip = config.use_flips and "flip" in self.data.cache.views
        for step in range(config.steps):
            drawn = generator(config.seed, "dense batch", step)  # the same images for every group of channels
            places = torch.randint(len(self.data.rows), (config.batch_size,), generator=drawn).tolist()
            coins = (torch.rand(config.batch_size, generator=drawn) < 0.5).tolist()
            flipped = [can_flip and coin for coin in coins]
            set_learning_rate(optimizer, learning_rate(step, config.steps, config.learning_rate, config.schedule))
            loss = self._loss(self._outputs(self.data.features(places, flipped)), self.data.labels(places, flipped))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step_done()

    def _outputs(self, features: Tensor) -> Tensor:
        """(B,C,h,w) → (B,K,S,S) logits, or (B,1,S,S) metres.

        Returns:
            The outputs.
        """
        outputs: Tensor = self.head(features[:, self.channels].to(self.device))
        if self.data.task == DEPTH:
            assert self.max_depth is not None
            outputs = depth_of_bins(outputs, self.min_depth, self.max_depth)
        return upsample(outputs, self.size, self.size)

    def _loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        true = labels.to(self.device)
        if self.data.task == DEPTH:
            return depth_loss(outputs[:, 0], true)
        if not (true != IGNORED).any():
            return outputs.sum() * 0
        return F.cross_entropy(outputs, true, ignore_index=IGNORED)

    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """(B,C,h,w) → (B,S,S) class indexes or metres, on the CPU.

        Returns:
            The predicted maps.

        Raises:
            ArtifactError: they are not finite.
        """
        outputs = self._outputs(features)
        if not outputs.isfinite().all():
            raise ArtifactError(
                f"{self.data.cache.path}: the head of {self.data.task} predicts values that are not finite; lower "
                "dense_probe.learning_rate."
            )
        return (outputs[:, 0] if self.data.task == DEPTH else outputs.argmax(1)).cpu()


def measures(data: MappedRows, predict: Callable[[Tensor], Tensor]) -> Tensor:
    """Return per image: (n,3,K) intersections, unions and labelled cells, or (n,3) depth errors."""
    found = []
    for features, labels in data.batches():
        if data.task == DEPTH:
            found.append(depth_errors(predict(features), labels))
        else:
            classes = len(data.maps.manifest.classes)
            found.append(overlaps(predict(features), labels, classes))
    return torch.cat(found)


def constant_prediction(data: MappedRows) -> float:
    """Return the most frequent class, or the mean depth, of the label maps: a prediction that uses no features."""
    counts, total, known = np.zeros(len(data.maps.manifest.classes), np.int64), 0.0, 0
    for start in range(0, len(data.rows), TEST_BATCH):
        places = range(start, min(start + TEST_BATCH, len(data.rows)))
        labels = data.labels(places, [False] * len(places)).numpy()
        if data.task == DEPTH:
            total, known = total + float(np.nansum(labels, dtype=np.float64)), known + int(np.isfinite(labels).sum())
        else:
            counts += np.bincount(labels[labels != IGNORED], minlength=len(counts))
    return total / max(1, known) if data.task == DEPTH else float(counts.argmax())
