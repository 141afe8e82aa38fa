"""Converts 8-bit pixels and tensors. Separate from decode.py, so that sharding need not load torch."""

from __future__ import annotations

import torch
from torch import Tensor

from .decode import RGBArray


def as_unit_range(pixels: RGBArray | Tensor) -> Tensor:
    """(N,H,W,3) uint8 → (N,3,H,W) float32 in [0,1], on the same device.

    Returns:
        The tensor.
    """
    return torch.as_tensor(pixels).permute(0, 3, 1, 2).float() / 255


def as_pixels(images: Tensor) -> RGBArray:
    """(N,3,H,W) in about [-1,1] → (N,H,W,3) uint8, clamped and rounded to nearest.

    Returns:
        The pixels.
    """
    scaled = ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    pixels: RGBArray = scaled.permute(0, 2, 3, 1).contiguous().cpu().numpy()
    return pixels
