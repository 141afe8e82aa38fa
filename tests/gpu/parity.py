"""The device computes what the CPU computes: features, images, the transformer, one training step, attention."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch

from svgpipe.manifests.autoencoder_section import AutoencoderSection
from svgpipe.manifests.diffusion_section import DiffusionSection, DiTSection
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.models.attention import attend, fastest_kernel
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.stages.networks.autoencoder import build_autoencoder
from svgpipe.stages.networks.diffusion import build_dit
from svgpipe.stages.runtime.device import autocast
from svgpipe.stages.train_diffusion import trainer as trainer_module
from svgpipe.stages.train_diffusion.loss import Draws, draws_at
from svgpipe.stages.train_diffusion.trainer import FlowTrainer
from svgpipe.stages.training.distributed import ProcessGroup, replicate, shard_parameters

from .checks import Check, Setup, relative_error

CPU = torch.device("cpu")
# Relative errors: of float32 from another order of sums, of bfloat16 from 8 bits of mantissa.
FLOAT32, BFLOAT16 = 1e-4, 4e-2
SMALL = DiTSection(width=64, depth=2, heads=2)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Turn TF32 off. It has 10 bits of mantissa, and would be compared with float32 of the CPU."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution


def autoencoder(setup: Setup) -> Iterator[Check]:
    """Encoded and decoded images at 256 pixels: DINOv3 ViT-S/16+, and VA-VAE's size; small: 64. Random weights."""
    size = [] if not setup.small else ["autoencoder.image_size=64"]
    for kind in ("svg", "kl"):
        given = ["autoencoder.backbone.weights=random", f"autoencoder.kind={kind}", "autoencoder.kl.channels=32", *size]
        yield from _autoencoder(kind, load_recipe(None, given).autoencoder, setup)


def _autoencoder(kind: str, config: AutoencoderSection, setup: Setup) -> Iterator[Check]:
    model = build_autoencoder(config).eval()
    if isinstance(model, SVGAutoencoder):
        model.alignment = None
    images = torch.rand(4, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), exact_float32():
        features = model.encode(images)
        decoded = model.decode(model.latents(features))
        model.to(setup.device)
        for precision, limit in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
            with autocast(setup.device, precision):  # type: ignore[arg-type]
                found = model.encode(images.to(setup.device)).float()
                image = model.decode(model.latents(features).to(setup.device)).float()
            name = f"{precision}, against the CPU"
            yield Check(f"{kind}: encoded images, {name}", relative_error(found, features), at_most=limit)
            yield Check(f"{kind}: decoded images, {name}", relative_error(image, decoded), at_most=limit)


def transformer(setup: Setup) -> Iterator[Check]:
    """Velocities of DiT-S with random weights; also compiled."""
    torch.manual_seed(0)
    section = SMALL if setup.small else DiTSection()
    model = build_dit(DiffusionSection(model=section), grid=(16, 16), channels=392, num_classes=10).eval()
    for parameter in model.parameters():  # the zeros of the initialisation would make everything agree
        torch.nn.init.normal_(parameter, std=0.02)
    x, t, labels = torch.randn(4, 256, 392), torch.rand(4), torch.arange(4)
    with torch.no_grad(), exact_float32():
        expected = model(x, t, labels)
        model.to(setup.device)
        inputs = (x.to(setup.device), t.to(setup.device), labels.to(setup.device))
        for compiled in (False, True):
            run: Any = torch.compile(model) if compiled else model
            for precision, limit in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
                with autocast(setup.device, precision):  # type: ignore[arg-type]
                    error = relative_error(run(*inputs).float(), expected)
                name = f"DiT, {precision}{', compiled' if compiled else ''}, against the CPU"
                yield Check(name, error, at_most=limit)


def attention(setup: Setup) -> Iterator[Check]:
    """xformers against PyTorch's scaled_dot_product_attention, if it is installed and works on this GPU."""
    kernel = fastest_kernel()
    if kernel is None:
        return
    q, k, v = (torch.randn(2, 6, 256, 64, device=setup.device, dtype=torch.bfloat16) for _ in range(3))
    error = relative_error(attend(q, k, v, kernel), attend(q, k, v))
    yield Check("xformers against SDPA, bfloat16", error, at_most=BFLOAT16)


