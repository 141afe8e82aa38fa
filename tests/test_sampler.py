"""Solvers and guidance on velocities with known flow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from svgpipe.models.flow import Velocity
from svgpipe.models.guidance import Guidance
from svgpipe.models.sampler import SDE, Solver, sample, time_grid


@pytest.mark.parametrize("solver", ["euler", "heun", "multistep"])
@pytest.mark.parametrize("shift", [1.0, 0.4])
def test_solvers_converge_at_their_order(solver: Solver, shift: float) -> None:
    """dz/dt = -z has the solution z0 / e: half the step halves Euler's error and quarters that of the others."""
    z0, y = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)

    def error(steps: int) -> float:
        z = sample(lambda z, t, y: -z, z0, y, null_label=1, steps=steps, shift=shift, solver=solver)
        return abs(z.item() - math.exp(-1))

    order = {"euler": 2.0, "heun": 4.0, "multistep": 4.0}[solver]
    assert error(64) / error(128) == pytest.approx(order, rel=0.1)


@pytest.mark.parametrize("sde", [None, SDE("decreasing", "euler", 0.01), SDE(last_step="euler")])
def test_the_stochastic_solver_samples_the_distribution_of_the_data(sde: SDE | None) -> None:
    """Data N(2, 0.5²), for which the velocity is known: mean and deviation of 20,000 samples."""
    mean, std, generator = 2.0, 0.5, torch.Generator().manual_seed(0)

    def velocity(z: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        at = t[:, None, None]
        variance = (1 - at) ** 2 + (at * std) ** 2
        data = mean + at * std**2 / variance * (z - at * mean)  # E[x1 | z]
        noise = (1 - at) / variance * (z - at * mean)  # E[z0 | z]
        return data - noise

    def noise(step: int) -> torch.Tensor:
        return torch.randn(20_000, 1, 1, generator=generator)

    labels = torch.zeros(20_000, dtype=torch.int64)
    arguments = {"null_label": 1, "steps": 100, "shift": 1.0, "sde": sde}
    found = sample(velocity, noise(-1), labels, **arguments, solver="sde", noise=noise)  # type: ignore[arg-type]
    assert found.mean().item() == pytest.approx(mean, abs=0.02)
    assert found.std().item() == pytest.approx(std, abs=0.02)
    still = sample(velocity, noise(-1), labels, **arguments, solver="sde", noise=lambda step: torch.zeros(1))  # type: ignore[arg-type]
    assert still.std().item() < 0.3  # most of the deviation is the noise of the steps
    with pytest.raises(ValueError, match="expected noise"):
        sample(velocity, noise(-1), labels, **arguments, solver="sde")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 2"):
        sample(velocity, noise(-1), labels, null_label=1, steps=1, shift=1.0, solver="sde", noise=noise)


def test_straight_flows_need_one_step() -> None:
    data = torch.randn(3, 4, 2)
    z0 = torch.randn(3, 4, 2)

    def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return data - z0

    out = sample(velocity, z0, torch.zeros(3, dtype=torch.int64), null_label=1, steps=1, shift=0.15)
    torch.testing.assert_close(out, data)


def test_guidance_runs_both_halves_in_one_forward_and_is_skipped_at_one() -> None:
    calls: list[list[int]] = []

    def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(y.tolist())
        return y[:, None, None].double().expand_as(z)

    z0, y = torch.zeros(2, 1, 1, dtype=torch.float64), torch.tensor([1, 2])
    out = sample(velocity, z0, y, null_label=10, steps=1, shift=1.0, guidance=Guidance(3.0))
    assert calls == [[1, 2, 10, 10]]
    assert out.flatten().tolist() == [10 + 3 * (1 - 10), 10 + 3 * (2 - 10)]
    calls.clear()
    sample(velocity, z0, y, null_label=10, steps=2, shift=1.0, guidance=Guidance(1.0))
    assert calls == [[1, 2], [1, 2]]


def test_flow_refuses_unknown_options() -> None:
    z0, y = torch.zeros(1, 1, 1), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="expected one of euler, heun, multistep, sde"):
        sample(lambda z, t, y: z, z0, y, null_label=1, steps=1, shift=1.0, solver="rk4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 1, found 0"):
        sample(lambda z, t, y: z, z0, y, null_label=1, steps=0, shift=1.0)
    for mode in (
        "interval",
        "interval-0.5",
        "interval-0.6-0.5",
        "interval-0.5-2",
        "early",
        "early-.",
        "cfg_star-1",
        "late-0.3",
    ):
        with pytest.raises(ValueError, match="guidance mode"):
            Guidance(2.0, mode)


