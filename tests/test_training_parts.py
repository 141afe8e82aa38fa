"""Parts of a training step: random draws, EMA, divergence guard, clipping, background checkpoints."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import InternalTorchDynamoError

from svgpipe.manifests.checkpoint import Checkpoint, CheckpointStore
from svgpipe.manifests.diffusion_section import DiffusionSection, DiTSection
from svgpipe.manifests.errors import ArtifactError, DivergedError, SvgpipeError
from svgpipe.manifests.manifest import read_json
from svgpipe.models.ema import new_average, update_averages, warmed_decay
from svgpipe.stages.runtime import retry
from svgpipe.stages.train_diffusion.loss import LossByTime, draws_at
from svgpipe.stages.train_diffusion.trainer import FlowTrainer
from svgpipe.stages.training.checkpointing import BackgroundSaver
from svgpipe.stages.training.distributed import ProcessGroup, gradient_norms
from svgpipe.stages.training.divergence import DivergenceGuard
from svgpipe.stages.training.loop import explained_errors

ALONE = ProcessGroup(torch.device("cpu"))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**40), st.integers(0, 10**7), st.lists(st.integers(0, 300), min_size=1, max_size=9))
def test_a_sample_does_not_depend_on_its_batch(seed: int, step: int, positions: list[int]) -> None:
    cpu = torch.device("cpu")
    together = draws_at(seed, step, positions, 4, 3, cpu)
    for i, position in enumerate(positions):
        alone = draws_at(seed, step, [position], 4, 3, cpu)
        assert torch.equal(alone.noise[0], together.noise[i])
        assert (alone.time[0], alone.drop[0]) == (together.time[i], together.drop[i])


def test_draws_are_normal_uniform_and_differ_between_steps() -> None:
    found = draws_at(3, 5, range(400), 16, 8, torch.device("cpu"))
    assert abs(found.noise.mean().item()) < 0.02
    assert found.noise.std().item() == pytest.approx(1, abs=0.02)
    for values in (found.time, found.drop):
        assert torch.histc(values, 4, 0, 1).min() > 60
    assert abs(np.corrcoef(found.time, found.drop)[0, 1]) < 0.15
    assert abs(np.corrcoef(found.time, found.noise[:, 0, 0])[0, 1]) < 0.15
    assert not torch.equal(found.noise, draws_at(3, 6, range(400), 16, 8, torch.device("cpu")).noise)


def test_averages_are_warmed_up() -> None:
    """Closed form for weights that jump from 0 to 1: the remaining weight of 0 is the product of the decays."""
    assert [warmed_decay(0.9999, n) for n in (0, 8, 10**6)] == [0.1, 0.5, 0.9999]
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    averages, decays = [new_average(model) for _ in range(2)], (0.9999, 0.5)
    torch.nn.init.ones_(model.weight)
    left = np.ones(2)
    for n in range(200):
        update_averages([list(average.parameters()) for average in averages], decays, [model.weight], n)
        left *= [warmed_decay(decay, n) for decay in decays]
    found = [1 - average.weight.item() for average in averages]
    np.testing.assert_allclose(found, left, atol=1e-6)
    assert found[0] < 1e-3  # without warm-up 0.98 of the initial weights would be left


def test_a_failed_compilation_in_a_training_worker_is_explained() -> None:
    """Ray passes on messages, and not the classes of other libraries."""
    told = r"torch\.compile failed .*no g\+\+.*diffusion\.compile=false"
    with pytest.raises(SvgpipeError, match=told), explained_errors("Use less memory."):
        raise InternalTorchDynamoError("no g++")


@pytest.mark.parametrize(
    ("keep", "every", "kept"), [(2, None, [40, 44]), (1, 12, [12, 24, 36, 44]), (3, 20, [20, 36, 40, 44])]
)
def test_keep_every_and_the_latest_checkpoints_are_kept(
    tmp_path: Path, keep: int, every: int | None, kept: list[int]
) -> None:
    store = CheckpointStore(tmp_path, keep, every)
    for step in range(4, 48, 4):
        store.save(Checkpoint(step, {"raw": {"w": torch.full((2,), float(step))}}, {}))
    assert sorted(int(path.name[5:]) for path in tmp_path.glob("step-*")) == kept
    assert [entry["step"] for entry in read_json(tmp_path / "latest.json")["checkpoints"]] == kept
    newest = store.latest(print)
    assert newest is not None
    assert newest.groups["raw"]["w"].tolist() == [44, 44]


def test_a_background_checkpoint_holds_the_state_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training changes the weights while the thread writes them."""
    monkeypatch.setattr(retry, "WAITS_S", (0.0,))
    store = CheckpointStore(tmp_path)
    saver, weights = BackgroundSaver(store, print), torch.zeros(1_000_000)
    saver.save(Checkpoint(1, {"raw": {"w": weights}}, {}))
    weights += 1
    saver.wait()
    saved = store.latest(print)
    assert saved is not None
    assert not saved.groups["raw"]["w"].any()
    (tmp_path / "latest.json").unlink()
    (tmp_path / "latest.json").mkdir()  # what cannot be written is told by the next call
    saver.save(Checkpoint(2, {"raw": {"w": weights}}, {}))
    with pytest.raises((OSError, ArtifactError)):
        saver.wait()
    saver.close()


