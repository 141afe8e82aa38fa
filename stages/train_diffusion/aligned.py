"""The diffusion model with a projector, as one module: both are trained on the same pass.

Legend: B batch, N tokens, Z channels of the features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svgpipe.manifests.diffusion_section import AlignSection
from svgpipe.models.dit import DiT, Outputs
from svgpipe.models.representation_alignment import ConvProjector, MLPProjector


class AlignedDiT(nn.Module):
    """What the model gives, with the tokens (B,N,Z) after block `depth` projected to the features."""

    def __init__(self, model: DiT, config: AlignSection, channels: int) -> None:
        super().__init__()
        self.model, self.depth = model, config.depth
        width = model.ln1.out_features
        grid = (model.grid[0] // model.patch, model.grid[1] // model.patch)
        self.projector: nn.Module = (
            ConvProjector(width, channels, grid)
            if config.projector == "conv"
            else MLPProjector(width, config.width, channels)
        )

    def forward(self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> Outputs:
        outputs = self.model(x_BTC, t_B, y_B, everything=True, tap=self.depth)
        return outputs._replace(tokens=self.projector(outputs.tokens))


def new_aligned(model: DiT, config: AlignSection, channels: int, seed: int) -> AlignedDiT:
    """Return the model with a new projector, whose weights depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AlignedDiT(model, config, channels)
