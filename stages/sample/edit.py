"""`svgpipe edit`: a box of an image is made anew under another class, by inversion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.model_manifests import EMA
from svgpipe.models.editing import invert, repaint, soft_mask
from svgpipe.models.guidance import GuidedVelocity
from svgpipe.models.sampler import time_grid

from ..images.decode import RejectedImageError, RGBArray, decode_image, psnr
from ..images.tensors import as_unit_range
from ..networks.autoencoder import load_autoencoder
from ..networks.sampling import SamplerSettings, initial_noise
from ..runtime.device import autocast
from ..runtime.progress import Progress, Silent
from .image_sampler import ImageSampler, open_model

Box = tuple[int, int, int, int]
"""x, y, width, height in pixels of the centre crop."""


@dataclass(frozen=True)
class Edited:
    """An edit of one image. Pictures are (S,S,3) uint8.

    Attributes:
        source: centre crop of the image.
        mask: (S,S) float32 from 0 to 1: where it is made anew.
        reconstruction: the source, encoded and decoded: what an edit can keep of it at best.
        results: (N,S,S,3), of N noises.
        outside: N numbers in dB, PSNR of the results against the source, outside of the box.
        outside_of_reconstruction: dB, the same for the reconstruction.
    """

    source: RGBArray
    mask: NDArray[np.float32]
    reconstruction: RGBArray
    results: RGBArray
    outside: list[float]
    outside_of_reconstruction: float


class ImageEditor:
    """A diffusion model and the whole autoencoder of its latents."""

    def __init__(
        self, model: str | Path | Location, autoencoder: str | Path | Location | None = None, weights: str = EMA
    ) -> None:
        """Open the models; errors: see `load`.

        Raises:
            UsageError: the autoencoder cannot encode, or the model is one of objective ddpm.
        """
        trained, place = open_model(model, autoencoder)
        if trained.objective != "flow":
            raise UsageError(f"{model}: editing needs a model of objective flow, found {trained.objective}.")
        self.autoencoder, manifest = load_autoencoder(place)
        if not self.autoencoder.can_encode:
            raise UsageError(
                f"{place}: was imported and has not been aligned, so it cannot encode an image. Extract a cache with "
                "it, or run sample-and-eval, first."
            )
        self.size = manifest.image_size
        self.sampler = ImageSampler(trained, self.autoencoder, weights)

    def edit(
        self,
        pixels: RGBArray,
        box: Box,
        label: int,
        settings: SamplerSettings,
        *,
        source_label: int | None = None,
        t_edit: float = 0.0,
        count: int = 1,
        progress: Progress | None = None,
    ) -> Edited:
        """Make the box of an image (S,S,3) anew.

        Args:
            pixels: a square of `size` pixels.
            box: where.
            label: class of the result.
            settings: steps from `t_edit` on, time shift, guidance of the result, seed.
            source_label: class of the inversion; None: the label for 'no class'.
            t_edit: the image is integrated back to this time.
            count: results, each with noise of its own.
            progress: receives the progress.

        Returns:
            The results, and what they are compared with.

        Raises:
            UsageError: the box does not lie in the image, or a setting does not go with editing.
        """
        require_box(box, self.size)
        if settings.solver != "euler":
            raise UsageError(f"evaluation.solver: editing needs euler, found {settings.solver}.")
        sampler, grid = self.sampler, time_grid(settings.steps, settings.time_shift)
        times = [*(t_edit + (1 - t_edit) * grid[:-1]).tolist(), 1.0]
        mask, latents = soft_mask(box, self.size, sampler.trained.grid), self.encode(pixels)
        shown = progress or Silent()
        shown.begin("edit", 2 * settings.steps, "steps")
        with torch.no_grad(), autocast(sampler.device, settings.precision):
            changed = self._repainted(latents, mask, label, source_label, times, settings, count, shown)
        reconstruction, *results = sampler.decode(torch.cat([latents, changed.float().cpu()]))
        drawn = F.interpolate(mask.view(1, 1, *sampler.trained.grid), self.size, mode="nearest")[0, 0]
        outside = [psnr_outside(box, pixels, image) for image in (reconstruction, *results)]
        return Edited(pixels, drawn.numpy(), reconstruction, np.stack(results), outside[1:], outside[0])

    def encode(self, pixels: RGBArray) -> Tensor:
        """Return normalised latents (1,T,C); of a posterior the mean."""
        model, images = self.autoencoder, as_unit_range(pixels[None]).to(self.sampler.device)
        with torch.no_grad():
            encoded = model.latents(model.encode(images))
        cells = encoded.flatten(2).transpose(1, 2).float().cpu()
        return (cells - self.sampler.mean) / self.sampler.std

    def _repainted(
        self,
        latents: Tensor,
        mask: Tensor,
        label: int,
        source_label: int | None,
        times: Sequence[float],
        settings: SamplerSettings,
        count: int,
        progress: Progress,
    ) -> Tensor:
        sampler, model, device = self.sampler, self.sampler.model(settings), self.sampler.device
        source = model.null_label if source_label is None else source_label
        path = invert(model, latents.to(device), torch.tensor([source], device=device), times, progress.advance)
        noise = initial_noise(settings.seed, range(count), sampler.trained.cells, sampler.trained.channels)
        v_at = GuidedVelocity(
            model,
            model.null_label,
            channels=settings.guidance_channels,
            internal=model.final_and_auxiliary if settings.internal else None,
        )
        labels = torch.full((count,), label, device=device)
        return repaint(v_at, path, mask.to(device), noise.to(device), labels, times, settings.guided, progress.advance)


def read_image(path: Path) -> Image.Image:
    """Return the image in a file.

    Raises:
        UsageError: no such file, or it cannot be decoded.
    """
    if not path.is_file():
        raise UsageError(f"{path}: expected an image file, found none.")
    try:
        return decode_image(path.read_bytes())
    except RejectedImageError as error:
        raise UsageError(f"{path}: expected a JPEG, PNG or WebP image ({error}).") from error


def require_box(box: Box, size: int) -> None:
    """Check that a box lies in the image.

    Raises:
        UsageError: it does not, or it is empty or everything.
    """
    x, y, width, height = box
    if min(x, y) < 0 or min(width, height) < 1 or x + width > size or y + height > size:
        raise UsageError(
            f"--box {','.join(map(str, box))}: expected x,y,width,height inside of the centre crop, {size} x {size} "
            "pixels."
        )
    if width == height == size:
        raise UsageError("--box: covers the whole image; svgpipe sample makes whole images.")


def psnr_outside(box: Box, source: RGBArray, image: RGBArray) -> float:
    """Return the PSNR in dB of (S,S,3) against (S,S,3), over the pixels outside of a box; infinite if equal."""
    x, y, width, height = box
    outside = np.ones(source.shape[:2], bool)
    outside[y : y + height, x : x + width] = False
    return float(psnr(source[outside][None, None], image[outside][None, None])[0])
