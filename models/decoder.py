"""The LDM/VA-VAE decoder: un-normalised latent map → image.

Module names follow the official state dict, so that its files load without renaming.
Source: official ldm/modules/diffusionmodules/model.py (class Decoder).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .attention import attend, fastest_kernel


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResBlock(nn.Module):
    """GN-SiLU-conv, GN-SiLU-dropout-conv, plus a 1x1 shortcut where widths differ: (B,in,h,w) → (B,out,h,w)."""

    def __init__(self, in_channels: int, out_channels: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels)
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
        self.norm = _norm(channels)
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


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Mid(nn.Module):
    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, dropout)
        self.attn_1 = AttnBlock(channels)
        self.block_2 = ResBlock(channels, channels, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class _Level(nn.Module):
    def __init__(self, widths: Sequence[int], *, attention: bool, upsample: bool, dropout: float) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.block = nn.ModuleList(ResBlock(a, b, dropout) for a, b in pairs)
        self.attn = nn.ModuleList(AttnBlock(b) for _, b in pairs if attention)
        if upsample:
            self.upsample = Upsample(widths[-1])
        self.has_upsample = upsample

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return self.upsample(x) if self.has_upsample else x


class Decoder(nn.Module):
    """(B,z_channels,h,w) un-normalised → (B,3,h*f,w*f), nominally in [-1,1], f = 2^(levels-1).

    The nominal `resolution` decides at construction where attention is, as in the official code: in the middle, and
    after every block of a level whose nominal side is in `attn_resolutions`.
    """

    def __init__(
        self,
        *,
        z_channels: int,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attn_resolutions: Sequence[int] = (16,),
        resolution: int = 256,
        out_ch: int = 3,
        dropout: float = 0.0,
    ) -> None:
        """Build the module.

        Raises:
            ValueError: a width is no multiple of GroupNorm's 32 groups.
        """
        super().__init__()
        bad = [ch * m for m in ch_mult if ch * m % 32]
        if bad:
            raise ValueError(f"decoder: expected widths that are multiples of 32, found {bad}")
        levels = len(ch_mult)
        self.factor = 2 ** (levels - 1)
        width = ch * ch_mult[-1]
        side = resolution // self.factor
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = _Mid(width, dropout)
        up: list[nn.Module] = []
        for level in reversed(range(levels)):
            out = ch * ch_mult[level]
            up.append(
                _Level(
                    [width] + [out] * (num_res_blocks + 1),
                    attention=side in attn_resolutions,
                    upsample=level > 0,
                    dropout=dropout,
                )
            )
            width, side = out, side * 2
        self.up = nn.ModuleList(reversed(up))  # key up.0 is the highest resolution
        self.norm_out = _norm(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B,z_channels,h,w) → (B,3,h*f,w*f).

        Raises:
            ValueError: another number of channels.
        """
        if z.shape[1] != self.conv_in.in_channels:
            raise ValueError(f"decoder: expected {self.conv_in.in_channels} latent channels, found {z.shape[1]}")
        h = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
