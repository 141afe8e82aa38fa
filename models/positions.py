"""Where a token lies: a fixed sine-cosine table that is added, and rotations of queries and keys (RoPE).

Legend: B batch, H heads, T tokens (= rows × columns, row-major), D width, K width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def sincos_position_table(width: int, rows: int, columns: int) -> Tensor:
    """(1, rows*columns, width) fixed table: first half of the channels is the column, second half the row.

    Within each half all sines, then all cosines; omega_k = 10000^(-k/(width/4)); computed in float64.

    Raises:
        ValueError: `width` is no multiple of 4.
    """
    if width % 4:
        raise ValueError(f"position table: expected a width that is a multiple of 4, found {width}")
    omega = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    row, column = torch.meshgrid(
        torch.arange(rows, dtype=torch.float64), torch.arange(columns, dtype=torch.float64), indexing="ij"
    )
    halves = [torch.outer(axis.flatten(), omega) for axis in (column, row)]
    return torch.cat([f(a) for a in halves for f in (torch.sin, torch.cos)], dim=1).float().unsqueeze(0)


def rotary_tables(head_width: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (rows*columns, K) each: the first half of a head turns by the row, the second by the column.

    Two neighbouring channels are one pair, with the angle position * 10000^(-2k/(K/2)) for pair k of its half.
    Source: LightningDiT models/pos_embed.py, VisionRotaryEmbeddingFast.

    Raises:
        ValueError: the width of a head is no multiple of 4.
    """
    if head_width % 4:
        raise ValueError(f"rotary positions: expected a head width that is a multiple of 4, found {head_width}")
    half = head_width // 2
    frequencies = 1.0 / 10000 ** (torch.arange(0, half, 2, dtype=torch.float32) / half)
    by_row, by_column = (
        torch.outer(torch.arange(count, dtype=torch.float32), frequencies).repeat_interleave(2, dim=1)
        for count in (rows, columns)
    )
    angles = torch.cat([by_row.repeat_interleave(columns, dim=0), by_column.repeat(rows, 1)], dim=1)
    return angles.cos(), angles.sin()


class RotaryTables(nn.Module):
    """The tables of a grid as buffers, which are not saved. See `rotary_tables`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, head_width: int, rows: int, columns: int) -> None:
        super().__init__()
        cos, sin = rotary_tables(head_width, rows, columns)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)


def rotate(x_BHTK: Tensor, cos_TK: Tensor, sin_TK: Tensor) -> Tensor:
    """Turn every pair of neighbouring channels (a, b) to (a cos - b sin, b cos + a sin): same shape."""
    pairs = x_BHTK.unflatten(-1, (-1, 2))
    turned = torch.stack([-pairs[..., 1], pairs[..., 0]], dim=-1).flatten(-2)
    return x_BHTK * cos_TK + turned * sin_TK
