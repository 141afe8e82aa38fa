"""A wide, shallow head after the transformer, conditioned on every token of it (DDT).

A transformer that is narrower than its tokens cannot carry them to its output. The head sees the latents again, so the
transformer only has to say what they mean.

Legend: B batch, N tokens, P values of a token, D width of the transformer, W width of the head.
Source: arXiv 2504.05741 (DDT); official RAE models/DDT.py.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .positions import RotaryTables
from .transformer_blocks import Block, BlockOptions, FinalLayer, run_block


class WideHead(nn.Module):
    """Blocks of width W on the latents, then the output layer. The condition is SiLU(time + transformer) per token.

    Its tokens have rotary positions if the transformer has them, and no position table.
    """

    def __init__(
        self,
        options: BlockOptions,
        *,
        values: int,
        outputs: int,
        trunk_width: int,
        tokens: tuple[int, int],
        rope: bool,
        width: int,
        depth: int,
        heads: int,
    ) -> None:
        """Build a new head.

        Args:
            options: of its blocks.
            values: of a token.
            outputs: of a token.
            trunk_width: width of the transformer before it.
            tokens: rows and columns of the grid.
            rope: rotary positions.
            width: of its tokens.
            depth: number of its blocks.
            heads: attention heads.
        """
        super().__init__()
        self.embed = nn.Linear(values, width)
        self.project = nn.Identity() if trunk_width == width else nn.Linear(trunk_width, width)
        self.blocks = nn.ModuleList(Block(width, heads, options) for _ in range(depth))
        self.final_layer = FinalLayer(width, outputs, rms_norm=options.rms_norm)
        self.rotary = RotaryTables(width // heads, *tokens) if rope else None

    def forward(self, patches_BNP: Tensor, trunk_BND: Tensor, time_B1D: Tensor, *, recompute: bool) -> Tensor:
        """(B,N,P) latents, (B,N,D) the transformer's tokens, (B,1,D) embedded times → (B,N,outputs)."""
        c_BNW = self.project(F.silu(time_B1D + trunk_BND))
        rotation = None if self.rotary is None else (self.rotary.cos, self.rotary.sin)
        x_BNW = self.embed(patches_BNP)
        for block in self.blocks:
            x_BNW = run_block(block, x_BNW, c_BNW, rotation, recompute=recompute)
        return self.final_layer(x_BNW, c_BNW)
