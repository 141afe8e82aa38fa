"""Cost of sampling: svgpipe against the official scheme, and guidance in an interval against guidance everywhere.

    .venv/bin/python -m tests.benchmarks.sample [--turns 4]

DiT-S on 16x16x392, batch 8, Euler with 12 steps, time shift 0.15, guidance 1.5, on the GPU if there is one. Each
variant has its own process, set up like a worker; they run in turns, one at a time:

- official: float32, conditional and unconditional velocity in two calls at every step, like the official sampler;
- float32: svgpipe, both halves in one call;
- constant: svgpipe, in the precision of `auto` on this machine (bfloat16 if it has the instructions);
- compiled: the same with torch.compile, as with `evaluation.compile=true` (compiling is not timed);
- interval: `constant`, guided only where 0.2 <= t <= 0.5 (three of the twelve steps);
- both: `compiled`, guided in that interval;
- none: `constant` at guidance 1, with the conditional half only;
- limit: only the matrix products and the attention of `constant`, on prepared tensors.

Medians. The last line is JSON: `sample_over_products` is the time of `constant` over that of `limit`; `over_official`
is `compiled` against the official scheme (the same samples up to rounding); `limit_over_official` is the same if only
products and attention took time; `over_official_interval` is `both` against the official samples, which are guided
everywhere.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor

from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.precision import Precision, fastest_precision
from svgpipe.models.dit import DiT
from svgpipe.models.guidance import Guidance
from svgpipe.models.sampler import sample, time_grid
from svgpipe.stages.networks.diffusion import build_dit
from svgpipe.stages.networks.sampling import initial_noise, keep_as_computed
from svgpipe.stages.runtime.device import autocast, pick_device

from .products import Products

BATCH, STEPS, SHIFT, SCALE = 8, 12, 0.15, 1.5
INTERVAL = "interval-0.2-0.5"
WAYS = ("official", "float32", "constant", "compiled", "interval", "both", "none", "limit")


def build() -> tuple[DiT, Tensor, Tensor]:
    """Return the same model, noise and labels in every process."""
    device = pick_device()
    torch.manual_seed(0)
    model = build_dit(DiffusionSection(), grid=(16, 16), channels=392, num_classes=1000).to(device).eval()
    for parameter in model.parameters():  # the zeros of the initialisation would make all variants agree
        torch.nn.init.normal_(parameter, std=0.02)
    return model, initial_noise(0, range(BATCH), 256, 392).to(device), torch.arange(BATCH, device=device)


def official() -> Callable[[], Tensor]:
    """RectifiedFlow.sample with a null label: v_u + w (v_c - v_u) from two calls, at every step."""
    model, noise, labels = build()
    grid = time_grid(STEPS, SHIFT)

    @torch.no_grad()
    def draw() -> Tensor:
        z = noise
        for t, dt in zip(grid.tolist(), grid.diff().tolist(), strict=False):
            at = torch.full((len(z),), t, device=z.device)
            conditional = model(z, at, labels)
            unconditional = model(z, at, torch.full_like(labels, model.null_label))
            z = z + dt * (unconditional + SCALE * (conditional - unconditional))
        return z

    return draw


def ours(precision: Precision, guidance: Guidance, *, compiled: bool = False) -> Callable[[], Tensor]:
    """Sample like a worker of an evaluation."""
    model, noise, labels = build()
    keep_as_computed(model, precision)
    if compiled:
        model.compile()

    def draw() -> Tensor:
        with autocast(noise.device, precision):
            return sample(
                model, noise, labels, null_label=model.null_label, steps=STEPS, shift=SHIFT, guidance=guidance
            )

    return draw


def limit(precision: Precision) -> Callable[[], Tensor]:
    """Compute only the products of both halves, in their dtype: the limit of all fusing."""
    model, noise, labels = build()
    keep_as_computed(model, precision)
    with torch.no_grad(), autocast(noise.device, precision):
        both, t = torch.cat([noise, noise]), torch.full((2 * BATCH,), 0.5, device=noise.device)
        null = torch.full_like(labels, model.null_label)
        products = Products(model, lambda: model(both, t, torch.cat([labels, null])))

    def draw() -> Tensor:
        for _ in range(STEPS):
            out = products.forward()
        return out

    return draw


def way(name: str) -> Callable[[], Tensor]:
    """Return what one process does at its turns."""
    constant, interval = Guidance(SCALE), Guidance(SCALE, INTERVAL)
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "official": official,
        "float32": lambda: ours("float32", constant),
        "constant": lambda: ours(fastest_precision(), constant),
        "compiled": lambda: ours(fastest_precision(), constant, compiled=True),
        "interval": lambda: ours(fastest_precision(), interval),
        "both": lambda: ours(fastest_precision(), interval, compiled=True),
        "none": lambda: ours(fastest_precision(), Guidance()),
        "limit": lambda: limit(fastest_precision()),
    }
    return makers[name]()


def serve(name: str, pipe: Connection) -> None:
    """Run a variant in a process: send its samples once, then its seconds as often as requested."""
    draw = way(name)
    pipe.send(draw().float().cpu().numpy())
    while pipe.recv():
        started = time.perf_counter()
        draw().cpu()
        pipe.send(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    turns = parser.parse_args().turns
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    samples = {}
    for name in WAYS:
        pipes[name], theirs = context.Pipe()
        context.Process(target=serve, args=(name, theirs), daemon=True).start()
        samples[name] = pipes[name].recv()  # one at a time
    np.testing.assert_allclose(samples["float32"], samples["official"], rtol=1e-3, atol=1e-3)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(turns + 1):
        for name in WAYS if turn % 2 else WAYS[::-1]:
            pipes[name].send(True)
            taken = pipes[name].recv()
            if turn:
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send(False)
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:10}{value:8.3f} s per batch of {BATCH}{BATCH / value:10.2f} samples/s")
    guided = sum(0.2 <= t <= 0.5 for t in time_grid(STEPS, SHIFT)[:-1].tolist())
    ratios = {
        "over_official": medians["official"] / medians["compiled"],
        "sample_over_products": medians["constant"] / medians["limit"],
        "sample_over_products_compiled": medians["compiled"] / medians["limit"],
        "limit_over_official": medians["official"] / medians["limit"],
        "over_official_eager": medians["official"] / medians["constant"],
        "over_official_float32": medians["official"] / medians["float32"],
        "over_official_interval": medians["official"] / medians["both"],
        "interval_over_constant": medians["constant"] / medians["interval"],
        "interval_guided_share": guided / STEPS,
        "none_over_constant": medians["constant"] / medians["none"],
    }
    print(json.dumps({"precision": fastest_precision(), **{name: round(value, 3) for name, value in ratios.items()}}))


if __name__ == "__main__":
    main()
