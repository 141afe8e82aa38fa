"""Sampling from a rectified flow: time grid, solvers.

Legend: B batch, T tokens, C channels; z latents, t time from 0 (noise) to 1 (data), v velocity.
Source: official rectified_flow/rectified_flow.py (RectifiedFlow.sample).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from .dopri5 import integrate
from .flow import Velocity, shift_time
from .guidance import Guidance, GuidedVelocity, TwoVelocities, Weights

Solver = Literal["euler", "heun", "multistep", "sde", "dopri5"]
"""Euler; Heun: two evaluations per step; Adams-Bashforth of second order: one evaluation per step; Euler-Maruyama;
Dormand-Prince, which chooses its steps."""
Noise = Callable[[int], Tensor]
"""Step → (B,T,C) standard normal noise."""
Watch = Callable[[Tensor], None]
"""Receives the state (B,T,C): the noise, then the result of every step."""
# The multistep solver extrapolates the velocity to the middle of a step, at most this many previous steps ahead. With
# few steps and a strong shift, the last steps are so long that it would overshoot.
MAX_AHEAD = 1.0


def time_grid(steps: int, shift: float) -> Tensor:
    """(steps+1,) float32 times from exactly 0 to exactly 1.

    float32 linspace, shifted in float64, stored as float32, as the official prepare_t_seq computes it.

    Raises:
        ValueError: `steps` is not positive.
    """
    if steps < 1:
        raise ValueError(f"sampling steps: expected at least 1, found {steps}")
    return shift_time(torch.linspace(0, 1, steps + 1).double(), shift).float()


@dataclass(frozen=True)
class SDE:
    """Settings of the solver sde. The defaults are those of SiT's script and of REPA.

    diffusion: the coefficient w at time t: sigma (1 - t) · decreasing ((1 + cos(pi t))² / 4).
    last_step: the last step, which has no noise, follows the drift (mean) or the velocity alone (euler). SiT's third
    choice, Tweedie's formula, is the same as euler.
    last_step_size: its size, in times without a shift.
    Source: SiT transport.py (sample_sde), path.py (compute_diffusion).
    """

    diffusion: Literal["sigma", "decreasing"] = "sigma"
    last_step: Literal["mean", "euler"] = "mean"
    last_step_size: float = 0.04

    def coefficient(self, t: float) -> float:
        """Return w at time `t`."""
        return 1 - t if self.diffusion == "sigma" else (1 + math.cos(math.pi * t)) ** 2 / 4


def sde_grid(steps: int, shift: float, last_step_size: float) -> Tensor:
    """(steps+1,) times from 0 to 1; without a shift, the last step has this size and the others are equal.

    Source: SiT transport.py (sample_sde), REPA samplers.py (euler_maruyama_sampler).

    Raises:
        ValueError: fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"sampling steps: the solver sde needs at least 2, found {steps}")
    equal = torch.linspace(0, 1 - last_step_size, steps, dtype=torch.float64)
    return torch.cat([shift_time(equal, shift), torch.ones(1, dtype=torch.float64)]).float()


def times_of_evaluations(solver: Solver, steps: int, shift: float, sde: SDE) -> list[tuple[int, float]]:
    """Return the step and the time of every evaluation of the model; of dopri5 the first: guidance is constant."""
    if solver == "dopri5":
        return [(0, 0.0)]
    grid = sde_grid(steps, shift, sde.last_step_size) if solver == "sde" else time_grid(steps, shift)
    times = grid.tolist()
    return [*enumerate(times[:-1]), *(enumerate(times[1:]) if solver == "heun" else ())]


def _ignore(state: Tensor) -> None:
    pass


