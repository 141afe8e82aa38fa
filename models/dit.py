"""The diffusion transformer over a grid of latents. Its options are what SVG, DiT, SiT and LightningDiT do differently.

Legend: B batch, T cells of the grid (rows × columns, row-major), N tokens (T / patch size²), C channels, D width.
Source: official models of SVG, DiT, SiT and LightningDiT. Module names follow SVG's state dict.
"""

from __future__ import annotations

import math
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend, fastest_kernel
from .positions import rotary_tables, rotate, sincos_position_table


def time_features(t_B: Tensor, count: int = 256) -> Tensor:
    """(B,) times in [0,1], unscaled → (B,count): cosines, then sines, of t * 10000^(-k/(count/2))."""
    angles = t_B.float()[:, None] * time_frequencies(count // 2, t_B.device)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def time_frequencies(count: int, device: torch.device | None = None) -> Tensor:
    """(count,) frequencies 10000^(-k/count)."""
    return torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float32, device=device) / count)


class TimeEmbedder(nn.Module):
    """(B,) → (B,D). Times are multiplied by `scale` first."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(time_features(t_B * self.scale))


class LabelEmbedder(nn.Module):
    """(B,) int64 → (B,D). The last row is the null label, `num_classes`."""

    def __init__(self, num_classes: int, width: int, *, null_row: bool = True) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_row, width)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.embedding_table(labels_B)


class RMSNorm(nn.RMSNorm):
    """RMSNorm over the last axis with eps 1e-6, in float32 also under autocast: (…,D) → (…,D) float32."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float())


def _token_norm(width: int, *, rms: bool) -> nn.Module:
    return RMSNorm(width) if rms else nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)


class Attention(nn.Module):
    """Multi-head self-attention.

    Optional QK-norm over the head: an affine LayerNorm, eps 1e-5, or RMSNorm. Optional rotary positions after it.
    """

    def __init__(self, width: int, heads: int, *, qk_norm: bool, rms_norm: bool) -> None:
        super().__init__()
        self.heads, self.kernel = heads, fastest_kernel()
        self.qkv = nn.Linear(width, 3 * width)
        head_norm = RMSNorm if rms_norm else nn.LayerNorm
        self.q_norm = head_norm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = head_norm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x_BND: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        b, n, d = x_BND.shape
        q, k, v = self.qkv(x_BND).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        # Under autocast norms and rotations give float32; attention wants one dtype.
        q, k = q.to(v.dtype), k.to(v.dtype)
        return self.proj(attend(q, k, v, self.kernel).transpose(1, 2).reshape(b, n, d))


