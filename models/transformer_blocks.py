"""Blocks of the diffusion transformer: attention, MLP and output layer, modulated by a condition (adaLN).

Legend: B batch, N tokens, D width, C outputs. A condition c is (B,1,D), the same for all tokens, or (B,N,D).
Source: official models of SVG, DiT, SiT and LightningDiT. Module names follow SVG's state dict.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import attend, fastest_kernel
from .positions import rotate

Rotation = tuple[Tensor, Tensor] | None
"""Cosines and sines of rotary positions; None: no rotation."""


@dataclass(frozen=True)
class BlockOptions:
    """What differs between the blocks of the papers; see `DiT`."""

    mlp_ratio: float
    qk_norm: bool
    rms_norm: bool
    swiglu: bool


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

    def forward(self, x_BND: Tensor, rotation: Rotation) -> Tensor:
        b, n, d = x_BND.shape
        q, k, v = self.qkv(x_BND).view(b, n, 3, self.heads, d // self.heads).unbind(2)
        # Norms before the transposition: after it, they would copy their inputs in small pieces.
        q, k, v = (part.transpose(1, 2) for part in (self.q_norm(q), self.k_norm(k), v))
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


def _modulate(x_BND: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x_BND, 1 + scale)


class Block(nn.Module):
    """adaLN-Zero transformer block."""

    def __init__(self, width: int, heads: int, options: BlockOptions) -> None:
        super().__init__()
        self.norm1 = _token_norm(width, rms=options.rms_norm)
        self.attn = Attention(width, heads, qk_norm=options.qk_norm, rms_norm=options.rms_norm)
        self.norm2 = _token_norm(width, rms=options.rms_norm)
        self.mlp = SwiGLU(width, options.mlp_ratio) if options.swiglu else MLP(width, options.mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x_BND: Tensor, c: Tensor, rotation: Rotation) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)
        x_BND = torch.addcmul(x_BND, gate_a, self.attn(_modulate(self.norm1(x_BND), shift_a, scale_a), rotation))
        return torch.addcmul(x_BND, gate_m, self.mlp(_modulate(self.norm2(x_BND), shift_m, scale_m)))


def run_block(block: nn.Module, x_BND: Tensor, c: Tensor, rotation: Rotation, *, recompute: bool) -> Tensor:
    """Run a block; with `recompute` and gradients, it is computed again in the backward pass, to save memory."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x_BND, c, rotation, use_reentrant=False)
    return block(x_BND, c, rotation)


class FinalLayer(nn.Module):
    """adaLN, then a linear map to the token's channels."""

    def __init__(self, width: int, out_channels: int, *, rms_norm: bool) -> None:
        super().__init__()
        self.norm_final = _token_norm(width, rms=rms_norm)
        self.linear = nn.Linear(width, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x_BND: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(_modulate(self.norm_final(x_BND), shift, scale))
