"""The worker of an extraction: encodes the pixels of a unit. Transfers overlap with computation."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.precision import Precision

from ..images.decode import RGBArray
from ..images.tensors import as_unit_range
from ..networks.autoencoder import load_autoencoder
from ..runtime.device import autocast
from .cpu_tasks import UnitFeatures, UnitPixels
from .timings import Stopwatch


@dataclass(frozen=True)
class EncoderOptions:
    """Options of an encoder. Without `mean` and `std` (C,), features are not normalised."""

    autoencoder: Location
    batch_size: int
    precision: Precision
    compiled: bool = False
    mean: NDArray[np.float32] | None = None
    std: NDArray[np.float32] | None = None
    views: tuple[str, ...] = ("original",)
    aligned: bool = True  # False: to measure the alignment


class EncodeUnits:
    """Encodes pixels to features of every view: float16 normalised with given statistics, float32 without."""

    def __init__(self, device: torch.device, options: EncoderOptions) -> None:
        self.device, self.options = device, options
        model, _ = load_autoencoder(options.autoencoder)
        if not options.aligned:
            model.alignment = None
        self.model = model.to(device)
        self.run = torch.compile(self.model.encode) if options.compiled else self.model.encode
        self.mean, self.std = (
            None if v is None else torch.from_numpy(v).to(device) for v in (options.mean, options.std)
        )
        self._idle_since: float | None = None

    @torch.inference_mode()
    def encode(self, pixels: RGBArray) -> NDArray[Any]:
        """(n,S,S,3) uint8 → (n,view,row,column,channel), float16 normalised, or float32 as encoded.

        Returns:
            The features.
        """
        parts: list[Tensor] = []
        for images in self._batches(pixels):
            per_view = [self._features(images.flip(-1) if view == "flip" else images) for view in self.options.views]
            parts.append(self._to_host(torch.stack(per_view, dim=1)))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return torch.cat(parts)[: len(pixels)].numpy()

    def _features(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.options.precision):
            features = self.run(images)
        features = features.float().permute(0, 2, 3, 1)
        if self.mean is None or self.std is None:
            return features
        return ((features - self.mean) / self.std).half()

    def _batches(self, pixels: RGBArray) -> Iterator[Tensor]:
        """Yield (batch_size,3,S,S) float32 in [0,1] on the device; the next batch is copied while this one is encoded.

        A short last batch is filled up, so that every image is computed by the same kernels.
        """
        starts = range(0, len(pixels), self.options.batch_size)
        if self.device.type != "cuda":
            yield from (as_unit_range(self._filled(pixels[s : s + self.options.batch_size])) for s in starts)
            return
        stream = torch.cuda.Stream(self.device)
        coming: Tensor | None = None
        for start in [*starts, None]:
            ready, coming = coming, None
            if ready is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)
                ready.record_stream(torch.cuda.current_stream(self.device))
            if start is not None:
                pinned = self._filled(pixels[start : start + self.options.batch_size]).pin_memory()
                with torch.cuda.stream(stream):
                    coming = pinned.to(self.device, non_blocking=True)
            if ready is not None:
                yield as_unit_range(ready)

    def _filled(self, pixels: RGBArray) -> Tensor:
        batch = torch.zeros((self.options.batch_size, *pixels.shape[1:]), dtype=torch.uint8)
        batch[: len(pixels)] = torch.from_numpy(np.array(pixels))
        return batch

    def _to_host(self, features: Tensor) -> Tensor:
        if self.device.type != "cuda":
            return features
        return torch.empty(features.shape, dtype=features.dtype, pin_memory=True).copy_(features, non_blocking=True)

    def __call__(self, unit: UnitPixels) -> UnitFeatures:
        watch = Stopwatch("encoder")
        if self._idle_since is not None:
            watch.seconds["wait"] = time.perf_counter() - self._idle_since
        with watch.phase("encode"):
            features = self._checked(unit, self.encode(unit.pixels))
        self._idle_since = time.perf_counter()
        return UnitFeatures(unit.unit, features, unit.rejects, (*unit.timings, watch.timing()))

    def _checked(self, unit: UnitPixels, values: NDArray[Any]) -> NDArray[Any]:
        """Return the values with rejected rows set to zero.

        Raises:
            ArtifactError: a feature is not finite.
        """
        values[[reject.row for reject in unit.rejects]] = 0
        bad = np.flatnonzero(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
        if bad.size:
            raise ArtifactError(
                f"unit {unit.unit}: row {bad[0]} of it: a feature is not a finite float16 number. "
                "Extract with --set extract.precision=float32, or check the autoencoder."
            )
        return values