def constant_velocities(calls: list[list[int]]) -> Velocity:
    """A velocity equal to the label at every place and time; records the labels of each call."""

    def velocity(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        del t
        calls.append(y.tolist())
        return y[:, None, None].to(z.dtype).expand_as(z)

    return velocity


def test_interval_guidance_runs_the_unconditional_half_only_within_the_interval() -> None:
    """Four steps at t = 0, 0.25, 0.5, 0.75; the two in the middle are guided."""
    calls: list[list[int]] = []
    z0, y = torch.zeros(1, 1, 1, dtype=torch.float64), torch.tensor([1])
    guidance = Guidance(3.0, "interval-0.25-0.5")
    out = sample(constant_velocities(calls), z0, y, null_label=5, steps=4, shift=1.0, guidance=guidance)
    assert calls == [[1], [1, 5], [1, 5], [1]]
    guided = 5 + 3 * (1 - 5)
    assert out.item() == pytest.approx(0.25 * (1 + guided + guided + 1))


@pytest.mark.parametrize(("mode", "guided"), [("interval-0.3-0.6", [3, 4, 5, 6]), ("interval-0.7-1.0", [7, 8, 9])])
def test_the_ends_of_an_interval_belong_to_it(mode: str, guided: list[int]) -> None:
    """Times are float32: 0.6 among ten steps is 0.60000002, and 0.7 is 0.69999999."""
    times, guidance = time_grid(10, 1.0)[:-1].tolist(), Guidance(3.0, mode)
    assert [i for i, t in enumerate(times) if guidance.weights(i, 10, t)[1] != 0] == guided


@pytest.mark.parametrize(
    ("mode", "guided"),
    [
        ("linear", [True, True, True, True]),
        ("late", [False, False, True, True]),
        ("early-0.3", [False, False, True, True]),
    ],
)
def test_the_unconditional_half_is_skipped_wherever_guidance_is_one(mode: str, guided: list[bool]) -> None:
    """Four steps at t = 0, 0.25, 0.5, 0.75."""
    calls: list[list[int]] = []
    z0, y = torch.zeros(1, 1, 1, dtype=torch.float64), torch.tensor([1])
    sample(constant_velocities(calls), z0, y, null_label=5, steps=4, shift=1.0, guidance=Guidance(3.0, mode))
    assert calls == [[1, 5] if both else [1] for both in guided]


def test_autoguidance_gives_the_guide_the_same_label() -> None:
    calls: list[list[int]] = []
    good = constant_velocities([])

    def weak(z: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(y.tolist())
        return 0.5 * good(z, t, y)

    z0, y = torch.zeros(2, 1, 1, dtype=torch.float64), torch.tensor([1, 2])
    out = sample(good, z0, y, null_label=5, steps=2, shift=1.0, guidance=Guidance(2.0), weak=weak)
    assert calls == [[1, 2], [1, 2]]
    assert out.flatten().tolist() == [0.5 + 2 * 0.5, 1 + 2 * 1]  # v_weak + w (v - v_weak)
    calls.clear()
    sample(good, z0, y, null_label=5, steps=2, shift=1.0, guidance=Guidance(1.0), weak=weak)
    assert not calls


def test_multistep_takes_an_euler_step_if_guidance_jumps() -> None:
    """Otherwise a velocity from before the jump would be extrapolated; exact for piecewise constant velocities."""
    z0, y = torch.zeros(1, 1, 1, dtype=torch.float64), torch.tensor([1])
    found = [
        sample(
            constant_velocities([]),
            z0,
            y,
            null_label=5,
            steps=8,
            shift=0.3,
            solver=solver,
            guidance=Guidance(4.0, "early-0.3"),
        ).item()
        for solver in ("euler", "multistep")
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-12)
