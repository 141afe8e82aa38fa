"""Representation alignment: tokens inside the diffusion model are drawn towards features of a vision model.

Legend: B batch, N tokens (rows × columns, row-major), D width of the model, Z channels of the features.
Source: official REPA loss.py and models/sit.py; arXiv 2410.06940 (REPA), 2512.10794 (iREPA).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class MLPProjector(nn.Sequential):
    """Three linear layers with SiLU, token by token: (B,N,D) → (B,N,Z). Source: official REPA build_mlp."""

    def __init__(self, width: int, hidden: int, channels: int) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, channels)
        )
        for layer in self:
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)


class ConvProjector(nn.Module):
    """A 3x3 convolution over the tokens' grid: (B,N,D) → (B,N,Z). Source: iREPA."""

    def __init__(self, width: int, channels: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.conv = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B,N,D) → (B,N,Z)."""
        maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *self.grid)
        return self.conv(maps).flatten(2).transpose(1, 2)


def spatial_zscore(features: Tensor) -> Tensor:
    """(B,N,Z) → the same with mean 0 and std 1 over the tokens, per sample and channel. Source: iREPA."""
    centred = features - features.mean(dim=1, keepdim=True)
    return centred / (features.std(dim=1, keepdim=True) + 1e-6)


def representation_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Return (B,) minus the cosine of projected tokens and features (B,N,Z), averaged over the tokens."""
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1, eps=1e-12).mean(dim=1)
