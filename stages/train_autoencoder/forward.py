"""The forward pass of a training step, by kind of autoencoder, and its random values.

Legend: B images of this process, C latent channels, F feature channels, h w grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from svgpipe.models.autoencoder import DecoderAlone
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


def decoder_noise(
    seed: int, step: int, positions: Sequence[int], shape: tuple[int, int, int], tau: float, device: torch.device
) -> Tensor:
    """Return (B,C,h,w) `scaled_noise` of images of shape (C,h,w), a function of (seed, step, position).

    It has by far the most random values of a step, and is drawn on the device: the same for all CPUs, and the same for
    all GPUs.
    """
    uniform = torch.cat([torch.rand(1, generator=generator(seed, "deviation", step, place)) for place in positions])
    normal = torch.empty(len(positions), *shape, device=device)
    on_device = torch.Generator(device)
    for row, place in enumerate(positions):
        normal[row].normal_(generator=on_device.manual_seed(seed_of(seed, "noise", step, place)))
    return scaled_noise(to_device(uniform, device), normal, tau)


def posterior_noise(seed: int, step: int, positions: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Return (B,C,h,w) standard normal noise of posteriors of shape (C,h,w), a function of (seed, step, position)."""
    return torch.stack([torch.randn(shape, generator=generator(seed, "image", step, place)) for place in positions])


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

        Returns:
            (B,) uniform draws in [0, 1) that decide the masking; and, if wanted, (B,C,h,w) noise of the decoder's
            input.
        """
        masking = torch.cat([torch.rand(1, generator=generator(seed, "image", step, place)) for place in positions])
        if self.noise is None:
            return (masking,)
        device, side = self.model.mask_token.device, self.model.backbone.grid
        shape = (self.model.channels, side, side)
        return masking, decoder_noise(seed, step, positions, shape, self.noise, device)

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
        """Return the `posterior_noise` of the images."""
        side = image_size // self.model.encoder.factor
        return (posterior_noise(seed, step, positions, (self.model.channels, side, side)),)

    def forward(self, images: Tensor, draws: Tensor) -> Forward:
        posterior = self.model.posterior(images)
        latents = posterior.draw(draws)
        projected = None if self.projection is None else self.projection(latents)
        return Forward(self.model.decode(latents).float(), posterior, projected)


class CachedForward(nn.Module):
    """Decodes stored values of a cache; latents of a posterior are drawn from it. V values per cell are stored."""

    factor: Tensor
    offset: Tensor

    def __init__(
        self,
        model: DecoderAlone,
        shape: tuple[int, int, int],
        scaling: tuple[Tensor, Tensor],
        noise: float | None,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        """Build the module.

        Args:
            model: decoder.
            shape: (V,h,w) of stored values; V is 2C for posteriors.
            scaling: (V,) factor and offset of stored values: un-normalised value = stored · factor + offset.
            noise: largest deviation of the noise on the decoder's input; None for posteriors.
            total: adds up what each process of a group has.
        """
        super().__init__()
        self.model, self.shape, self.noise, self.total = model, shape, noise, total
        for name, values in zip(("factor", "offset"), scaling, strict=True):
            self.register_buffer(name, values.view(-1, 1, 1), persistent=False)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        first = self.model.post_quant_conv or self.model.decoder
        return first.in_channels

    @property
    def from_posterior(self) -> bool:
        """Whether means and deviations are stored."""
        return self.channels != self.shape[0]

    def draws(self, seed: int, step: int, positions: Sequence[int], image_size: int) -> tuple[Tensor, ...]:
        """Return noise (B,C,h,w): of the posteriors, or of the decoder's input; none if neither is wanted."""
        shape = (self.channels, *self.shape[1:])
        if self.from_posterior:
            return (posterior_noise(seed, step, positions, shape),)
        if self.noise is None:
            return ()
        return (decoder_noise(seed, step, positions, shape, self.noise, self.factor.device),)

    def forward(self, stored: Tensor, noise: Tensor | None = None) -> Forward:
        """Return the decoded stored values (B,V,h,w), float16 or int8, with noise of `draws`."""
        latents = stored.float() * self.factor + self.offset
        if noise is not None and self.from_posterior:
            mean, std = latents.chunk(2, dim=1)
            latents = mean + std * noise
        elif noise is not None:
            latents = with_noise(latents, noise, self.total)
        return Forward(self.model.decode(latents).float())
