"""The actor of an extraction: pixels of a unit → its features, with the device never idle between batches."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.precision import Precision
from svgpipe.manifests.storage import Location

from ..images.decode import RGBArray
from ..networks.autoencoder import load_autoencoder
from ..runtime.device import autocast
from ..runtime.runner import Row, start_worker
from .timings import Stopwatch


class EncodeUnits:
    """Actor: pixels → features of every view; normalised float16 where statistics are given, else float32.

    Ray calls it for one unit at a time, while it hands the one before on and fetches the one after.
    """

    def __init__(
        self,
        autoencoder: Location,
        batch_size: int,
        precision: Precision,
        compiled: bool,
        threads: int,
        mean: NDArray[np.float32] | None = None,
        std: NDArray[np.float32] | None = None,
        views: tuple[str, ...] = ("original",),
        aligned: bool = True,
    ) -> None:
        self.device = start_worker(threads)
        model, _ = load_autoencoder(autoencoder)
        if not aligned:  # to measure what the alignment will be
            model.alignment = None
        self.model = model.to(self.device)
        self.run = torch.compile(self.model.encode) if compiled else self.model.encode
        self.batch_size, self.precision, self.views, self.threads = batch_size, precision, views, threads
        self.mean, self.std = (None if v is None else torch.from_numpy(v).to(self.device) for v in (mean, std))
        self._idle_since: float | None = None

    @torch.inference_mode()
    def encode(self, pixels: RGBArray) -> NDArray[Any]:
        """(n,S,S,3) uint8 → (n,view,row,column,channel) float16 normalised, or float32 as encoded."""
        found: list[Tensor] = []
        for images in self._batches(pixels):
            per_view = [self._features(images.flip(-1) if view == "flip" else images) for view in self.views]
            found.append(self._to_host(torch.stack(per_view, dim=1)))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return torch.cat(found)[: len(pixels)].numpy()

    def _features(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.precision):
            features = self.run(images)
        features = features.float().permute(0, 2, 3, 1)
        if self.mean is None or self.std is None:
            return features
        return ((features - self.mean) / self.std).half()

    def _batches(self, pixels: RGBArray) -> Iterator[Tensor]:
        """(batch_size,3,S,S) float32 in [0,1] on the device, the next one on its way while this one is encoded.

        A short last batch is filled up, so that every image meets the same kernels in any batch.
        """
        starts = range(0, len(pixels), self.batch_size)
        if self.device.type != "cuda":
            yield from (_as_images(self._filled(pixels[s : s + self.batch_size])) for s in starts)
            return
        stream = torch.cuda.Stream(self.device)
        coming: Tensor | None = None
        for start in [*starts, None]:
            ready, coming = coming, None
            if ready is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)
                ready.record_stream(torch.cuda.current_stream(self.device))
            if start is not None:
                pinned = self._filled(pixels[start : start + self.batch_size]).pin_memory()
                with torch.cuda.stream(stream):
                    coming = pinned.to(self.device, non_blocking=True)
            if ready is not None:
                yield _as_images(ready)

    def _filled(self, pixels: RGBArray) -> Tensor:
        batch = torch.zeros((self.batch_size, *pixels.shape[1:]), dtype=torch.uint8)
        batch[: len(pixels)] = torch.from_numpy(np.array(pixels))
        return batch

    def _to_host(self, features: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return features
        return torch.empty(features.shape, dtype=features.dtype, pin_memory=True).copy_(features, non_blocking=True)

    def __call__(self, row: Row) -> Row:
        watch = Stopwatch("encoder")
        # Ray calls from several threads, and torch keeps the number of compute threads per calling thread.
        if self.device.type == "cpu":
            torch.set_num_threads(self.threads)
        if self._idle_since is not None:
            watch.seconds["wait"] = time.perf_counter() - self._idle_since
        with watch.phase("encode"):
            values = self._checked(row, self.encode(row["pixels"]))
        self._idle_since = time.perf_counter()
        timings = [*json.loads(row["timings"]), watch.entry()]
        return {"unit": row["unit"], "features": values, "rejects": row["rejects"], "timings": json.dumps(timings)}

    def _checked(self, row: Row, values: NDArray[Any]) -> NDArray[Any]:
        """Rejected rows zeroed. Raises ArtifactError for a feature that is not finite."""
        values[[reject["row"] for reject in json.loads(row["rejects"])]] = 0
        bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
        if bad.size:
            raise ArtifactError(
                f"unit {row['unit']}: row {bad[0]} of it: a feature is not a finite float16 number. "
                "Extract with --set extract.precision=float32, or check the autoencoder."
            )
        return values


def _as_images(pixels: Tensor) -> Tensor:
    return pixels.permute(0, 3, 1, 2).float() / 255
