"""Averages of a model's weights, several side by side: exponential ones, and power functions of the step.

A power average at step t weights step s with s^γ. Its length σ is the standard deviation of that profile divided by t.
Source: EDM2 (arXiv 2312.02696), section 3 and appendix C; phema.py. Time is continuous in these formulas.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)
HALF_ROUNDING = 2**-12  # root mean square of the relative rounding error of float16, about


def warmed_decay(decay: float, updates: int) -> float:
    """Decay of the update after `updates` earlier ones: min(decay, (1 + n) / (10 + n)).

    Without the warm-up, a run of a few thousand steps at 0.9999 would mostly average its initial weights.
    Source: TensorFlow's ExponentialMovingAverage with num_updates.
    """
    return min(decay, (1 + updates) / (10 + updates))


def new_average(model: Model) -> Model:
    """Return a copy of `model` to average into: in eval mode, without gradients."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_averages(
    averages: Sequence[Sequence[Tensor]], decays: Sequence[float], weights: Sequence[Tensor], updates: int
) -> None:
    """Update average ← average + (1 − decay) (weights − average) with warmed decays, in one launch per average.

    Takes lists of parameters, because `parameters()` of a large model takes milliseconds, and a GPU waits for them.
    """
    for average, decay in zip(averages, decays, strict=True):
        torch._foreach_lerp_(list(average), list(weights), 1 - warmed_decay(decay, updates))


def power_exponent(sigma: float) -> float:
    """Return γ of the power function with relative length sigma: the largest root of eq. 126.

    Raises:
        ValueError: sigma is not in [0.005, 0.28): from half a percent of the training to about the average of all.
    """
    if not 0.005 <= sigma < 0.28:
        raise ValueError(f"expected a length of an average from 0.005 to 0.28, found {sigma}")
    t = sigma**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


def power_decay(exponent: float, step: int) -> float:
    """Return the decay of the update after step `step` (from 1): (1 - 1/step)^(γ + 1); 0 at the first. Eq. 127."""
    return (1 - 1 / step) ** (exponent + 1)


@torch.no_grad()
def update_power_averages(
    averages: Sequence[Sequence[Tensor]], exponents: Sequence[float], weights: Sequence[Tensor], step: int
) -> None:
    """Update power averages after step `step`, counted from 1, as `update_averages`."""
    for average, exponent in zip(averages, exponents, strict=True):
        torch._foreach_lerp_(list(average), list(weights), 1 - power_decay(exponent, step))


class Snapshot(NamedTuple):
    """A power average of length `sigma` that ends at step `step`."""

    sigma: float
    step: int


class Combination(NamedTuple):
    """How to combine snapshots to another average.

    Attributes:
        factors: (n,) float64, of each snapshot; their sum is 1.
        error: L2 distance of the combined profile to the wanted one, relative to that one.
    """

    factors: NDArray[np.float64]
    error: float

    @property
    def rounding(self) -> float:
        """Relative error of a weight from the rounding of float16 snapshots, which large factors of both signs add."""
        return float(np.linalg.norm(self.factors)) * HALF_ROUNDING


def combine_snapshots(snapshots: Sequence[Snapshot], wanted: Snapshot) -> Combination:
    """Return the combination of snapshots whose profile is closest to the wanted one: least squares. Eq. 132-136.

    The sum of the factors is constrained to 1, so that few snapshots do not shrink the weights.
    """
    steps = np.asarray([float(snapshot.step) for snapshot in (*snapshots, wanted)])
    exponents = np.asarray([power_exponent(snapshot.sigma) for snapshot in (*snapshots, wanted)])
    products = _profile_products(steps, exponents)
    with_wanted, own = products[:-1, -1], products[-1, -1]
    # Conditions of the constrained minimum: the last row is the constraint, the last unknown its multiplier.
    system = np.ones_like(products)
    system[:-1, :-1], system[-1, -1] = products[:-1, :-1], 0
    factors: NDArray[np.float64] = np.linalg.lstsq(system, np.append(with_wanted, 1), rcond=1e-13)[0][:-1].astype(
        np.float64
    )
    squared = own - 2 * factors @ with_wanted + factors @ products[:-1, :-1] @ factors
    return Combination(factors, float(np.sqrt(max(0.0, squared) / own)))


def _profile_products(steps: NDArray[np.float64], exponents: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the integrals (n,n) of the products of profiles, each of area 1, that end at `steps`. Eq. 136."""
    one, two = steps[:, None], steps[None]
    power = np.where(one < two, exponents[None], -exponents[:, None])
    areas = (exponents[:, None] + 1) * (exponents[None] + 1)
    total = exponents[:, None] + exponents[None] + 1
    products: NDArray[np.float64] = areas * (one / two) ** power / (total * np.maximum(one, two))
    return products
