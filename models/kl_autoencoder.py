"""The KL autoencoder of latent diffusion: convolutional encoder → normal distribution of latents → decoder.

SD-VAE and VA-VAE are of this kind. Module names follow the official state dict of LDM.
Legend: B batch, C latent channels, h w grid.
Source: official ldm/models/autoencoder.py, ldm/modules/distributions/distributions.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .decoder import Decoder
from .encoder import Encoder

LOG_VARIANCE = (-30.0, 20.0)


@dataclass(frozen=True)
class Posterior:
    """A normal distribution per latent value: mean and log variance, (B,C,h,w) float32."""

    mean: Tensor
    log_variance: Tensor

    @classmethod
    def of(cls, moments: Tensor) -> Posterior:
        """(B,2C,h,w) → mean, and the log variance clamped to [-30, 20]."""
        mean, log_variance = moments.float().chunk(2, dim=1)
        return cls(mean, log_variance.clamp(*LOG_VARIANCE))

    @property
    def std(self) -> Tensor:
        """Standard deviation, (B,C,h,w)."""
        return torch.exp(0.5 * self.log_variance)

    def draw(self, noise: Tensor) -> Tensor:
        """Return mean + std · noise, noise being standard normal, (B,C,h,w)."""
        return self.mean + self.std * noise

    def divergence(self) -> Tensor:
        """Return (B,) the KL divergence from the standard normal distribution, in nats, summed over C, h, w."""
        terms = self.mean.square() + self.log_variance.exp() - 1 - self.log_variance
        return 0.5 * terms.flatten(1).sum(dim=1)


class KLAutoencoder(Autoencoder):
    """Encode images to the posterior of their latents, and decode latents. Every weight is trained."""

    def __init__(self, encoder: Encoder, decoder: Decoder, channels: int) -> None:
        """Build the module.

        Args:
            encoder: convolutional encoder.
            decoder: convolutional decoder of the same stride.
            channels: C, of a latent; 1x1 convolutions lead from the encoder's channels to C and back.

        Raises:
            ValueError: encoder and decoder have other strides.
        """
        super().__init__()
        if encoder.factor != decoder.factor:
            raise ValueError(f"the encoder has stride {encoder.factor}, the decoder {decoder.factor}")
        self.encoder, self.decoder = encoder, decoder
        self.quant_conv = nn.Conv2d(encoder.conv_out.out_channels, 2 * channels, 1)
        self.post_quant_conv = nn.Conv2d(channels, decoder.in_channels, 1)

    @property
    def channels(self) -> int:
        """Channels of a latent."""
        return self.post_quant_conv.in_channels

    def posterior(self, images: Tensor) -> Posterior:
        """(B,3,H,W) in [0,1] → the distribution of the latents. Raises ValueError for sides that do not divide."""
        return Posterior.of(self.quant_conv(self.encoder(images * 2 - 1)))

    def encode(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] → (B,2C,h,w) float32: means, then standard deviations. Raises as `posterior`."""
        posterior = self.posterior(images)
        return torch.cat([posterior.mean, posterior.std], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """(B,C,h,w) without factor → (B,3,H,W), nominally in [-1,1]; not clamped."""
        return self.decoder(self.post_quant_conv(latents))
