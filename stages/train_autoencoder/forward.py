"""The forward pass of a training step, by kind of autoencoder, and its random values.

Legend: B images of this process, C latent channels, F feature channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svgpipe.models.decoder_noise import scaled_noise, with_noise
from svgpipe.models.kl_autoencoder import KLAutoencoder, Posterior
from svgpipe.models.residual import itself
from svgpipe.models.seeds import generator, seed_of
from svgpipe.models.svg_autoencoder import SVGAutoencoder

from ..runtime.device import to_device


@dataclass(frozen=True)
class Forward:
    """Result of a forward pass.

    Attributes:
        reconstruction: (B,3,H,W) float32.
        posterior: of a KL autoencoder.
        projected: (B,F,h,w) latents projected to the width of the vision model, if they are trained towards it.
    """

    reconstruction: Tensor
    posterior: Posterior | None = None
    projected: Tensor | None = None


class SVGForward(nn.Module):
    """Encodes, masks and decodes in one forward pass, so that DDP averages its gradients."""

    def __init__(
        self, model: SVGAutoencoder, noise: float | None = None, total: Callable[[Tensor], Tensor] = itself
    ) -> None:
        """Build the module.

        Args:
            model: autoencoder.
            noise: largest deviation of the noise on the decoder's input.
            total: adds up what each process of a group has.
        """
        super().__init__()
        self.model, self.noise, self.total = model, noise, total

    def draws(self, seed: int, step: int, positions: Sequence[int], image_size: int) -> tuple[Tensor, ...]:
        """Return random values of the images, a function of (seed, step, position).

        The noise, by far the most values, is drawn on the device: the same for all CPUs, and the same for all GPUs.

        Returns:
            (B,) uniform draws in [0, 1) that decide the masking; and, if wanted, (B,C,h,w) noise of the decoder's
            input.
        """
        masking = torch.cat([torch.rand(1, generator=generator(seed, "image", step, place)) for place in positions])
        if self.noise is None:
            return (masking,)
        device, side = self.model.mask_token.device, self.model.backbone.grid
        uniform = torch.cat([torch.rand(1, generator=generator(seed, "deviation", step, place)) for place in positions])
        normal = torch.empty(len(positions), self.model.channels, side, side, device=device)
        on_device = torch.Generator(device)
        for row, place in enumerate(positions):
            normal[row].normal_(generator=on_device.manual_seed(seed_of(seed, "noise", step, place)))
        return masking, scaled_noise(to_device(uniform, device), normal, self.noise)

    def forward(self, images: Tensor, draws: Tensor, noise: Tensor | None = None) -> Forward:
        latents = self.model.encode(images, draws)
        if noise is not None:
            latents = with_noise(latents, noise, self.total)
        return Forward(self.model.decode(latents).float())


class KLForward(nn.Module):
    """Encodes, draws latents from the posterior and decodes them; `projection` leads to the vision model's width."""

    def __init__(self, model: KLAutoencoder, projection: nn.Conv2d | None) -> None:
        super().__init__()
        self.model, self.projection = model, projection

    def draws(self, seed: int, step: int, positions: Sequence[int], image_size: int) -> tuple[Tensor]:
        """Return (B,C,h,w) standard normal noise of the posterior; a function of (seed, step, position)."""
        side = image_size // self.model.encoder.factor
        shape = (self.model.channels, side, side)
        return (torch.stack([torch.randn(shape, generator=generator(seed, "image", step, p)) for p in positions]),)

    def forward(self, images: Tensor, draws: Tensor) -> Forward:
        posterior = self.model.posterior(images)
        latents = posterior.draw(draws)
        projected = None if self.projection is None else self.projection(latents)
        return Forward(self.model.decode(latents).float(), posterior, projected)