def test_the_guard_names_losses_and_parameters(tmp_path: Path) -> None:
    guard = DivergenceGuard(["blocks.0.weight", "blocks.1.weight"], lambda: tmp_path / "step-00000002")
    for step in range(1, 8):
        guard.watch(step, torch.tensor(0.5), torch.tensor([1.0, 2.0]))
    with pytest.raises(DivergedError) as error:
        guard.watch(8, torch.tensor(float("nan")), torch.tensor([1.0, float("inf")]))
    text = str(error.value)
    assert "diverged at step 8: the loss is nan, and 1 of 2 parameters have no finite gradient: blocks.1.weight" in text
    assert "0.5 (step 3), 0.5 (step 4), 0.5 (step 5), 0.5 (step 6), 0.5 (step 7)" in text
    assert "The last good checkpoint is" in text


def test_losses_are_averaged_per_bucket_of_time() -> None:
    gauge = LossByTime(torch.device("cpu"))
    gauge.add(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.0, 0.05, 1.0]))
    gauge.add(torch.tensor([7.0]), torch.tensor([0.5]))
    assert gauge.means() == {"loss_t0": 2.0, "loss_t9": 5.0, "loss_t5": 7.0}


def test_gradient_norms_equal_torch() -> None:
    torch.manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.zeros(3, 4)),
        torch.nn.Parameter(torch.zeros(5)),
        torch.nn.Parameter(torch.ones(2)),
    ]
    for parameter in parameters[:2]:
        parameter.grad = torch.randn_like(parameter)
    norms = gradient_norms(parameters, ALONE)
    assert norms[2] == 0
    expected = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    torch.testing.assert_close(torch.linalg.vector_norm(norms), expected)


@pytest.mark.parametrize("limit", [0.01, 1e9, None])
def test_gradients_are_clipped_as_the_recipe_says(limit: float | None) -> None:
    config = DiffusionSection(
        model=DiTSection(width=32, depth=1, heads=2), batch_size=4, precision="float32", clip_grad_norm=limit
    )
    trainer = FlowTrainer(config, ALONE, grid=(2, 2), channels=3, num_classes=2, scale=None, last_good=lambda: None)
    step = trainer(0, torch.randn(4, 4, 3), torch.tensor([0, 1, 0, 1]))
    left = torch.linalg.vector_norm(gradient_norms(trainer.parameters, ALONE))
    assert step.grad_norm > 0.01
    expected = torch.tensor(0.01) if limit == 0.01 else step.grad_norm
    torch.testing.assert_close(left, expected, rtol=1e-3, atol=0)
