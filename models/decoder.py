"""The LDM/VA-VAE decoder: un-normalised latent map → image.

Module names follow the official state dict, so that its files load without renaming.
Source: official ldm/modules/diffusionmodules/model.py (class Decoder).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import Level, Middle, group_norm, require_groups


class Upsample(nn.Module):
    """Nearest x2, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class _Level(Level):
    def __init__(self, widths: Sequence[int], *, attention: bool, upsample: bool, dropout: float) -> None:
        super().__init__(widths, attention=attention, dropout=dropout)
        self.upsample = Upsample(widths[-1]) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(super().forward(x))


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
        require_groups("decoder", [ch * m for m in ch_mult])
        levels = len(ch_mult)
        self.factor = 2 ** (levels - 1)
        width = ch * ch_mult[-1]
        side = resolution // self.factor
        self.conv_in = nn.Conv2d(z_channels, width, 3, padding=1)
        self.mid = Middle(width, dropout)
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
        self.norm_out = group_norm(width)
        self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

    @property
    def in_channels(self) -> int:
        """Channels of a latent."""
        return self.conv_in.in_channels

    @property
    def last_layer(self) -> Tensor:
        """Weight of the last convolution."""
        return self.conv_out.weight

    def forward(self, z: Tensor) -> Tensor:
        """(B,z_channels,h,w) → (B,3,h*f,w*f).

        Raises:
            ValueError: another number of channels.
        """
        if z.shape[1] != self.in_channels:
            raise ValueError(f"decoder: expected {self.in_channels} latent channels, found {z.shape[1]}")
        h = self.mid(self.conv_in(z))
        for level in reversed(list(self.up)):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))
