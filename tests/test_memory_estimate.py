"""What a training will take in memory is told before, and what cannot fit is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from svgpipe.manifests.recipe import DiffusionSection, DiTSection
from svgpipe.manifests.recipe_files import load_recipe
from svgpipe.stages.networks.autoencoder import build_autoencoder
from svgpipe.stages.networks.diffusion import build_dit
from svgpipe.stages.networks.perceptual import load_perceptual
from svgpipe.stages.train_autoencoder.memory import estimate_autoencoder
from svgpipe.stages.train_autoencoder.trainer import AutoencoderTrainer
from svgpipe.stages.train_diffusion.loss import draws_at, sample_losses
from svgpipe.stages.train_diffusion.memory import estimate_diffusion
from svgpipe.stages.training import memory_estimate
from svgpipe.stages.training.distributed import Team
from svgpipe.stages.training.memory_estimate import MemoryEstimate
from svgpipe.stages.training.parallel import Strategy

from .conftest import Finished, Outcome
from .test_train_diffusion import train_args

ALONE = Team(torch.device("cpu"))
SIZES: dict[str, Any] = {"grid": (4, 4), "channels": 12, "num_classes": 3}


def test_a_recipe_that_cannot_fit_is_refused_before_anything_is_held(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    huge = ("--set", "diffusion.model.width=32768", "--set", "diffusion.model.depth=200")
    found = svgpipe(*train_args(finished, tmp_path / "out", *huge))
    assert found.code == 2
    for word in ("this recipe takes about", "there are", "activation_checkpointing=true"):
        assert word in found.err
    again = svgpipe(*train_args(finished, tmp_path / "out"))  # the same place, with better options
    assert again.code == 0, again.err
    assert "memory: about" in again.err


def test_memory_short_just_now_is_a_warning(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_estimate, "available_memory", lambda device: (10_000, 10**12))
    found = svgpipe(*train_args(finished, tmp_path / "out"))
    assert found.code == 0
    assert "warning: only 0.00 GB of it are free" in found.err


def kept_for_backward(weights: Iterable[torch.Tensor], forward: Callable[[], object]) -> list[int]:
    """Bytes of every storage that a pass which really runs keeps, apart from the weights."""
    own, held = {w.untyped_storage().data_ptr() for w in weights}, {}
    alive = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return list(held.values())


@pytest.mark.parametrize("batch_size", [1, 6])
def test_the_estimate_holds_what_a_step_keeps(batch_size: int) -> None:
    config = DiffusionSection(model=DiTSection(width=64, depth=3, heads=2), batch_size=batch_size)
    torch.manual_seed(0)
    model = build_dit(config.model, **SIZES)
    draws, labels = draws_at(0, 0, range(batch_size), 16, 12, ALONE.device), torch.zeros(batch_size, dtype=torch.int64)
    tokens = torch.randn(batch_size, 16, 12)
    expected = kept_for_backward(
        model.parameters(), lambda: sample_losses(model, tokens, labels, draws, config, null_label=None).mean()
    )
    found = estimate_diffusion(config, ALONE, "ddp", **SIZES)
    assert found.activations == pytest.approx(sum(expected) * (1 + 2 / config.model.depth), rel=0.02)
    assert found.weights == 2 * sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_estimate_holds_what_a_step_of_the_autoencoder_keeps(finished: Finished, precision: str) -> None:
    section = load_recipe(str(finished.recipe_file), [f"autoencoder.precision={precision}"]).autoencoder
    model = build_autoencoder(section)
    perceptual = load_perceptual(section.perceptual, model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = estimate_autoencoder(section, ALONE, model, perceptual)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)  # it looked at a copy
    trainer = AutoencoderTrainer(model, section, ALONE, perceptual, lambda: None)
    assert trainer.discriminator is not None
    images = torch.randint(0, 255, (section.batch_size, 3, 32, 32), dtype=torch.uint8)
    parts = (model, trainer.discriminator)
    weights = [w for part in parts for w in (*part.parameters(), *part.buffers())]
    expected = kept_for_backward(weights, lambda: trainer(section.discriminator.start_step, images))
    # The step goes on to teach the discriminator, which keeps little and frees what was kept before.
    assert found.activations == pytest.approx(sum(expected) + 2 * max(expected), rel=0.15)
    assert found.optimizer == 2 * 4 * sum(p.numel() for group in trainer.parameters.values() for p in group)


def test_an_autoencoder_that_cannot_fit_is_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    given = ["--shards", finished.root / "shards", "--out", tmp_path / "out", "--recipe", finished.recipe_file]
    found = svgpipe("train-autoencoder", *given, "--set", "autoencoder.batch_size=9000000")
    assert found.code == 2
    assert "this recipe takes about" in found.err
    assert "smaller autoencoder.batch_size" in found.err
    untrained = svgpipe(
        "train-autoencoder",
        *given,
        *(p for v in ("batch_size=9000000", "steps=0") for p in ("--set", f"autoencoder.{v}")),
    )
    assert untrained.code == 0, untrained.err  # nothing is trained, so nothing has to fit


def test_what_makes_the_estimate_smaller() -> None:
    def of(size: int = 1, strategy: Strategy = "ddp", **more: object) -> MemoryEstimate:
        config = DiffusionSection(model=DiTSection(width=64, depth=8, heads=2), batch_size=32).model_copy(update=more)
        return estimate_diffusion(config, Team(torch.device("cpu"), 0, size), strategy, **SIZES)

    whole = of()
    np.testing.assert_allclose(of(accumulate=4).activations, whole.activations / 4, rtol=0.3)
    np.testing.assert_allclose(of(size=4).activations, whole.activations / 4, rtol=0.3)
    assert of(activation_checkpointing=True).activations < whole.activations / 2
    assert of(size=4, strategy="fsdp2").optimizer == whole.optimizer // 4
    assert of(ema_decays=(0.9, 0.99)).averages == 2 * whole.averages
