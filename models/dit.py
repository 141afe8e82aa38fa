"""The diffusion transformer over a grid of latents. Its options are what the official models do differently.

Legend: B batch, T cells of the grid (rows × columns, row-major), N tokens (T / patch size²), C channels, D width.
Source: official models of SVG, DiT, SiT, LightningDiT and RAE. Module names follow SVG's state dict.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flow import velocity_of_data
from .positions import RotaryTables, sincos_position_table
from .transformer_blocks import Block, BlockOptions, FinalLayer, run_block
from .wide_head import WideHead

NUM_FOURIER = 256


class Outputs(NamedTuple):
    """Everything that one pass of a `DiT` gives."""

    velocity: Tensor  # (B,T,C)
    auxiliary: Tensor | None  # (B,T,C) velocity that the auxiliary head predicts
    tokens: Tensor | None  # (B,N,D) tokens after the block that was asked for


def time_features(t_B: Tensor, count: int = 256) -> Tensor:
    """(B,) times in [0,1], unscaled → (B,count): cosines, then sines, of t * 10000^(-k/(count/2))."""
    angles = t_B.float()[:, None] * time_frequencies(count // 2, t_B.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def time_frequencies(count: int, device: torch.device | None = None) -> Tensor:
    """(count,) frequencies 10000^(-k/count)."""
    return torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float32, device=device) / count)


class TimeEmbedder(nn.Module):
    """(B,) → (B,D). Times are multiplied by `scale` first.

    With `fourier`, the features are sines, then cosines, of 2 pi t W with fixed, random W (RAE).
    """

    W: Tensor

    def __init__(self, width: int, scale: float = 1.0, *, fourier: bool = False) -> None:
        super().__init__()
        self.scale, self.fourier = scale, fourier
        if fourier:
            self.register_buffer("W", torch.randn(NUM_FOURIER))
        inputs = 2 * NUM_FOURIER if fourier else 256
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        if not self.fourier:
            return self.mlp(time_features(t_B * self.scale))
        angles = 2 * math.pi * self.scale * t_B.float()[:, None] * self.W
        return self.mlp(torch.cat([angles.sin(), angles.cos()], dim=1))


class LabelEmbedder(nn.Module):
    """(B,) int64 → (B,D). The last row is the null label, `num_classes`."""

    def __init__(self, num_classes: int, width: int, *, null_row: bool = True) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_row, width)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.embedding_table(labels_B)


def _require_sizes(width: int, depth: int, heads: int, auxiliary_depth: int | None) -> None:
    """Check that the sizes fit each other.

    Raises:
        ValueError: they do not.
    """
    if width % heads:
        raise ValueError(f"DiT: width: expected a multiple of heads {heads}, found {width}")
    if auxiliary_depth is not None and not 0 < auxiliary_depth < depth:
        raise ValueError(f"DiT: auxiliary_depth {auxiliary_depth} is not a block before the last one, {depth}")


def _token_grid(grid: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return rows and columns of tokens.

    Raises:
        ValueError: the grid is empty, or the patches do not divide it.
    """
    if min(grid) < 1:
        raise ValueError(f"DiT: grid: expected positive rows and columns, found {grid}")
    if any(side % patch for side in grid):
        raise ValueError(f"DiT: patch_size {patch} does not divide the latents' grid of {grid[0]}x{grid[1]}")
    return grid[0] // patch, grid[1] // patch


