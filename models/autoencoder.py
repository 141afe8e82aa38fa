"""What all autoencoders (tokenizers) have in common: images to un-normalised latents, and back.

Legend: B batch, C latent channels, h w grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from .convert import require_fit
from .decoder import Decoder


class Autoencoder(nn.Module, ABC):
    """Encodes images and decodes latents. A cache stores points, or means and deviations of posteriors."""

    FROZEN_PREFIX = ""  # of the weights that are not trained; empty: all are trained
    decoder: Decoder

    @property
    @abstractmethod
    def channels(self) -> int:
        """Channels of a latent."""

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution, where the adaptive weight of the discriminator is measured."""
        return self.decoder.conv_out.weight

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
