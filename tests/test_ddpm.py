"""Objective ddpm: noise and variance from a cache, as DiT trains and samples them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.evaluation import Report
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.manifest import read_json
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.models.ddpm import STEPS, Process, ddim_steps, equal_steps, noised, sample_ddpm
from svgpipe.models.dit import DiT
from svgpipe.models.guidance import Guidance
from svgpipe.pipeline.cli import main
from svgpipe.stages.sample import load
from svgpipe.stages.sample.edit import ImageEditor
from svgpipe.stages.sample.trajectory import trajectory

from .commands import run_and_kill
from .conftest import Finished, Outcome

DDPM = ["--set", "diffusion.objective=ddpm", "--set", "diffusion.model.learn_sigma=true"]


def ddpm_args(finished: Finished, out: Path) -> list[object]:
    given = ["--cache", finished.root / "cache", "--autoencoder", finished.root / "autoencoder", "--out", out]
    return ["train-diffusion", *given, "--recipe", finished.recipe_file, *DDPM]


def evaluate_args(finished: Finished, model: Path, out: Path, *more: object) -> list[object]:
    given = ["--diffusion", model, "--autoencoder", finished.root / "autoencoder", "--out", out]
    return ["sample-and-eval", *given, "--reference", finished.root / "shards", "--recipe", finished.recipe_file, *more]


@pytest.fixture(scope="session")
def ddpm(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ddpm") / "diffusion"
    assert main([str(a) for a in ddpm_args(finished, out)]) == 0
    return out


def test_it_trains_and_resumes(ddpm: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    entries = read_metrics(ddpm / "metrics.jsonl")
    losses = [e["loss"] for e in entries if "loss" in e]
    held = [e["heldout_loss"] for e in entries if "heldout_loss" in e]
    assert len(losses) == 12 and held[-1] < 1.0  # the squared error of the noise, which is 1 for a new model
    assert (ddpm / "samples" / "step-00000012.png").exists()
    run_and_kill(ddpm_args(finished, tmp_path / "killed"), (tmp_path / "killed/checkpoints/latest.json").exists)
    assert svgpipe(*ddpm_args(finished, tmp_path / "killed")).code == 0
    whole, found = (load_file(folder / "raw.safetensors") for folder in (ddpm, tmp_path / "killed"))
    assert all(torch.equal(whole[key], found[key]) for key in whole)


@pytest.mark.parametrize("solver", ["ddpm", "ddim"])
def test_samples_do_not_depend_on_their_batch(
    ddpm: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], solver: str
) -> None:
    change = ["--set", f"evaluation.solver={solver}", "--steps", "4", "--guidance", "1.0,1.5"]
    change += ["--set", "evaluation.guidance_channels=3"]
    change += ["--set", "evaluation.ddim_eta=0.5"] if solver == "ddim" else []
    stored = []
    for size in (4, 1):
        out = tmp_path / str(size) / "evaluation"
        done = svgpipe(*evaluate_args(finished, ddpm, out, *change, "--set", f"evaluation.batch_size={size}"))
        assert done.code == 0, done.err
        folders = sorted((tmp_path / str(size) / "latents").iterdir())
        stored.append([FeatureStore.open(folder).read_stored(np.arange(8)).astype(np.float32) for folder in folders])
    assert len(stored[0]) == 2
    for one, two in zip(*stored, strict=True):  # matrix products of another size round differently
        np.testing.assert_allclose(one, two, atol=2e-3 * np.abs(one).max())
    report = Report.read(tmp_path / "4" / "evaluation")
    sampler = next(r.sampler for r in report.results if r.sampler is not None)
    assert (sampler.solver, sampler.ddim_eta) == (solver, 0.5 if solver == "ddim" else None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--set", "evaluation.solver=euler"], ["expected ddpm or ddim", "objective ddpm", "found euler"]),
        (["--set", "evaluation.solver=ddim", "--steps", "600"], ["evaluation.steps", "600", "500"]),
        (["--set", "evaluation.solver=ddpm", "--steps", "1001"], ["expected 1 to 1000, found 1001"]),
        (["--set", "evaluation.solver=ddpm", "--set", "evaluation.ddim_eta=0.5"], ["ddim_eta belongs to solver ddim"]),
        (
            ["--set", "evaluation.solver=ddpm", "--set", "evaluation.guidance_mode=cfg_star-1-0"],
            ["cfg_star changes velocities"],
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    ddpm: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], change: list[str], words: list[str]
) -> None:
    found = svgpipe(*evaluate_args(finished, ddpm, tmp_path / "out", *change))
    assert found.code == 2, found.err
    for word in words:
        assert word in found.err
    flow = svgpipe(
        *evaluate_args(finished, finished.root / "diffusion", tmp_path / "out", "--set", "evaluation.solver=ddpm")
    )
    assert flow.code == 2 and "objective flow" in flow.err


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("diffusion.model.learn_sigma=false", "model.learn_sigma=true"),
        ("diffusion.cosine_loss=true", "cosine_loss belongs to objective flow"),
        ("diffusion.model.time_scale=1000.0", "belongs to objective flow"),
        ("diffusion.sample_steps=600", "diffusion.sample_steps"),
    ],
)
def test_recipes_that_cannot_work_are_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], change: str, word: str
) -> None:
    found = svgpipe(*ddpm_args(finished, tmp_path / "out"), "--set", change)
    assert found.code == 2 and word in found.err
    before = svgpipe("run", finished.recipe_file, "--workdir", tmp_path, "--source", tmp_path, *DDPM)
    assert before.code == 2 and "evaluation.solver" in before.err


def test_an_exported_model_samples_without_the_pipeline(
    ddpm: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    assert svgpipe("export", ddpm, "--out", tmp_path / "exported").code == 0
    config = read_json(tmp_path / "exported" / "config.json")
    assert config["objective"] == "ddpm"
    model = DiT(**config["model"]).eval()
    model.load_state_dict(load_file(tmp_path / "exported" / "model.safetensors"))
    x = torch.randn(2, model.grid[0] * model.grid[1], model.in_channels)
    latents = sample_ddpm(
        model, x, torch.tensor([0, 1]), null_label=model.null_label, numbers=equal_steps([4]),
        noise=lambda step: torch.randn_like(x),
    )  # fmt: skip
    assert latents.shape == x.shape and bool(latents.isfinite().all())


def test_analysis_says_that_there_are_no_velocities(
    ddpm: Path, finished: Finished, svgpipe: Callable[..., Outcome]
) -> None:
    found = svgpipe("analyze", finished.root / "cache", "--diffusion", ddpm)
    assert found.code == 0 and "not a velocity" in found.out.replace("\n", " "), found.err


@given(st.integers(2, STEPS))
def test_equal_steps_include_both_ends(count: int) -> None:
    numbers = equal_steps([count])
    assert len(set(numbers)) == len(numbers) == count
    assert (numbers[0], numbers[-1]) == (0, STEPS - 1) and numbers == sorted(numbers)


@pytest.mark.parametrize("ddim_eta", [None, 0.0, 1.0])
def test_a_perfect_model_recovers_the_distribution(ddim_eta: float | None) -> None:
    """Data of one value x: the true noise of any x_t is known. With the posterior's variance, all samples end at x."""
    value, process = 0.7, Process.of_training()

    def perfect(x_t: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        abar = process.abar[int(t[0])]
        eps = (x_t - abar.sqrt() * value) / (1 - abar).sqrt()
        return torch.cat([eps.float(), -torch.ones_like(x_t)], dim=-1)

    generator = torch.Generator().manual_seed(0)
    found = sample_ddpm(
        perfect,
        torch.randn(5, 3, 2, generator=generator),
        torch.zeros(5, dtype=torch.int64),
        null_label=1,
        numbers=equal_steps([20]),
        guidance=Guidance(3.0),
        noise=lambda step: torch.randn(5, 3, 2, generator=generator),
        ddim_eta=ddim_eta,
    )
    np.testing.assert_allclose(found.numpy(), value, atol=1e-3)


def test_the_last_step_is_almost_noise() -> None:
    x, eps = torch.full((1, 2, 2), 5.0), torch.randn(1, 2, 2)
    process = Process.of_training()
    torch.testing.assert_close(noised(x, eps, torch.tensor([0]), process), x, atol=0.1, rtol=0)
    torch.testing.assert_close(noised(x, eps, torch.tensor([STEPS - 1]), process), eps, atol=0.1, rtol=0)
    assert ddim_steps(25) == list(range(0, 1000, 40))


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
def test_the_steps_of_a_sampling_end_in_its_samples(ddpm: Path, solver: str) -> None:
    sampler = load(ddpm)
    assert sampler.settings().solver == "ddim"
    settings, labels = sampler.settings(f"evaluation.solver={solver}", steps=4), [0, 0, 1]
    states = trajectory(sampler, labels, settings)
    assert len(states) == 5
    np.testing.assert_array_equal(states[-1], sampler.images(labels, settings))
    assert (states[0] != states[-1]).any()


def test_editing_needs_a_flow(ddpm: Path) -> None:
    with pytest.raises(UsageError, match="objective flow, found ddpm"):
        ImageEditor(ddpm)
