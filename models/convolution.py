"""Building blocks of LDM's convolutional encoder and decoder.

Module names follow the official state dict, so that its files load without renaming.
Legend: B batch, C channels, h w grid.
Source: official ldm/modules/diffusionmodules/model.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend, fastest_kernel

GROUPS = 32  # of every GroupNorm; widths are multiples of it


def group_norm(channels: int) -> nn.GroupNorm:
    """Return the normalisation of all blocks."""
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResBlock(nn.Module):
    """GN-SiLU-conv, GN-SiLU-dropout-conv, plus a 1x1 shortcut where widths differ: (B,in,h,w) → (B,out,h,w)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.has_shortcut = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        skip = self.nin_shortcut(x) if self.has_shortcut else x
        return skip + h


class AttnBlock(nn.Module):
    """Single-head attention over the grid, residual: (B,C,h,w) → (B,C,h,w)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.kernel = fastest_kernel()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        normed = self.norm(x)
        q, k, v = (f(normed).flatten(2).transpose(1, 2).unsqueeze(1).contiguous() for f in (self.q, self.k, self.v))
        mixed = attend(q, k, v, self.kernel).squeeze(1).transpose(1, 2).reshape(b, c, h, w)
        return x + self.proj_out(mixed)


class Level(nn.Module):
    """The blocks of one resolution, each followed by attention if that is asked for: (B,in,h,w) → (B,out,h,w)."""

    def __init__(self, widths: Sequence[int], *, attention: bool, dropout: float = 0.0) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResBlock(a, b, dropout) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in pairs if attention)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution: (B,C,h,w) → (B,C,h,w)."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


def require_groups(name: str, widths: Sequence[int]) -> None:
    """Check the widths of a network.

    Raises:
        ValueError: a width is no multiple of GroupNorm's 32 groups.
    """
    bad = [width for width in widths if width % GROUPS]
    if bad:
        raise ValueError(f"{name}: expected widths that are multiples of {GROUPS}, found {bad}")
