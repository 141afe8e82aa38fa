"""Figures over several results: distances over seeds, and ratios to held-out images over feature spaces."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from svgpipe.manifests.evaluation import Measured, SamplerInfo, SeedSpread


def over_seeds(results: Sequence[Measured], extractor: str) -> list[SeedSpread]:
    """Return the distances of every setting over its seeds; none if there is one seed.

    Args:
        results: of the sweep.
        extractor: name of the feature space of `frechet_distance`.
    """
    settings: dict[tuple[int, float], list[tuple[SamplerInfo, Measured]]] = {}
    for result in results:
        if (sampler := result.sampler) is not None:
            settings.setdefault((sampler.steps, sampler.guidance), []).append((sampler, result))
    spreads = []
    for (steps, guidance), repeats in settings.items():
        if len(repeats) < 2:
            continue
        distances = {extractor: [result.frechet_distance.value for _, result in repeats]}
        for name in repeats[0][1].spaces:
            distances[name] = [result.spaces[name].value for _, result in repeats]
        spreads += [
            SeedSpread(
                steps=steps,
                guidance=guidance,
                space=name,
                seeds=[sampler.seed for sampler, _ in repeats],
                minimum=min(values),
                mean=statistics.mean(values),
                deviation=statistics.stdev(values),
            )
            for name, values in distances.items()
        ]
    return spreads


def with_ratios(results: Sequence[Measured], heldout: str) -> list[Measured]:
    """Return the results with `distance_ratio`, if they were measured in other spaces and there are held-out images.

    The mean over the spaces of FD(samples, train) / FD(held-out, train). Source: FDr of arXiv 2604.28190.

    Args:
        results: of all sets.
        heldout: name of the held-out images.
    """
    real = next((result for result in results if result.name == heldout), None)
    if real is None or not real.spaces:
        return list(results)
    least = {"": real.frechet_distance.value} | {name: distance.value for name, distance in real.spaces.items()}
    if min(least.values()) <= 0:  # held-out images that are the reference
        return list(results)

    def ratio(result: Measured) -> float:
        own = {"": result.frechet_distance.value} | {name: one.value for name, one in result.spaces.items()}
        return statistics.mean(own[name] / least[name] for name in least)

    return [result.model_copy(update={"distance_ratio": ratio(result)}) for result in results]
