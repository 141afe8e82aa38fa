"""Guidance of a sampling: which velocities are mixed, with which weights, and where on the path.

Legend: B batch, T tokens, C channels; z latents, t time from 0 (noise) to 1 (data), v velocity.
Source: official rectified_flow/rectified_flow.py (RectifiedFlow.sample).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .flow import Velocity

TwoVelocities = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""As `Velocity`: the final velocity, and that of an auxiliary head."""
Weights = tuple[float, float]
"""Weights of the conditional and of the unconditional velocity."""

ROUNDING = 1e-6  # of float32 times: the ends of an interval belong to it

_NUMBER = r"\d+(?:\.\d+)?"
_MODES = {
    "constant": r"constant",
    "interval-LO-HI": rf"interval-({_NUMBER})-({_NUMBER})",
    "linear": r"linear",
    "late": r"late",
    "early-R": rf"early-({_NUMBER})",
    "cfg_star-K-R": rf"cfg_star-(\d+)-({_NUMBER})",
}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance v_u + w (v_c - v_u), and where on the path it acts.

    scale: w; 1 is none.
    mode: constant · interval-LO-HI (w where LO <= t <= HI, else 1; arXiv 2404.07724) · linear (1 + (w-1)(i+1)/steps) ·
    late (w where (i+1)/steps > 0.5) · early-R (w where t > R, so near the data in spite of its name) · cfg_star-K-R
    (-R v_u in the first K steps, then constant). All but interval as the official code computes them; there interval is
    announced, but raises.
    channels: only the first ones are guided, the others are conditional; None: all. DiT, SiT and LightningDiT guide
    three.
    """

    scale: float = 1.0
    mode: str = "constant"
    channels: int | None = None

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: a mode that does not exist, an interval that ends before it begins, or after 1, or cfg_star on
                some of the channels.
        """
        kind, numbers = self._parsed
        if self.channels is not None and kind == "cfg_star":
            raise ValueError("cfg_star guides all channels, so guidance_channels must be null")
        if kind == "interval" and not numbers[0] <= numbers[1] <= 1:
            raise ValueError(f"guidance mode: expected interval-LO-HI with LO <= HI <= 1, found {self.mode!r}")

    @property
    def _parsed(self) -> tuple[str, tuple[float, ...]]:
        for name, pattern in _MODES.items():
            if match := re.fullmatch(pattern, self.mode):
                return name.partition("-")[0], tuple(map(float, match.groups()))
        raise ValueError(f"guidance mode: expected one of {', '.join(_MODES)}; found {self.mode!r}")

    @property
    def kind(self) -> str:
        """Name of the mode without its numbers."""
        return self._parsed[0]

    def weights(self, step: int, steps: int, t: float) -> Weights:
        """Return (weight of v_c, weight of v_u) at step index `step` of `steps`, at time `t`."""
        w, (kind, numbers) = self.scale, self._parsed
        if kind == "linear":
            w = 1 + (w - 1) * (step + 1) / steps
        elif kind == "late":
            w = w if (step + 1) / steps > 0.5 else 1.0
        elif kind == "early":
            w = w if t > numbers[0] else 1.0
        elif kind == "interval":
            w = w if numbers[0] - ROUNDING <= t <= numbers[1] + ROUNDING else 1.0
        elif kind == "cfg_star" and step < numbers[0]:
            return 0.0, -numbers[1]
        return w, 1 - w


@dataclass(frozen=True)
class GuidedVelocity:
    """Mixes conditional and unconditional velocity. A half with weight 0 is not computed.

    Attributes:
        velocity: the model. Both halves share one forward pass of 2B samples.
        null_label: the label for 'no class'.
        weak: autoguidance (arXiv 2406.02507): a worse model, whose velocity at the same label replaces the
            unconditional one.
        channels: see `Guidance`.
        internal: internal guidance (RAEv2, arXiv 2605.18324): the velocity of an auxiliary head at the same label
            replaces the unconditional one. One pass gives both.
    """

    velocity: Velocity
    null_label: int
    weak: Velocity | None = None
    channels: int | None = None
    internal: TwoVelocities | None = None

    def __call__(self, z_BTC: Tensor, t: float | Tensor, y_B: Tensor, weights: Weights) -> Tensor:
        conditional, other = weights
        b = len(z_BTC)
        t_2B = t.repeat(2) if isinstance(t, Tensor) else z_BTC.new_full((2 * b,), t)
        t_B = t_2B[:b]
        if other == 0:
            return conditional * self.velocity(z_BTC, t_B, y_B)
        if conditional == 0 and self.channels is None:
            return other * self._other(z_BTC, t_B, y_B)
        if self.internal is not None:
            v_c, v_u = self.internal(z_BTC, t_B, y_B)
        elif self.weak is not None:
            v_c, v_u = self.velocity(z_BTC, t_B, y_B), self._other(z_BTC, t_B, y_B)
        else:
            null_B = torch.full_like(y_B, self.null_label)
            both = self.velocity(torch.cat([z_BTC, z_BTC]), t_2B, torch.cat([y_B, null_B]))
            v_c, v_u = both.chunk(2)
        v = v_u + conditional * (v_c - v_u) if conditional + other == 1 else conditional * v_c + other * v_u
        return v if self.channels is None else torch.cat([v[..., : self.channels], v_c[..., self.channels :]], dim=-1)

    def _other(self, z_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:
        if self.internal is not None:
            return self.internal(z_BTC, t_B, y_B)[1]
        if self.weak is not None:
            return self.weak(z_BTC, t_B, y_B)
        return self.velocity(z_BTC, t_B, torch.full_like(y_B, self.null_label))
