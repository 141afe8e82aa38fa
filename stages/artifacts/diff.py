"""`svgpipe diff`: how much the features of the same images differ between two caches."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.errors import MismatchError
from svgpipe.manifests.manifest import FrozenModel, differing_fields
from svgpipe.manifests.selection import choose_evenly

from ..runtime.progress import Progress, Silent

BLOCK_ROWS = 64
COSINE_EDGES = np.asarray([-1.0, 0.0, 0.5, 0.9, 0.99, 0.999, 0.9999, 0.99999, 1.0 + 1e-9])
DIFFERENCE_EDGES = np.asarray([0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0, np.inf])


class GroupDifference(FrozenModel):
    """Differences of one group of channels, in standard deviations of the first cache's channels."""

    name: str
    cosine_counts: list[int] = Field(description="Vectors per interval of cosine_edges.")
    difference_counts: list[int] = Field(description="Rows per interval of difference_edges, by largest difference.")
    smallest_cosine: float
    mean_cosine: float
    largest_difference: float
    largest_at: tuple[int, str] = Field(description="Row and view.")


class CacheDifference(FrozenModel):
    """Differences between two caches."""

    rows: int
    views: list[str]
    groups: list[GroupDifference]
    labels_differ: int
    validity_differs: int
    fields: list[str] = Field(description="Differing fields of config and inputs, with both values.")
    cosine_edges: list[float] = COSINE_EDGES.tolist()
    difference_edges: list[float] = Field(DIFFERENCE_EDGES[:-1].tolist(), description="The last interval is open.")


def diff(
    one: FeatureCache, two: FeatureCache, *, rows: int | None = 4096, progress: Progress | None = None
) -> CacheDifference:
    """Compare evenly spread rows (None: all) that are valid in both caches, in all common views.

    Features are denormalised first, because two caches may have different statistics.

    Returns:
        Histograms of the differences.

    Raises:
        MismatchError: other numbers of samples, other feature shapes, or no common view.
    """
    progress = progress or Silent()
    a, b = one.manifest, two.manifest
    views = [view for view in one.views if view in two.views]
    if (a.num_samples, a.feature_shape) != (b.num_samples, b.feature_shape) or not views:
        raise MismatchError(
            f"{one.path} holds {a.num_samples} samples of {a.feature_shape}, views {a.views}; {two.path} holds "
            f"{b.num_samples} of {b.feature_shape}, views {b.views}. Give two caches of the same images and grid."
        )
    usable = np.flatnonzero(one.valid & two.valid)
    chosen = choose_evenly(usable.tolist(), rows)
    groups = dict(a.channel_groups)
    if a.distribution == "gaussian":
        groups["deviation"] = slice(a.latent_shape[2], a.feature_shape[2])
    tallies = [_Tally(name) for name in groups]
    progress.begin("diff", len(chosen) * len(views), "images")
    for view in views:
        for start in range(0, len(chosen), BLOCK_ROWS):
            block = chosen[start : start + BLOCK_ROWS]
            x, y = (cache.denormalize(cache.read(block, view)) for cache in (one, two))
            for tally, group in zip(tallies, groups.values(), strict=True):
                tally.add(x[..., group], y[..., group], one.channel_std[group], block, view)
            progress.advance(len(block))
    return CacheDifference(
        rows=len(chosen),
        views=views,
        groups=[tally.result() for tally in tallies],
        labels_differ=int((one.labels != two.labels).sum()),
        validity_differs=int((one.valid != two.valid).sum()),
        fields=differing_fields(
            a.as_input(one.path).identity() | {"content": a.content},
            b.as_input(two.path).identity() | {"content": b.content},
        ),
    )


class _Tally:
    """Counts of one group of channels."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.cosines = np.zeros(len(COSINE_EDGES) - 1, np.int64)
        self.differences = np.zeros(len(DIFFERENCE_EDGES) - 1, np.int64)
        self.total, self.smallest, self.largest, self.at = 0.0, 1.0, 0.0, (-1, "")

    def add(
        self,
        x: NDArray[np.float32],
        y: NDArray[np.float32],
        std: NDArray[np.float32],
        rows: list[int],
        view: str,
    ) -> None:
        """(n,row,column,C) features of `rows` in both caches."""
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        cosine = np.clip((x * y).sum(axis=-1) / np.maximum(norms, 1e-12), -1, 1)
        largest = (np.abs(x - y) / std).max(axis=(1, 2, 3))
        self.cosines += np.histogram(cosine, COSINE_EDGES)[0]
        self.differences += np.histogram(largest, DIFFERENCE_EDGES)[0]
        self.total += float(cosine.sum(dtype=np.float64))
        self.smallest = min(self.smallest, float(cosine.min()))
        if largest.max() >= self.largest:
            self.largest, self.at = float(largest.max()), (rows[int(largest.argmax())], view)

    def result(self) -> GroupDifference:
        """Return the counts so far."""
        count = max(1, int(self.cosines.sum()))
        return GroupDifference(
            name=self.name,
            cosine_counts=self.cosines.tolist(),
            difference_counts=self.differences.tolist(),
            smallest_cosine=self.smallest,
            mean_cosine=self.total / count,
            largest_difference=self.largest,
            largest_at=self.at,
        )
