"""int8 steps of the channels, chosen by mean squared error. `FeatureStore.quantize` applies them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.feature_store import INT8_LIMIT

# Feature vectors that steps are chosen on: about 50 MB at 392 channels.
SAMPLED_VECTORS = 32_768
# Candidate limits as fractions of a channel's largest absolute value. Below 1 the tails are clipped. This is better if
# few values are large, because all others get finer steps.
CLIP_SHARES = np.geomspace(0.05, 1.0, 48)


def int8_scales(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return (C,) steps with minimal mean squared error, clipping included, for (n,C) normalised values.

    A channel of zeros gets step 1.
    """
    largest = np.abs(values).max(axis=0)
    best = np.full(values.shape[1], np.inf)
    scales = np.ones(values.shape[1], np.float32)
    for share in CLIP_SHARES:
        candidate = np.where(largest > 0, largest * share / INT8_LIMIT, 1.0).astype(np.float32)
        rounded = np.clip(np.rint(values / candidate), -INT8_LIMIT, INT8_LIMIT) * candidate
        error = np.square(rounded - values, dtype=np.float64).mean(axis=0)
        better = error < best
        best[better], scales[better] = error[better], candidate[better]
    return scales


def signal_to_noise(signal: NDArray[Any], noisy: NDArray[Any]) -> float:
    """Return dB: power of the deviations of the signal from its mean over power of the error; infinite if equal."""
    signal, noisy = signal.astype(np.float64), noisy.astype(np.float64)
    noise = np.square(noisy - signal).mean()
    return float("inf") if noise == 0 else float(10 * np.log10(signal.var() / noise))