class MLP(nn.Module):
    """D → ratio*D → D with tanh GELU."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """D → 2/3 ratio*D → D: silu(first half of `w12`) * second half."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        hidden = int(2 / 3 * int(width * ratio))
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def _modulate(x_BND: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BND * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Block(nn.Module):
    """adaLN-Zero transformer block."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, *, qk_norm: bool, rms_norm: bool, swiglu: bool
    ) -> None:
        super().__init__()
        self.norm1 = _token_norm(width, rms=rms_norm)
        self.attn = Attention(width, heads, qk_norm=qk_norm, rms_norm=rms_norm)
        self.norm2 = _token_norm(width, rms=rms_norm)
        self.mlp = SwiGLU(width, mlp_ratio) if swiglu else MLP(width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BND: Tensor, c_BD: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        x_BND = x_BND + gate_a[:, None] * self.attn(_modulate(self.norm1(x_BND), shift_a, scale_a), rotation)
        return x_BND + gate_m[:, None] * self.mlp(_modulate(self.norm2(x_BND), shift_m, scale_m))


class FinalLayer(nn.Module):
    """adaLN, then a linear map to the token's channels."""

    def __init__(self, width: int, out_channels: int, *, rms_norm: bool) -> None:
        super().__init__()
        self.norm_final = _token_norm(width, rms=rms_norm)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(_modulate(self.norm_final(x_BND), shift, scale))


class DiT(nn.Module):
    """Velocity of the flow at latents x, time t and label y: (B,T,C), (B,), (B,) → (B,T,C).

    A new model outputs exactly 0. Options:

    - time_scale: times are multiplied by this number (None: 1), as by codes whose times run to 1,000;
    - patch_size p: a token is p × p cells (DiT and SiT: 2; None: 1);
    - qk_norm: queries and keys are normalised (SVG);
    - learn_sigma: the last layer is twice as wide; the second half is dropped, as in SVG's and SiT's samplers, except
      with returns_variance (DDPM): then the result is (B,T,2C);
    - rms_norm, swiglu, rope: RMSNorm with weights, SwiGLU with 2/3 of the width, rotary positions beside the fixed
      table (LightningDiT).
    """

    pos_embed: Tensor
    rotary_cos: Tensor
    rotary_sin: Tensor

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
    ) -> None:
        """Build a new model.

        Without `null_row` it has no null label, like official models of class_dropout_prob 0.

        Raises:
            ValueError: heads do not divide the width, or patches the grid, the grid is empty, or returns_variance
                without learn_sigma.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"DiT: width: expected a multiple of heads {heads}, found {width}")
        if min(grid) < 1:
            raise ValueError(f"DiT: grid: expected positive rows and columns, found {grid}")
        if returns_variance and not learn_sigma:
            raise ValueError("DiT: returns_variance needs learn_sigma")
        self.patch = patch_size or 1
        if any(side % self.patch for side in grid):
            raise ValueError(f"DiT: patch_size {self.patch} does not divide the latents' grid of {grid[0]}x{grid[1]}")
        self.grid, self.in_channels, self.num_classes = grid, in_channels, num_classes
        self.recompute = False  # recompute blocks in the backward pass: less memory, about a third more time
        self.learn_sigma, self.drops_half = learn_sigma, learn_sigma and not returns_variance
        tokens = (grid[0] // self.patch, grid[1] // self.patch)
        self.register_buffer("pos_embed", sincos_position_table(width, *tokens))
        self.rope = rope
        if rope:
            cos, sin = rotary_tables(width // heads, *tokens)
            self.register_buffer("rotary_cos", cos, persistent=False)
            self.register_buffer("rotary_sin", sin, persistent=False)
        self.ln1 = nn.Linear(self.patch**2 * in_channels, width)
        self.t_embedder = TimeEmbedder(width, time_scale or 1.0)
        self.y_embedder = LabelEmbedder(num_classes, width, null_row=null_row)
        options = {"qk_norm": qk_norm, "rms_norm": rms_norm, "swiglu": swiglu}
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, **options) for _ in range(depth))
        outputs = self.patch**2 * in_channels * (2 if learn_sigma else 1)
        self.final_layer = FinalLayer(width, outputs, rms_norm=rms_norm)
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
        zeroed: list[nn.Module] = [self.final_layer.linear, self.final_layer.adaLN_modulation]
        zeroed += [block.adaLN_modulation for block in self.blocks if isinstance(block, Block)]
        for parameter in (p for module in zeroed for p in module.parameters()):
            nn.init.zeros_(parameter)

    @property
    def null_label(self) -> int:
        """The label for 'no class'."""
        return self.num_classes

    @overload
    def forward(self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor: ...
    @overload
    def forward(self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor, tap: int) -> tuple[Tensor, Tensor]: ...
    def forward(
        self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor, tap: int | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The velocity, (B,T,C); with `tap` also the tokens (B,N,D) after that block, counted from 1.

        Raises:
            ValueError: cells or channels are not the model's.
        """
        expected = (self.grid[0] * self.grid[1], self.in_channels)
        if tuple(x_BTC.shape[1:]) != expected:
            raise ValueError(f"DiT: expected cells x channels {expected}, found {tuple(x_BTC.shape[1:])}")
        c_BD = self.t_embedder(t_B) + self.y_embedder(y_B)
        rotation = (self.rotary_cos, self.rotary_sin) if self.rope else None
        x_BND = tapped = self.ln1(self._patches(x_BTC)) + self.pos_embed
        for number, block in enumerate(self.blocks, 1):
            if self.recompute and torch.is_grad_enabled():
                x_BND = checkpoint(block, x_BND, c_BD, rotation, use_reentrant=False)
            else:
                x_BND = block(x_BND, c_BD, rotation)
            tapped = x_BND if number == tap else tapped
        out = self._cells(self.final_layer(x_BND, c_BD))
        velocity = out[..., : self.in_channels] if self.drops_half else out
        return velocity if tap is None else (velocity, tapped)

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
