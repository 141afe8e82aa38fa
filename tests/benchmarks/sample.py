"""What sampling costs: ours against the official scheme, and guidance in an interval against guidance everywhere.

    .venv/bin/python -m tests.benchmarks.sample [--turns 4]

DiT-S on 16x16x392, batch 8, Euler with 12 steps, time shift 0.15, guidance 1.5, CPU or whatever GPU is there. In turns,
within one run:

- official: float32, conditional and unconditional velocity in two calls, at every step, as the official sampler does;
- float32: ours, both halves in one call;
- constant: ours, in bfloat16 as well, its linear layers kept so;
- compiled: the same through torch.compile, as `evaluation.compile=true` samples (compiling is not timed);
- interval: the same, guided only where 0.2 <= t <= 0.5 (three of the twelve steps);
- none: the same at guidance 1, where there is nothing to compute but the conditional half.

Medians. The last line is JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.precision import Precision
from svgpipe.manifests.recipe import DiTSection
from svgpipe.models.sampler import Guidance, sample, time_grid
from svgpipe.stages.sampling import build_dit, initial_noise, keep_as_computed
from svgpipe.stages.training import autocast, pick_device

BATCH, STEPS, SHIFT, SCALE = 8, 12, 0.15, 1.5
INTERVAL = "interval-0.2-0.5"


def official(model: torch.nn.Module, z: Tensor, labels: Tensor, null_label: int) -> Tensor:
    """RectifiedFlow.sample with a null label: v_u + w (v_c - v_u) from two calls, at every step."""
    grid = time_grid(STEPS, SHIFT)
    for t, dt in zip(grid.tolist(), grid.diff().tolist(), strict=False):
        at = torch.full((len(z),), t, device=z.device)
        conditional = model(z, at, labels)
        unconditional = model(z, at, torch.full_like(labels, null_label))
        z = z + dt * (unconditional + SCALE * (conditional - unconditional))
    return z


def ways() -> dict[str, Callable[[], Tensor]]:
    """Each draws the same batch."""
    device = pick_device()
    torch.manual_seed(0)
    model = build_dit(DiTSection(), grid=(16, 16), channels=392, num_classes=1000).to(device).eval()
    for parameter in model.parameters():  # zeros of the initialisation would make all of them agree
        torch.nn.init.normal_(parameter, std=0.02)
    half = copy.deepcopy(model)
    keep_as_computed(half, "bfloat16")
    compiled = copy.deepcopy(half)
    compiled.compile()
    noise = initial_noise(0, range(BATCH), 256, 392).to(device)
    labels = torch.arange(BATCH, device=device)

    def ours(precision: Precision, guidance: Guidance, velocity: torch.nn.Module = model) -> Callable[[], Tensor]:
        def draw() -> Tensor:
            with autocast(device, precision):
                return sample(
                    velocity,
                    noise,
                    labels,
                    null_label=model.null_label,
                    steps=STEPS,
                    shift=SHIFT,
                    guidance=guidance,
                )

        return draw

    return {
        "official": torch.no_grad()(lambda: official(model, noise, labels, model.null_label)),
        "float32": ours("float32", Guidance(SCALE)),
        "constant": ours("bfloat16", Guidance(SCALE), half),
        "compiled": ours("bfloat16", Guidance(SCALE), compiled),
        "interval": ours("bfloat16", Guidance(SCALE, INTERVAL), half),
        "none": ours("bfloat16", Guidance(), half),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    turns = parser.parse_args().turns
    all_ways = ways()
    torch.testing.assert_close(all_ways["float32"](), all_ways["official"](), rtol=1e-3, atol=1e-3)
    seconds: dict[str, list[float]] = {name: [] for name in all_ways}
    for turn in range(turns + 1):
        for name in list(all_ways) if turn % 2 else list(all_ways)[::-1]:
            started = time.perf_counter()
            all_ways[name]().cpu()
            if turn:
                seconds[name].append(time.perf_counter() - started)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:10}{value:8.3f} s per batch of {BATCH}{BATCH / value:10.2f} samples/s")
    guided = sum(0.2 <= t <= 0.5 for t in time_grid(STEPS, SHIFT)[:-1].tolist())
    ratios = {
        "over_official": medians["official"] / medians["compiled"],
        "over_official_eager": medians["official"] / medians["constant"],
        "over_official_float32": medians["official"] / medians["float32"],
        "interval_over_constant": medians["constant"] / medians["interval"],
        "interval_guided_share": guided / STEPS,
        "none_over_constant": medians["constant"] / medians["none"],
    }
    print(json.dumps({name: round(value, 3) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
