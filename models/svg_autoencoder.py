"""The SVG autoencoder: frozen backbone + residual encoder → latent map → decoder.

Legend: B batch, F frozen channels, R residual channels, C = F + R, h w grid.
Source: official dino_decoder.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .autoencoder import Autoencoder
from .backbone import Backbone
from .decoder import Decoder
from .residual import IMAGENET_MEAN, IMAGENET_STD, Alignment, ResidualEncoder
from .vit_decoder import ViTDecoder


class SVGAutoencoder(Autoencoder):
    """Encode images to un-normalised latents and back.

    Only the residual encoder, the mask token and the decoder are trained. The backbone runs without gradients, and its
    weights are not part of `trained_state`.
    """

    FROZEN_PREFIX = "backbone."
    imagenet_mean: Tensor
    imagenet_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        decoder: Decoder | ViTDecoder,
        residual: ResidualEncoder | None,
        *,
        align: bool = True,
        mask_ratio: float = 0.1,
    ) -> None:
        """Build the module.

        Raises:
            ValueError: backbone, residual encoder and decoder do not fit each other.
        """
        super().__init__()
        self.backbone, self.decoder, self.residual = backbone, decoder, residual
        self.alignment = Alignment() if align and residual is not None else None
        self.mask_ratio = mask_ratio
        residual_channels = residual.channels if residual is not None else 0
        self.mask_token = nn.Parameter(
            0.02 * torch.randn(1, residual_channels, 1, 1), requires_grad=residual is not None
        )
        for name, values in (("imagenet_mean", IMAGENET_MEAN), ("imagenet_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        if decoder.in_channels != self.channels:
            raise ValueError(
                f"autoencoder: decoder: expected {self.channels} latent channels "
                f"({backbone.channels} frozen + {residual_channels} residual), "
                f"found {decoder.in_channels}"
            )
        if residual is not None and residual.image_size // residual.patch_size != backbone.grid:
            raise ValueError(
                f"autoencoder: residual encoder: expected the backbone's grid of {backbone.grid}, "
                f"found {residual.image_size // residual.patch_size}"
            )

    @property
    def channels(self) -> int:
        """Channels of the latent map, frozen first, residual last."""
        return self.backbone.channels + (self.residual.channels if self.residual is not None else 0)

    @property
    def can_encode(self) -> bool:
        """Whether the alignment is tracked or frozen, if there is one."""
        return self.alignment is None or bool(self.alignment.num_tracked > 0)

    def encode(self, images: Tensor, mask_draws: Tensor | None = None) -> Tensor:
        """(B,3,H,W) in [0,1] → (B,C,h,w) un-normalised.

        Args:
            images: RGB in [0,1].
            mask_draws: (B,) uniform draws. In train mode, if a draw is below `mask_ratio`, the mask token replaces the
                whole residual of that sample, before alignment. None: no masking.
        """
        with torch.no_grad():
            frozen = self.backbone(images)
        if self.residual is None:
            return frozen
        return self.join(frozen, self._residual(images), mask_draws)

    def encode_residual(self, images: Tensor) -> Tensor:
        """Encode to the residual channels of `encode` in eval mode, without the backbone: (B,3,H,W) → (B,R,h,w).

        Raises:
            ValueError: there is no residual encoder, or the model is in train mode, whose alignment needs both parts.
        """
        if self.residual is None or self.training:
            raise ValueError("expected a residual encoder in eval mode")
        residual = self._residual(images)
        return residual if self.alignment is None else self.alignment(residual, residual)

    def _residual(self, images: Tensor) -> Tensor:
        assert self.residual is not None, "checked by the caller"
        return self.residual((images - self.imagenet_mean) / self.imagenet_std)

    def encode_without_residual(self, images: Tensor) -> Tensor:
        """Encode like `encode`, with the mask token in place of every residual token, as training masks it."""
        frozen = self.backbone(images)
        token = self.mask_token.to(frozen.dtype).expand(len(frozen), -1, *frozen.shape[-2:])
        return self.join(frozen, token)

    def join(self, frozen: Tensor, residual: Tensor, mask_draws: Tensor | None = None) -> Tensor:
        """Mask, align and concatenate: (B,F,h,w), (B,R,h,w) → (B,C,h,w), residual last."""
        if self.training and mask_draws is not None:
            masked = (mask_draws < self.mask_ratio).view(-1, 1, 1, 1)
            residual = torch.where(masked, self.mask_token.to(residual.dtype), residual)
        if self.alignment is not None:
            residual = self.alignment(frozen, residual)
        return torch.cat([frozen, residual.to(frozen.dtype)], dim=1)
