"""Options for training on features of a vision model: wide head, data prediction, time shift from the dimension."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from svgpipe.manifests.diffusion_section import DiffusionSection, DiTSection
from svgpipe.manifests.evaluation import Report
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.models.dit import DiT
from svgpipe.models.flow import MIN_LEFT, flow_loss, velocity_of_data
from svgpipe.models.guidance import Guidance
from svgpipe.models.sampler import sample
from svgpipe.pipeline.cli import main
from svgpipe.stages.networks.diffusion import build_dit, dit_arguments, width_warning
from svgpipe.stages.train_diffusion.loss import draws_at, times_of, training_losses

from .commands import run_and_kill
from .conftest import Finished, Outcome
from .test_train_diffusion import same_weights, train_args

OPTIONS = (
    "diffusion.model={width: 32, depth: 2, heads: 2, rms_norm: true, swiglu: true, rope: true, fourier_time: true, "
    "auxiliary_depth: 1, wide_head: {width: 48, depth: 1, heads: 2}}",
    "diffusion.predict_data=true",
    "diffusion.power_averages={sigmas: [0.1], every: 4}",
    "diffusion.time_shift=from-dimension",
    "diffusion.sample_shift=from-dimension",
)


def args(finished: Finished, out: Path, *more: object) -> list[object]:
    sets = [part for option in OPTIONS for part in ("--set", option)]
    return train_args(finished, out, *sets, *more)


@pytest.fixture(scope="module")
def trained(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("options") / "diffusion"
    assert main([str(a) for a in args(finished, out)]) == 0
    return out


def test_velocity_of_predicted_data_is_that_of_a_gaussian() -> None:
    """For normal data, the best prediction of the data and the best velocity are known; near the data it is bounded."""
    mean, variance, z = 0.7, 0.3, torch.linspace(-2, 2, 5).view(1, 5, 1)
    for t in (0.0, 0.3, 0.9, 0.95, 0.99, 1.0):
        gain = (z - t * mean) / (t**2 * variance + (1 - t) ** 2)
        data, noise = mean + t * variance * gain, (1 - t) * gain
        found = velocity_of_data(data, z, torch.tensor([t]))
        torch.testing.assert_close(found, (data - noise) * min(1.0, (1 - t) / MIN_LEFT), atol=1e-5, rtol=1e-5)


def test_the_loss_of_predicted_data_is_that_of_the_velocity() -> None:
    """It is the squared error of the data, divided by the square of the time that is left, which is bounded."""
    source = torch.Generator().manual_seed(0)
    data, noise, error = (torch.randn(4, 3, 2, generator=source) for _ in range(3))
    t, y = torch.tensor([0.0, 0.5, 0.99, 1.0]), torch.zeros(4, dtype=torch.int64)

    def model(z: Tensor, at: Tensor, labels: Tensor) -> Tensor:
        return velocity_of_data(data + error, z, at)

    found = flow_loss(model, data, noise, t, y, of_data=True).per_sample
    expected = error.square().mean((1, 2)) / (1 - t).clamp_min(MIN_LEFT) ** 2
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_wide_head_sees_label_and_position_through_the_blocks_alone() -> None:
    torch.manual_seed(0)
    wide = {"width": 24, "depth": 1, "heads": 2}
    model = DiT(grid=(3, 2), in_channels=5, num_classes=4, width=16, depth=1, heads=2, wide_head=wide).eval()
    assert torch.equal(model(torch.randn(2, 6, 5), torch.rand(2), torch.tensor([0, 4])), torch.zeros(2, 6, 5))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t = torch.randn(1, 6, 5), torch.tensor([0.4])
    with torch.no_grad():
        one, other = (model(x, t, torch.tensor([label])) for label in (0, 1))
        assert not torch.allclose(one, other)
        assert model.head is not None and isinstance(model.head.project, torch.nn.Linear)
        torch.nn.init.zeros_(model.head.project.weight)
        assert torch.equal(*(model(x, t, torch.tensor([label])) for label in (0, 1)))
        turned = torch.tensor([3, 0, 5, 1, 2, 4])  # without rotary positions, it does not know where a token lies
        torch.testing.assert_close(model(x[:, turned], t, torch.tensor([0])), model(x, t, torch.tensor([0]))[:, turned])


def test_the_shift_of_training_times_comes_from_the_latents() -> None:
    """A latent of 16,384 values halves the odds of the time."""
    config = DiffusionSection(time_shift="from-dimension")
    draws = draws_at(0, 3, range(50), 64, 256, torch.device("cpu"))
    u = draws.time
    torch.testing.assert_close(times_of(draws, config), 0.5 * u / (1 - 0.5 * u))


def test_a_wide_head_replaces_a_wide_transformer() -> None:
    narrow = DiTSection(width=384)
    assert "wide_head of that width" in (width_warning(narrow, 392) or "")
    assert width_warning(DiTSection.model_validate({"width": 384, "wide_head": {}}), 392) is None
    small = DiTSection.model_validate({"width": 384, "wide_head": {"width": 128, "heads": 4}})
    assert "diffusion.model.wide_head.width 128 is below the 392 values" in (width_warning(small, 392) or "")
    assert "predict_data" not in dit_arguments(DiffusionSection(), grid=(2, 2), channels=4, num_classes=3)


def test_a_model_with_every_option_exports_and_samples(
    trained: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    losses = [entry["loss"] for entry in read_metrics(trained / "metrics.jsonl") if "loss" in entry]
    assert losses[-1] < losses[0]
    rows, columns, channels = finished.cache.manifest.latent_shape
    shift = (4096 / (rows * columns * channels)) ** 0.5
    assert svgpipe("export", trained, "--out", tmp_path / "exported").code == 0
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["time_shift"] == {"training": pytest.approx(shift), "sampling": pytest.approx(shift)}
    model = DiT(**config["model"])
    model.load_state_dict(load_file(tmp_path / "exported" / "model.safetensors"))
    out = tmp_path / "evaluation"
    given = ("--diffusion", trained, "--autoencoder", finished.root / "autoencoder", "--out", out)
    more = ("--reference", finished.root / "shards", "--recipe", finished.recipe_file)
    sets = ("--set", "evaluation.time_shift=from-dimension", "--set", "evaluation.internal_guidance=true")
    done = svgpipe("sample-and-eval", *given, *more, *sets)
    assert done.code == 0, done.err
    assert f"time_shift {shift:.3g}, from the dimension of a latent: {rows * columns} cells x {channels}" in done.err
    samplers = [one.sampler for one in Report.read(out).results if one.sampler is not None]
    assert all(one.time_shift == pytest.approx(shift) and one.internal for one in samplers)
    assert "by the auxiliary head" in (out / "report.html").read_text()


def test_a_killed_training_with_every_option_ends_with_the_same_weights(
    trained: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "killed"
    run_and_kill(args(finished, out), (out / "checkpoints" / "latest.json").exists)
    resumed = svgpipe(*args(finished, out))
    assert resumed.code == 0 and "resumed at step" in resumed.err, resumed.err
    assert "time_shift" in resumed.err and "from the dimension of a latent" in resumed.err
    assert same_weights(out, trained)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_workers_take_the_same_course_with_every_option(
    trained: Path, finished: Finished, ray_session: None, tmp_path: Path, svgpipe: Callable[..., Outcome], strategy: str
) -> None:
    out = tmp_path / "two"
    done = svgpipe(*args(finished, out, "--workers", 2, "--strategy", strategy))
    assert done.code == 0, done.err
    for name in ("loss", "grad_norm"):
        ours, theirs = ([e[name] for e in read_metrics(f / "metrics.jsonl") if name in e] for f in (out, trained))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    for path in (trained / "averages").glob("*.safetensors"):
        ours, theirs = (load_file(folder / "averages" / path.name) for folder in (out, trained))
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=2e-3, atol=1e-4)  # float16


def test_internal_guidance_extrapolates_from_the_auxiliary_head() -> None:
    """And evaluates the model once per step."""
    torch.manual_seed(0)
    model = DiT(grid=(2, 2), in_channels=4, num_classes=3, width=16, depth=3, heads=2, auxiliary_depth=2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    z, y, calls = torch.randn(2, 4, 4), torch.tensor([0, 2]), []
    model.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    tokens: list[Tensor] = []
    hook = model.blocks[1].register_forward_hook(lambda block, given, out: tokens.append(out))
    final, auxiliary = model.final_and_auxiliary(z, torch.full((2,), 0.5), y)
    hook.remove()
    torch.testing.assert_close(final, model(z, torch.full((2,), 0.5), y))
    condition = model.t_embedder(torch.full((2,), 0.5)) + model.y_embedder(y)
    assert model.auxiliary_head is not None
    torch.testing.assert_close(auxiliary, model.auxiliary_head(tokens[0], condition[:, None]))
    calls.clear()
    guided = {"null_label": model.null_label, "steps": 2, "shift": 1.0, "internal": model.final_and_auxiliary}
    found = sample(model, z, y, guidance=Guidance(2.0, "interval-0.1-1"), **guided)  # type: ignore[arg-type]
    assert len(calls) == 2
    with torch.no_grad():
        middle = z + 0.5 * model(z, torch.zeros(2), y)  # before 0.1, there is no guidance
        final, auxiliary = model.final_and_auxiliary(middle, torch.full((2,), 0.5), y)
        torch.testing.assert_close(found, middle + 0.5 * (auxiliary + 2 * (final - auxiliary)))
    with pytest.raises(ValueError, match="needs an auxiliary head"):
        DiT(grid=(2, 2), in_channels=4, num_classes=3, width=16, depth=2, heads=2).final_and_auxiliary(z, z[:, 0, 0], y)


def test_internal_guidance_needs_an_auxiliary_head(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], photographs: Path
) -> None:
    given = ("--diffusion", finished.root / "diffusion", "--autoencoder", finished.root / "autoencoder")
    more = ("--reference", finished.root / "shards", "--recipe", finished.recipe_file, "--out", tmp_path / "out")
    option = ("--set", "evaluation.internal_guidance=true")
    refused = svgpipe("sample-and-eval", *given, *more, *option)
    assert refused.code == 2 and "no auxiliary head" in refused.err and "auxiliary_depth=1" in refused.err
    refused = svgpipe("run", finished.recipe_file, "--workdir", tmp_path / "w", "--source", photographs, *option)
    assert refused.code == 2 and "no auxiliary head" in refused.err and not (tmp_path / "w" / "shards").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--guide", "{trained}"), "replaces the model of --guide"),
        (("--set", "evaluation.guidance_mode=cfg_star-1-0"), "neither a guide nor an auxiliary head"),
    ],
)
def test_internal_guidance_does_not_go_with_other_guidance(
    trained: Path,
    finished: Finished,
    tmp_path: Path,
    svgpipe: Callable[..., Outcome],
    more: tuple[str, str],
    words: str,
) -> None:
    given = ("--diffusion", trained, "--autoencoder", finished.root / "autoencoder", "--recipe", finished.recipe_file)
    where = ("--reference", finished.root / "shards", "--out", tmp_path / "out")
    option = ("--set", "evaluation.internal_guidance=true")
    refused = svgpipe("sample-and-eval", *given, *where, *option, *(part.format(trained=trained) for part in more))
    assert refused.code == 2 and words in refused.err, refused.err


def test_a_wide_head_on_latents_of_a_vae_is_warned_about(
    vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    given = ("--cache", vaes / "kl" / "cache", "--out", tmp_path / "out", "--recipe", finished.recipe_file)
    wide = ("--set", "diffusion.model.wide_head={width: 16, depth: 1, heads: 2}", "--set", "diffusion.steps=1")
    done = svgpipe("train-diffusion", *given, *wide)
    assert done.code == 0 and "these are latents of a KL autoencoder" in done.err, done.err


def test_an_auxiliary_head_adds_its_loss() -> None:
    """A new model predicts zero with both heads, so both losses are equal."""
    x1, y = torch.randn(4, 4, 3, generator=torch.Generator().manual_seed(0)), torch.zeros(4, dtype=torch.int64)
    draws = draws_at(0, 0, range(4), 4, 3, torch.device("cpu"))
    losses = []
    for depth in (None, 1):
        sizes = {"width": 16, "depth": 2, "heads": 2, "auxiliary_depth": depth}
        config = DiffusionSection(model=DiTSection(**sizes), precision="float32")
        model = build_dit(config, grid=(2, 2), channels=3, num_classes=2)
        losses.append(training_losses(model, x1, y, draws, config, model.null_label)[0])
    torch.testing.assert_close(losses[1], 2 * losses[0])


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("diffusion.time_shift=from-size", "diffusion.time_shift: expected a number above 0, or from-dimension, found"),
        ("diffusion.time_shift=-1", "diffusion.time_shift: expected a number above 0, or from-dimension, found"),
        ("diffusion.model.wide_head={width: 50, heads: 4}", "wide_head: width 50 is not divisible by heads 4"),
        ("diffusion.model.wide_head={wide: 50}", "wide"),
        ("diffusion.model.auxiliary_depth=2", "auxiliary_depth 2 is not a block before the last one, 2"),
    ],
)
def test_impossible_options_are_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], option: str, words: str
) -> None:
    refused = svgpipe(*train_args(finished, tmp_path / "out", "--set", option))
    assert refused.code == 2 and words in refused.err and not (tmp_path / "out").exists(), refused.err
