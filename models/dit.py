"""The diffusion transformer over feature tokens.

Legend: B batch, T tokens (= grid rows × columns, row-major), C channels of a token, D width.
Source: official models/models_SVG.py. Module names follow its state dict.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend, fastest_kernel


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


def time_features(t_B: Tensor, count: int = 256) -> Tensor:
    """(B,) times in [0,1], unscaled → (B,count): cosines, then sines, of t * 10000^(-k/(count/2))."""
    half = count // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t_B.device) / half)
    angles = t_B.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedder(nn.Module):
    """(B,) → (B,D)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t_B: Tensor) -> Tensor:
        return self.mlp(time_features(t_B))


class LabelEmbedder(nn.Module):
    """(B,) int64 → (B,D). The last row is the null label, `num_classes`."""

    def __init__(self, num_classes: int, width: int, *, null_row: bool = True) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + null_row, width)

    def forward(self, labels_B: Tensor) -> Tensor:
        return self.embedding_table(labels_B)


class Attention(nn.Module):
    """Multi-head self-attention with optional QK-norm (affine LayerNorm over the head dim, eps 1e-5)."""

    def __init__(self, width: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads, self.kernel = heads, fastest_kernel()
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        b, t, d = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        # Under autocast LayerNorm gives float32; attention wants one dtype.
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        return self.proj(attend(q, k, v, self.kernel).transpose(1, 2).reshape(b, t, d))


class MLP(nn.Module):
    """D → ratio*D → D with tanh GELU."""

    def __init__(self, width: int, ratio: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.fc2 = nn.Linear(int(width * ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def _modulate(x_BTD: Tensor, shift_BD: Tensor, scale_BD: Tensor) -> Tensor:
    return x_BTD * (1 + scale_BD[:, None]) + shift_BD[:, None]


class Block(nn.Module):
    """adaLN-Zero transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, *, qk_norm: bool) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm=qk_norm)
        self.mlp = MLP(width, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c_BD).chunk(6, dim=1)
        shape = x_BTD.shape[-1:]
        x_BTD = x_BTD + gate_a[:, None] * self.attn(_modulate(F.layer_norm(x_BTD, shape, eps=1e-6), shift_a, scale_a))
        return x_BTD + gate_m[:, None] * self.mlp(_modulate(F.layer_norm(x_BTD, shape, eps=1e-6), shift_m, scale_m))


class FinalLayer(nn.Module):
    """adaLN, then a linear map to the token's channels."""

    def __init__(self, width: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BTD: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c_BD).chunk(2, dim=1)
        return self.linear(_modulate(F.layer_norm(x_BTD, x_BTD.shape[-1:], eps=1e-6), shift, scale))


class DiT(nn.Module):
    """Velocity of the flow at tokens x, time t and label y: (B,T,C), (B,), (B,) → (B,T,C).

    With `learn_sigma` the last layer is twice as wide and the second half is dropped, as in the official sampler and
    loss. It exists only to load official weights. A new model outputs exactly 0.
    """

    pos_embed: Tensor

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
        null_row: bool = True,
    ) -> None:
        """Build a new model. Without `null_row` it has no null label, like official models of class_dropout_prob 0.

        Raises:
            ValueError: heads do not divide the width, or the grid is empty.
        """
        super().__init__()
        if width % heads:
            raise ValueError(f"DiT: width: expected a multiple of heads {heads}, found {width}")
        if min(grid) < 1:
            raise ValueError(f"DiT: grid: expected positive rows and columns, found {grid}")
        self.grid, self.in_channels, self.num_classes = grid, in_channels, num_classes
        self.recompute = False  # recompute blocks in the backward pass: less memory, about a third more time
        self.learn_sigma = learn_sigma
        self.register_buffer("pos_embed", sincos_position_table(width, *grid))
        self.ln1 = nn.Linear(in_channels, width)
        self.t_embedder = TimeEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, null_row=null_row)
        self.blocks = nn.ModuleList(Block(width, heads, mlp_ratio, qk_norm=qk_norm) for _ in range(depth))
        self.final_layer = FinalLayer(width, in_channels * (2 if learn_sigma else 1))
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
        zeroed: list[nn.Module] = [self.final_layer]
        zeroed += [block.adaLN_modulation for block in self.blocks if isinstance(block, Block)]
        for parameter in (p for module in zeroed for p in module.parameters()):
            nn.init.zeros_(parameter)

    @property
    def null_label(self) -> int:
        """The label for 'no class'."""
        return self.num_classes

    def forward(self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """The velocity, (B,T,C).

        Raises:
            ValueError: tokens or channels are not the model's.
        """
        out = self.raw(x_BTC, t_B, y_B)
        return out[..., : self.in_channels] if self.learn_sigma else out

    def raw(self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        """The whole output of the last layer: (B,T,C), with `learn_sigma` (B,T,2C).

        Raises:
            ValueError: tokens or channels are not the model's.
        """
        expected = (self.grid[0] * self.grid[1], self.in_channels)
        if tuple(x_BTC.shape[1:]) != expected:
            raise ValueError(f"DiT: expected tokens x channels {expected}, found {tuple(x_BTC.shape[1:])}")
        c_BD = self.t_embedder(t_B) + self.y_embedder(y_B)
        x_BTD = self.ln1(x_BTC) + self.pos_embed
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BTD = checkpoint(block, x_BTD, c_BD, use_reentrant=False)
            else:
                x_BTD = block(x_BTD, c_BD)
        return self.final_layer(x_BTD, c_BD)
