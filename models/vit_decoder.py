"""RAE's decoder, a vision transformer. Its tokens are the cells of the latent; each becomes a patch of the image.

Legend: B batch, C latent channels, h w grid, N = h w tokens, D width, p pixels per side of a patch.
Source: official RAE (arXiv 2510.11690), src/stage1/decoders/decoder.py (GeneralDecoder).
"""

from __future__ import annotations

from functools import partial

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .positions import sincos_position_table
from .residual import IMAGENET_MEAN, IMAGENET_STD

EPS = 1e-12  # of all its layer norms


class ViTDecoder(nn.Module):
    """(B,C,h,w) un-normalised → (B,3,h*p,w*p), nominally in [-1,1].

    A learned class token without position runs along and is dropped. The output is an image normalised as ImageNet.
    """

    pos_embed: Tensor
    imagenet_mean: Tensor
    imagenet_std: Tensor

    def __init__(
        self, *, z_channels: int, grid: int, patch: int, width: int, depth: int, heads: int, mlp_width: int
    ) -> None:
        """Build the module.

        Args:
            z_channels: C.
            grid: rows and columns of the latent.
            patch: p.
            width: D.
            depth: number of blocks.
            heads: attention heads.
            mlp_width: hidden width of the MLPs.

        Raises:
            ValueError: `heads` does not divide the width, or 4 does not.
        """
        super().__init__()
        if width % heads or width % 4:
            raise ValueError(f"decoder.vit: width: expected a multiple of heads {heads} and of 4, found {width}")
        self.in_channels, self.grid, self.factor = z_channels, grid, patch
        self.embed = nn.Linear(z_channels, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.register_buffer("pos_embed", sincos_position_table(width, grid, grid))
        block = partial(Block, width, heads, mlp_ratio=(mlp_width + 0.5) / width, qkv_bias=True)
        self.blocks = nn.ModuleList(block(norm_layer=partial(nn.LayerNorm, eps=EPS)) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.pred = nn.Linear(width, patch**2 * 3)
        for name, values in (("imagenet_mean", IMAGENET_MEAN), ("imagenet_std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last layer."""
        return self.pred.weight

    def forward(self, z: Tensor) -> Tensor:
        """(B,C,h,w) → (B,3,h*p,w*p).

        Raises:
            ValueError: another number of channels, or another grid.
        """
        expected = (self.in_channels, self.grid, self.grid)
        if z.shape[1:] != expected:
            raise ValueError(f"decoder: expected latents of {expected}, found {tuple(z.shape[1:])}")
        x = self.embed(z.flatten(2).transpose(1, 2)) + self.pos_embed
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        patches = self.pred(self.norm(x))[:, 1:].unflatten(2, (self.factor, self.factor, 3))
        image = patches.unflatten(1, (self.grid, self.grid)).permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
        return (image * self.imagenet_std + self.imagenet_mean) * 2 - 1
