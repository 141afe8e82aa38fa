"""The LDM/VA-VAE encoder: image → mean and log variance of the latents, before the 1x1 convolution.

Module names follow the official state dict, so that its files load without renaming.
Source: official ldm/modules/diffusionmodules/model.py (class Encoder).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from .convolution import Level, Middle, group_norm, require_groups


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2, padded by one row below and one column on the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class _Level(Level):
    def __init__(self, widths: Sequence[int], *, attention: bool, downsample: bool) -> None:
        super().__init__(widths, attention=attention)
        self.downsample = Downsample(widths[-1]) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(super().forward(x))


class Encoder(nn.Module):
    """(B,3,H,W) in [-1,1] → (B,2 z_channels,H/f,W/f), f = 2^(levels-1). The mirror image of `Decoder`.

    `attention` adds attention after every block of the lowest level; it is always in the middle.
    """

    def __init__(
        self,
        *,
        z_channels: int,
        ch: int = 128,
        ch_mult: Sequence[int] = (1, 1, 2, 2, 4),
        num_res_blocks: int = 2,
        attention: bool = True,
    ) -> None:
        """Build the module.

        Raises:
            ValueError: a width is no multiple of GroupNorm's 32 groups.
        """
        super().__init__()
        widths = [ch * m for m in ch_mult]
        require_groups("encoder", widths)
        self.factor = 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        last = len(widths) - 1
        self.down = nn.ModuleList(
            _Level([before] + [width] * num_res_blocks, attention=attention and level == last, downsample=level < last)
            for level, (before, width) in enumerate(itertools.pairwise([ch, *widths]))
        )
        self.mid = Middle(widths[-1], 0.0)
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """(B,3,H,W) → (B,2 z_channels,H/f,W/f).

        Raises:
            ValueError: height or width is no multiple of f.
        """
        if images.shape[-2] % self.factor or images.shape[-1] % self.factor:
            raise ValueError(
                f"encoder: expected images whose sides are multiples of {self.factor}, found "
                f"{images.shape[-2]}x{images.shape[-1]}"
            )
        h = self.conv_in(images)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))