def _draws_of_the_cpu(*where: Any, **options: bool) -> Draws:
    """Draw noise on the CPU: that of a GPU comes from another generator. The last of `where` is the device."""
    draw: Any = draws_at
    drawn, device = draw(*where[:-1], CPU, **options), where[-1]
    from_posterior = None if drawn.posterior is None else drawn.posterior.to(device)
    return Draws(drawn.noise.to(device), drawn.time.to(device), drawn.drop.to(device), from_posterior)


def _step(device: torch.device, config: DiffusionSection, strategy: str = "") -> tuple[float, float, torch.Tensor]:
    """Return loss, gradient norm and weights after one step."""
    group = ProcessGroup(device)
    trainer = FlowTrainer(config, group, grid=(8, 8), channels=24, num_classes=4, scale=None, last_good=lambda: None)
    if strategy == "fsdp2":
        shard_parameters(trainer.model, trainer.model.all_blocks, group)
    elif strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        trainer.compiled = trainer.averaged = DistributedDataParallel(replicate(trainer.model, group))
    if strategy == "fsdp2":  # its parameters are other objects now; averages would have to be sharded too
        trainer.parameters = list(trainer.model.parameters())
        trainer.optimizer = torch.optim.AdamW(trainer.parameters, lr=config.learning_rate)
        trainer.averaged_parameters, trainer.config = [], config.model_copy(update={"ema_decays": ()})
    generator = torch.Generator().manual_seed(1)
    tokens, labels = torch.randn(8, 64, 24, generator=generator).half(), torch.arange(8) % 4
    with patch.object(trainer_module, "draws_at", _draws_of_the_cpu):
        result = trainer(0, tokens, labels)
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in trainer.model.parameters()]
    flat = torch.cat([weight.detach().flatten().float().cpu() for weight in weights])
    return float(result.loss), float(result.grad_norm), flat


def training_step(setup: Setup) -> Iterator[Check]:
    """Loss, gradient norm and weights after one step of diffusion training, for both objectives."""
    base = DiffusionSection(model=SMALL, batch_size=8, precision="float32", compile=False, learning_rate=1e-3)
    yield from _training_step("flow", base, setup)
    learned = SMALL.model_copy(update={"learn_sigma": True})
    yield from _training_step("ddpm", base.model_copy(update={"objective": "ddpm", "model": learned}), setup)


def _training_step(objective: str, base: DiffusionSection, setup: Setup) -> Iterator[Check]:
    loss, norm, weights = _step(CPU, base)
    for precision, limit in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        for compiled in (False, True):
            config = base.model_copy(update={"precision": precision, "compile": compiled})
            with exact_float32():
                found = _step(setup.device, config)
            name = f"one step, {objective}, {precision}{', compiled' if compiled else ''}"
            yield Check(f"{name}: loss", abs(found[0] - loss) / loss, at_most=limit)
            yield Check(f"{name}: gradient norm", abs(found[1] - norm) / norm, at_most=limit)
            # The first step of Adam moves each weight by about the learning rate, even if its gradient is tiny.
            # Rounding can change the sign of such a gradient.
            yield Check(f"{name}: weights", relative_error(found[2], weights), at_most=2e-2)


def process_groups(setup: Setup) -> Iterator[Check]:
    """DDP and FSDP2 in a group of one process, by NCCL on a GPU and gloo on a CPU."""
    backend = "nccl" if setup.device.type == "cuda" else "gloo"
    base = DiffusionSection(model=SMALL, batch_size=8, precision="float32", compile=False, ema_decays=(0.9,))
    with exact_float32():
        alone = _step(setup.device, base)
    torch.distributed.init_process_group(backend, init_method="tcp://127.0.0.1:29511", rank=0, world_size=1)
    try:
        for strategy in ("ddp", "fsdp2"):
            with exact_float32():
                found = _step(setup.device, base, strategy)
            yield Check(
                f"{strategy} by {backend}, one process: loss", abs(found[0] - alone[0]) / alone[0], at_most=FLOAT32
            )
            yield Check(
                f"{strategy} by {backend}, one process: weights", relative_error(found[2], alone[2]), at_most=2e-2
            )
    finally:
        torch.distributed.destroy_process_group()
