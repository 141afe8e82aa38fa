"""95 % confidence intervals of metrics, by bootstrap.

Resampling with replacement repeats rows, so a resampled set is less diverse. This biases metrics of diversity, such as
a Fréchet distance. The replicates are therefore shifted until their mean is the metric value, before the 2.5 % and 97.5
% quantiles are taken. A mean is not biased, so its replicates are not shifted.
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
    """Return row numbers of `replicates` sets of `count` rows, drawn with replacement.

    They depend only on the arguments.
    """
    return [torch.randint(count, (count,), generator=generator(seed, "bootstrap", count, i)) for i in range(replicates)]


def estimate(value: float, replicates: Sequence[float], num_images: int, least: float = -math.inf) -> Estimate:
    """Return a metric value with its interval; without replicates it has none.

    `least` is the smallest possible value.
    """
    shift = value - sum(replicates) / max(1, len(replicates))
    least = min(least, value)  # rounding may give a value below it
    return quantile_estimate([max(least, replicate + shift) for replicate in replicates], value, num_images)


def mean_estimate(values: Tensor, replicates: int, seed: int) -> Estimate:
    """Return the mean of (n,) values with its interval; for hits and misses, see `share_estimate`."""
    numbers = values.double()
    resampled = [float(numbers[pick].mean()) for pick in picks(len(numbers), replicates, seed)]
    return quantile_estimate(resampled, float(numbers.mean()), len(numbers))


def quantile_estimate(replicates: Sequence[float], value: float, num_images: int) -> Estimate:
    """Return a value with the interval of its replicates, which are not shifted; without replicates it has none."""
    if not replicates:
        return Estimate(value=value, num_images=num_images)
    low, high = np.quantile(replicates, QUANTILES)
    return Estimate(value=value, low=float(low), high=float(high), num_images=num_images)


def share_estimate(hits: Tensor, *, interval: bool) -> Estimate:
    """Return the fraction of (n,) hits, with its Wilson interval, which has a width even if all or none are hits."""
    count, n = int(hits.sum()), len(hits)
    if not interval:
        return Estimate(value=count / n, num_images=n)
    ends = binomtest(count, n).proportion_ci(0.95, method="wilson")
    return Estimate(value=count / n, low=float(ends.low), high=float(ends.high), num_images=n)
