"""What all autoencoders (tokenizers) have in common: images to un-normalised latents, and back.

Legend: B batch, C latent channels, h w grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from .convert import require_fit
from .decoder import Decoder
from .vit_decoder import ViTDecoder


class LatentDecoder(nn.Module):
    """Decodes latents. `trained_state` holds its part of the weights of an autoencoder, under their names there."""

    FROZEN_PREFIX = ""  # of the weights that are not trained; empty: all are trained
    decoder: Decoder | ViTDecoder

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last layer, where the adaptive weight of the discriminator is measured."""
        return self.decoder.last_layer

    def decode(self, latents: Tensor) -> Tensor:
        """(B,C,h,w) un-normalised → (B,3,H,W), nominally in [-1,1]; not clamped."""
        return self.decoder(latents)

    def trained_state(self) -> dict[str, Tensor]:
        """Return the state without frozen weights."""
        frozen = self.FROZEN_PREFIX
        return {k: v for k, v in self.state_dict().items() if not (frozen and k.startswith(frozen))}

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Strictly load `trained_state`. Raises ValueError naming keys or shapes that do not fit."""
        require_fit("autoencoder", self.trained_state(), state)
        self.load_state_dict(state, strict=False)  # strictness was checked above; frozen weights are not in `state`


class DecoderAlone(LatentDecoder):
    """The decoding part of an autoencoder of any kind."""

    def __init__(self, decoder: Decoder | ViTDecoder, post_quant_conv: nn.Conv2d | None = None) -> None:
        """Build the module. `post_quant_conv` (C to the decoder's channels, 1x1): of a KL autoencoder."""
        super().__init__()
        self.decoder, self.post_quant_conv = decoder, post_quant_conv

    def decode(self, latents: Tensor) -> Tensor:
        return self.decoder(latents if self.post_quant_conv is None else self.post_quant_conv(latents))


class Autoencoder(LatentDecoder, ABC):
    """Encodes images and decodes latents. A cache stores points, or means and deviations of posteriors."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of a latent."""

    @property
    def can_encode(self) -> bool:
        """Whether everything that `encode` needs is trained or measured."""
        return True

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """(B,3,H,W) in [0,1] → what a cache stores: (B,C,h,w), or (B,2C,h,w) means and standard deviations."""

    def latents(self, stored: Tensor) -> Tensor:
        """Return the latents (B,C,h,w) of the result of `encode`; of a posterior its mean."""
        return stored[:, : self.channels]