@torch.no_grad()
def sample(
    velocity: Velocity,
    z0_BTC: Tensor,
    y_B: Tensor,
    *,
    null_label: int,
    steps: int,
    shift: float,
    solver: Solver = "euler",
    guidance: Guidance | None = None,
    weak: Velocity | None = None,
    internal: TwoVelocities | None = None,
    noise: Noise | None = None,
    sde: SDE | None = None,
    watch: Watch | None = None,
) -> Tensor:
    """Integrate from noise to data: (B,T,C) → (B,T,C).

    Euler evaluates the model once per step. Heun evaluates it twice, also in the last step (at t = 1), like the
    official sampler. Multistep evaluates it once: second-order Adams-Bashforth for unequal steps. It takes an Euler
    step if there is no previous velocity, or if guidance was switched on or off since (not for linear, which changes
    smoothly). It extrapolates by at most `MAX_AHEAD` of the last step. Sde: see `_sample_sde`. Dopri5: see dopri5.py;
    it ignores steps and shift, and guidance must be constant.

    Args:
        velocity: the model.
        z0_BTC: standard normal noise.
        y_B: labels.
        null_label: the label for 'no class'.
        steps: number of steps.
        shift: shift of the time grid, see `time_grid`.
        solver: one of `Solver`.
        guidance: scale and mode; None: no guidance.
        weak: a worse model, for autoguidance; see `GuidedVelocity`.
        internal: the model with its auxiliary head, for internal guidance; see `GuidedVelocity`.
        noise: noise of the solver sde.
        sde: settings of the solver sde; None: the defaults.
        watch: receives every state; of dopri5, whose samples have no common steps, none.

    Raises:
        ValueError: an unknown solver, too few steps, sde without noise, or dopri5 with guidance that changes.
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver: expected one of {', '.join(get_args(Solver))}; found {solver!r}")
    guidance = guidance or Guidance()
    v_at = GuidedVelocity(velocity, null_label, weak, guidance.channels, internal)
    if solver == "sde":
        if noise is None:
            raise ValueError("solver sde: expected noise for its steps, found none")
        settings = sde or SDE()
        grid = sde_grid(steps, shift, settings.last_step_size)
        return _sample_sde(v_at, z0_BTC, y_B, guidance, grid, noise, settings, watch or _ignore)
    if solver == "dopri5":
        if guidance.kind != "constant":
            raise ValueError(f"solver dopri5: guidance must be constant, found {guidance.mode!r}")
        weights = guidance.weights(0, 1, 0.0)
        return integrate(lambda z, t, samples: v_at(z, t, y_B[samples], weights).to(z.dtype), z0_BTC)
    return _sample_ode(v_at, z0_BTC, y_B, guidance, time_grid(steps, shift), solver, watch or _ignore)


def _sample_ode(
    v_at: GuidedVelocity,
    z_BTC: Tensor,
    y_B: Tensor,
    guidance: Guidance,
    grid: Tensor,
    solver: Solver,
    watch: Watch = _ignore,
) -> Tensor:
    """Integrate dz = v dt by Euler, Heun or multistep; see `sample`."""
    times, differences = grid.tolist(), grid.diff().tolist()
    z, steps = z_BTC, len(differences)
    before: tuple[Tensor, float, Weights] | None = None
    watch(z)
    for step, (t, dt) in enumerate(zip(times[:-1], differences, strict=True)):
        weights = guidance.weights(step, steps, t)
        v = v_at(z, t, y_B, weights).to(z.dtype)
        direction = v
        if solver == "heun":
            following = times[step + 1]
            ahead = v_at(z + dt * v, following, y_B, guidance.weights(step, steps, following))
            direction = 0.5 * (v + ahead.to(z.dtype))
        elif solver == "multistep":
            if before is not None and (before[2] == weights or guidance.kind == "linear"):
                ahead_by = min(dt / (2 * before[1]), MAX_AHEAD)
                direction = v + ahead_by * (v - before[0])
            before = v, dt, weights
        z = z + dt * direction
        watch(z)
    return z


def _sample_sde(
    v_at: GuidedVelocity,
    z_BTC: Tensor,
    y_B: Tensor,
    guidance: Guidance,
    grid: Tensor,
    noise: Noise,
    sde: SDE,
    watch: Watch = _ignore,
) -> Tensor:
    """Euler-Maruyama for dz = (v + w s) dt + sqrt(2 w) dW with the score s = (t v - z) / (1 - t); w: see `SDE`.

    The last step has no noise. REPA's time runs the other way, with twice the coefficient.
    """
    times, differences = grid.tolist(), grid.diff().tolist()
    last = len(differences) - 1
    watch(z_BTC)
    for step, (t, dt) in enumerate(zip(times[:-1], differences, strict=True)):
        v = v_at(z_BTC, t, y_B, guidance.weights(step, last + 1, t)).to(z_BTC.dtype)
        w = sde.coefficient(t)
        ratio = 1.0 if sde.diffusion == "sigma" else w / (1 - t)
        drift = v if step == last and sde.last_step == "euler" else v + ratio * (t * v - z_BTC)
        z_BTC = z_BTC + dt * drift
        if step < last:
            z_BTC = z_BTC + (2 * w * dt) ** 0.5 * noise(step)
        watch(z_BTC)
    return z_BTC
