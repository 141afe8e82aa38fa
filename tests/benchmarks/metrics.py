"""All figures of one set of features, with their intervals, against torch-fidelity's figures without intervals.

    .venv/bin/python -m tests.benchmarks.metrics [--rows 50000]

The input is two sets of 50,000 x 2,048 features and 1,008 logits, correlated Gaussians. svgpipe computes FID, KID,
Inception Score, precision and recall with 95 % intervals from 100 resamplings; in one pass with precision and recall it
also computes density, coverage and the nearest reference images. torch-fidelity computes the same figures from the same
features, without intervals and without these three. Times are seconds of the wall clock without extracting features.
Peak memory is that of svgpipe above the features. The last line is JSON: svgpipe's time over torch-fidelity's
for every figure, the total time divided by 180 s, and the peak memory divided by 3 GB.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from svgpipe.stages.evaluate.metrics import Comparison, Features
from svgpipe.stages.runtime.device import peak_memory

DIMENSIONS, CLASSES, REPLICATES = 2048, 1008, 100
ALLOWED_S, ALLOWED_BYTES = 180, 3e9


def features(rows: int) -> tuple[Features, Features]:
    """Return samples and reference: features whose covariance decays, as Inception's."""
    torch.manual_seed(0)
    mix = torch.randn(DIMENSIONS, DIMENSIONS) * torch.linspace(1, 0.01, DIMENSIONS) / DIMENSIONS**0.5
    sets = [(torch.randn(rows, DIMENSIONS) @ mix + shift).abs_() for shift in (0.02, 0.0)]
    logits = torch.randn(rows, CLASSES).mul_(3)
    return Features(sets[0], logits), Features(sets[1])


def timed(what: Callable[[], object]) -> float:
    """Return seconds."""
    began = time.perf_counter()
    what()
    return time.perf_counter() - began


def of_fidelity(samples: Features, reference: Features) -> dict[str, Callable[[], object]]:
    """Return torch-fidelity's figures."""
    pooled, real, logits = samples.pooled, reference.pooled, samples.logits
    assert logits is not None

    def fid() -> object:
        both: tuple[Tensor, Tensor] = pooled.double(), real.double()
        return fid_statistics_to_metric(*map(fid_features_to_statistics, both), verbose=False)

    kid = {"kid_subsets": 50, "kid_subset_size": 1000, "rng_seed": 0, "verbose": False}
    prc = {"prc_neighborhood": 3, "prc_batch_size": 10000, "save_cpu_ram": False, "verbose": False}
    return {
        "FID": fid,
        "KID": lambda: kid_features_to_metric(pooled.double(), real.double(), **kid),
        "Inception Score": lambda: isc_features_to_metric(logits),
        "precision and recall": lambda: prc_features_to_metric(pooled, real, **prc),
    }


def of_svgpipe(samples: Features, reference: Features) -> dict[str, Callable[[], object]]:
    """Return the figures with intervals, each with all it needs of the reference."""
    comparison, logits = Comparison(reference, REPLICATES, 0), samples.logits
    neighbours = comparison.neighbours
    assert logits is not None and neighbours is not None
    return {
        "FID": lambda: comparison.frechet(samples.pooled),
        "KID": lambda: comparison.kernel(samples.pooled),
        "Inception Score": lambda: comparison.inception(logits),
        "precision and recall": lambda: neighbours.measure(samples.pooled),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    samples, reference = features(parser.parse_args().rows)
    held = peak_memory(torch.device("cpu"))
    ours = {name: timed(measure) for name, measure in of_svgpipe(samples, reference).items()}
    peak = peak_memory(torch.device("cpu")) - held
    print(f"{'figure':24}{'svgpipe, s':>12}{'torch-fidelity, s':>20}{'ratio':>8}", flush=True)
    ratios = {}
    for name, measure in of_fidelity(samples, reference).items():
        theirs = timed(measure)
        ratios[name] = ours[name] / theirs
        print(f"{name:24}{ours[name]:12.1f}{theirs:20.1f}{ratios[name]:8.2f}", flush=True)
    total = sum(ours.values())
    print(f"svgpipe: {total:.0f} s, peak {peak / 1e9:.2f} GB above the features")
    ratios |= {"time_over_allowed": total / ALLOWED_S, "memory_over_allowed": peak / ALLOWED_BYTES}
    print(json.dumps({name: round(ratio, 3) for name, ratio in ratios.items()}))


if __name__ == "__main__":
    main()
