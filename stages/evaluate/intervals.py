"""95 % confidence intervals of metric values, by bootstrap.

Resampling with replacement repeats some rows, so a resampled set is less diverse than the set. This biases metrics of
diversity, such as a Fréchet distance. So the replicates are shifted until their mean is the metric value; then the
2.5 % and the 97.5 % quantile are taken. A mean is not biased: its replicates are not shifted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor

from svgpipe.manifests.estimate import Estimate
from svgpipe.models.seeds import generator

QUANTILES = (0.025, 0.975)


def picks(count: int, replicates: int, seed: int) -> list[Tensor]:
    """Row numbers of `replicates` sets of `count` rows, drawn with replacement. They depend on the arguments alone."""
    return [torch.randint(count, (count,), generator=generator(seed, "bootstrap", count, i)) for i in range(replicates)]


def estimate(value: float, replicates: Sequence[float], num_images: int, least: float = -math.inf) -> Estimate:
    """A metric value with its interval; without replicates it has none.

    least: the smallest possible value of the metric.
    """
    shift = value - sum(replicates) / max(1, len(replicates))
    least = min(least, value)  # that rounding may put below
    return _between([max(least, replicate + shift) for replicate in replicates], value, num_images)


def mean_estimate(values: Tensor, replicates: int, seed: int) -> Estimate:
    """The mean of (n,) values; of hits and misses, see `share_estimate`."""
    numbers = values.double()
    resampled = [float(numbers[pick].mean()) for pick in picks(len(numbers), replicates, seed)]
    return _between(resampled, float(numbers.mean()), len(numbers))


def _between(replicates: Sequence[float], value: float, num_images: int) -> Estimate:
    if not replicates:
        return Estimate(value=value, num_images=num_images)
    low, high = np.quantile(replicates, QUANTILES)
    return Estimate(value=value, low=float(low), high=float(high), num_images=num_images)


def share_estimate(hits: Tensor) -> Estimate:
    """The share of (n,) hits, with Wilson's interval: unlike the bootstrap's it has a width where all or none hit."""
    count, n = int(hits.sum()), len(hits)
    ends = binomtest(count, n).proportion_ci(0.95, method="wilson")
    return Estimate(value=count / n, low=float(ends.low), high=float(ends.high), num_images=n)
