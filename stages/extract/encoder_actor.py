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
from svgpipe.models.svg_autoencoder import SVGAutoencoder

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
    residual_only: bool = False  # True: the vision features come with the pixels; mean and std are of the residual


class EncodeUnits:
    """Encodes pixels to features of every view: float16 normalised with given statistics, float32 without."""

    def __init__(self, device: torch.device, options: EncoderOptions) -> None:
        self.device, self.options = device, options
        model, _ = load_autoencoder(options.autoencoder)
        if not options.aligned and isinstance(model, SVGAutoencoder):
            model.alignment = None
        self.model = model.to(device)
        encode = self.model.encode
        if options.residual_only and isinstance(model, SVGAutoencoder):
            # Their dtype is not that of `encode` if the vision model's is float32, but the values are the same.
            encode = model.encode_residual
        self.run = torch.compile(encode) if options.compiled else encode
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
        features = torch.empty(0)
        for start, images in self._batches(pixels):
            per_view = [self._features(images.flip(-1) if view == "flip" else images) for view in self.options.views]
            batch = torch.stack(per_view, dim=1)
            if start == 0:
                features = self._host_memory((len(pixels), *batch.shape[1:]), batch.dtype)
            rows = features[start : start + len(batch)]
            rows.copy_(batch[: len(rows)], non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return features.numpy()

    def _features(self, images: Tensor) -> Tensor:
        with autocast(self.device, self.options.precision):
            features = self.run(images)
        features = features.float().permute(0, 2, 3, 1)
        if self.mean is None or self.std is None:
            return features
        return ((features - self.mean) / self.std).half()

    def _batches(self, pixels: RGBArray) -> Iterator[tuple[int, Tensor]]:
        """Yield the first row and (batch_size,3,S,S) float32 in [0,1] on the device.

        On CUDA the next batch is copied while this one is encoded. A short last batch is filled up, so that every image
        is computed by the same kernels.
        """
        starts = range(0, len(pixels), self.options.batch_size)
        if self.device.type != "cuda":
            yield from ((start, as_unit_range(self._filled(pixels, start))) for start in starts)
            return
        stream = torch.cuda.Stream(self.device)
        coming: tuple[int, Tensor] | None = None
        for start in [*starts, None]:
            ready, coming = coming, None
            if ready is not None:
                torch.cuda.current_stream(self.device).wait_stream(stream)
                ready[1].record_stream(torch.cuda.current_stream(self.device))
            if start is not None:
                filled = self._filled(pixels, start)
                with torch.cuda.stream(stream):
                    coming = start, filled.to(self.device, non_blocking=True)
            if ready is not None:
                yield ready[0], as_unit_range(ready[1])

    def _filled(self, pixels: RGBArray, start: int) -> Tensor:
        """Return the batch that begins at `start`, in host memory, with zeros after the last image."""
        images = pixels[start : start + self.options.batch_size]
        batch = self._host_memory((self.options.batch_size, *pixels.shape[1:]), torch.uint8)
        batch.numpy()[: len(images)] = images
        batch[len(images) :] = 0
        return batch

    def _host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return an empty tensor. For CUDA it is pinned; PyTorch reuses pinned memory, which is slow to allocate."""
        return torch.empty(shape, dtype=dtype, pin_memory=self.device.type == "cuda")

    def __call__(self, unit: UnitPixels) -> UnitFeatures:
        watch = Stopwatch("encoder")
        if self._idle_since is not None:
            watch.seconds["wait"] = time.perf_counter() - self._idle_since
        with watch.phase("encode"):
            features = self._checked(unit, self._values(unit))
        self._idle_since = time.perf_counter()
        return UnitFeatures(unit.unit, features, unit.rejects, (*unit.timings, watch.timing()))

    def _values(self, unit: UnitPixels) -> NDArray[Any]:
        """Return the features of a unit, whose vision features may be there already."""
        if unit.vision is None:
            return self.encode(unit.pixels)
        if isinstance(self.model, SVGAutoencoder) and self.model.residual is None:
            return unit.vision.copy()  # Ray gives read-only arrays
        return np.concatenate([unit.vision, self.encode(unit.pixels)], axis=-1)

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
                "Extract with --set extract.precision=float32, or check extract.factor and the autoencoder."
            )
        return values