class DiT(nn.Module):
    """Velocity of the flow at latents x, time t and label y: (B,T,C), (B,), (B,) → (B,T,C).

    A new model outputs exactly 0. Options:

    - time_scale: times are multiplied by this number (None: 1), as by codes whose times run to 1,000;
    - patch_size p: a token is p × p cells (DiT and SiT: 2; None: 1);
    - qk_norm: queries and keys are normalised (SVG);
    - learn_sigma: the last layer is twice as wide; the second half is dropped, as in SVG's and SiT's samplers, except
      with returns_variance (DDPM): then the result is (B,T,2C);
    - rms_norm, swiglu, rope: RMSNorm with weights, SwiGLU with 2/3 of the width, rotary positions beside the fixed
      table (LightningDiT);
    - fourier_time: random Fourier features of the time (RAE);
    - wide_head: its width, depth and heads (RAE, see wide_head.py); the label reaches it through the blocks alone;
    - predict_data: the layers predict the data, which is converted to the velocity (JiT, RAEv2);
    - auxiliary_depth: an auxiliary head predicts the velocity after this block, counted from 1 (RAEv2).
    """

    pos_embed: Tensor
    head: WideHead | None

    def __init__(
        self,
        *,
        grid: tuple[int, int],
        in_channels: int,
        num_classes: int,
        width: int = 1152,
        depth: int = 28,
        heads: int = 16,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
        learn_sigma: bool = False,
        patch_size: int | None = None,
        time_scale: float | None = None,
        rms_norm: bool = False,
        swiglu: bool = False,
        rope: bool = False,
        returns_variance: bool = False,
        null_row: bool = True,
        fourier_time: bool = False,
        wide_head: dict[str, int] | None = None,
        predict_data: bool = False,
        auxiliary_depth: int | None = None,
    ) -> None:
        """Build a new model.

        Without `null_row` it has no null label, like official models of class_dropout_prob 0.

        Raises:
            ValueError: heads do not divide the width, or patches the grid, the grid is empty, the auxiliary depth is
                not below the depth, or returns_variance without learn_sigma, or with predict_data.
        """
        super().__init__()
        _require_sizes(width, depth, heads, auxiliary_depth)
        if returns_variance and (not learn_sigma or predict_data):
            raise ValueError("DiT: returns_variance needs learn_sigma, and does not go with predict_data")
        self.patch = patch_size or 1
        tokens = _token_grid(grid, self.patch)
        self.grid, self.in_channels, self.num_classes = grid, in_channels, num_classes
        self.recompute = False  # recompute blocks in the backward pass: less memory, about a third more time
        self.predict_data, self.auxiliary_depth = predict_data, auxiliary_depth
        self.learn_sigma, self.drops_half = learn_sigma, learn_sigma and not returns_variance
        self.register_buffer("pos_embed", sincos_position_table(width, *tokens))
        self.rotary = RotaryTables(width // heads, *tokens) if rope else None
        values = self.patch**2 * in_channels
        self.ln1 = nn.Linear(values, width)
        self.t_embedder = TimeEmbedder(width, time_scale or 1.0, fourier=fourier_time)
        self.y_embedder = LabelEmbedder(num_classes, width, null_row=null_row)
        options = BlockOptions(mlp_ratio, qk_norm, rms_norm, swiglu)
        self.blocks = nn.ModuleList(Block(width, heads, options) for _ in range(depth))
        outputs = values * (2 if learn_sigma else 1)
        self.head = None
        if wide_head is None:
            self.final_layer = FinalLayer(width, outputs, rms_norm=rms_norm)
        else:
            sizes = {"values": values, "outputs": outputs, "trunk_width": width, **wide_head}
            self.head = WideHead(options, tokens=tokens, rope=rope, **sizes)
        self.auxiliary_head = None if auxiliary_depth is None else FinalLayer(width, outputs, rms_norm=rms_norm)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for module in self.t_embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        modulated = [module for module in self.modules() if isinstance(module, Block | FinalLayer)]
        zeroed: list[nn.Module] = [module.adaLN_modulation for module in modulated]
        zeroed += [module.linear for module in modulated if isinstance(module, FinalLayer)]
        for parameter in (p for module in zeroed for p in module.parameters()):
            nn.init.zeros_(parameter)

    @property
    def all_blocks(self) -> list[nn.Module]:
        """The blocks, and those of the wide head."""
        return [*self.blocks, *(() if self.head is None else self.head.blocks)]

    @property
    def null_label(self) -> int:
        """The label for 'no class'."""
        return self.num_classes

    @overload
    def forward(self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor: ...
    @overload
    def forward(
        self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor, *, everything: Literal[True], tap: int | None = None
    ) -> Outputs: ...
    def forward(
        self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor, *, everything: bool = False, tap: int | None = None
    ) -> Tensor | Outputs:
        """The velocity, (B,T,C), or everything, with the tokens after block `tap`, counted from 1.

        Raises:
            ValueError: cells or channels are not the model's.
        """
        expected = (self.grid[0] * self.grid[1], self.in_channels)
        if tuple(x_BTC.shape[1:]) != expected:
            raise ValueError(f"DiT: expected cells x channels {expected}, found {tuple(x_BTC.shape[1:])}")
        time_B1D, label_B1D = self.t_embedder(t_B)[:, None], self.y_embedder(y_B)[:, None]
        c_B1D = time_B1D + label_B1D
        if self.head is not None:  # RAE applies SiLU here too, beside that of every block
            c_B1D = F.silu(c_B1D)
        rotation = None if self.rotary is None else (self.rotary.cos, self.rotary.sin)
        patches = self._patches(x_BTC)
        x_BND = self.ln1(patches) + self.pos_embed
        tokens = middle = None
        for number, block in enumerate(self.blocks, 1):
            x_BND = run_block(block, x_BND, c_B1D, rotation, recompute=self.recompute)
            tokens = x_BND if number == tap else tokens
            middle = x_BND if number == self.auxiliary_depth else middle
        if self.head is None:
            out = self.final_layer(x_BND, c_B1D)
        else:
            out = self.head(patches, x_BND, time_B1D, recompute=self.recompute)
        velocity = self._velocity(out, x_BTC, t_B)
        if not everything:
            return velocity
        auxiliary = None
        if self.auxiliary_head is not None:
            auxiliary = self._velocity(self.auxiliary_head(middle, c_B1D), x_BTC, t_B)
        return Outputs(velocity, auxiliary, tokens)

    def final_and_auxiliary(self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> tuple[Tensor, Tensor]:
        """The velocities of the last layer and of the auxiliary head, from one pass.

        Raises:
            ValueError: the model has no auxiliary head.
        """
        outputs = self(x_BTC, t_B, y_B, everything=True)
        if outputs.auxiliary is None:
            raise ValueError("DiT: internal guidance needs an auxiliary head, which this model does not have")
        return outputs.velocity, outputs.auxiliary

    def _velocity(self, out_BNP: Tensor, x_BTC: Tensor, t_B: Tensor) -> Tensor:
        """Return the velocity (B,T,C) of a layer's output; with returns_variance all of it, (B,T,2C)."""
        out_BTC = self._cells(out_BNP)
        if self.drops_half:
            out_BTC = out_BTC[..., : self.in_channels]
        return velocity_of_data(out_BTC, x_BTC, t_B) if self.predict_data else out_BTC

    def _patches(self, x_BTC: Tensor) -> Tensor:
        """(B,T,C) → (B,N,C p p): channel, row in the patch, column in the patch."""
        if self.patch == 1:
            return x_BTC
        (rows, columns), p = self.grid, self.patch
        cells = x_BTC.reshape(-1, rows // p, p, columns // p, p, self.in_channels)
        return cells.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)

    def _cells(self, out_BNP: Tensor) -> Tensor:
        """(B,N,p p C) → (B,T,C): row in the patch, column in the patch, channel, as DiT's unpatchify."""
        if self.patch == 1:
            return out_BNP
        (rows, columns), p = self.grid, self.patch
        patches = out_BNP.reshape(len(out_BNP), rows // p, columns // p, p, p, -1)
        return patches.permute(0, 1, 3, 2, 4, 5).flatten(3, 4).flatten(1, 2).flatten(1, 2)
