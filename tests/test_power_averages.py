"""Power averages of weights (EDM2): their formulas, snapshots of a training, and `svgpipe ema`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from svgpipe.manifests.model_manifests import DiffusionManifest
from svgpipe.models.ema import Snapshot, combine_snapshots, power_decay, power_exponent
from svgpipe.pipeline.cli import main

from .commands import run_and_kill
from .conftest import Finished, Outcome

SIGMAS = (0.05, 0.1)
STEPS, EVERY = 40, 4
SETTINGS = (
    f"diffusion.steps={STEPS}",
    f"diffusion.power_averages={{sigmas: [{SIGMAS[0]}, {SIGMAS[1]}], every: {EVERY}}}",
    "diffusion.checkpoint_every=5",
    "diffusion.quality_every=40",
)


def arguments(finished: Finished, out: Path, *more: str) -> list[object]:
    sets = [part for change in (*SETTINGS, *more) for part in ("--set", change)]
    given = ["--cache", finished.root / "cache", "--out", out, "--recipe", finished.recipe_file]
    return ["train-diffusion", *given, *sets]


@pytest.fixture(scope="module")
def trained(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("power") / "diffusion"
    assert main([str(argument) for argument in arguments(finished, out)]) == 0
    return out


@given(st.floats(0.01, 0.27))
def test_the_length_of_a_profile_is_its_standard_deviation(sigma: float) -> None:
    exponent = power_exponent(sigma)
    mean = (exponent + 1) / (exponent + 2)  # of s^exponent on [0, 1]
    variance = (exponent + 1) / (exponent + 3) - mean**2
    assert np.sqrt(variance) == pytest.approx(sigma, rel=1e-6)


def _profile(sigma: float, steps: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Return the weight of every step in the average after `steps` updates."""
    weights = np.zeros(steps)
    for step in range(1, steps + 1):
        decay = power_decay(power_exponent(sigma), step)
        weights *= decay
        weights[step - 1] = 1 - decay
    return weights


def test_updates_weight_steps_with_a_power_of_their_number() -> None:
    steps, exponent = 2000, power_exponent(0.1)
    weights = _profile(0.1, steps)
    numbers = np.arange(1, steps + 1)
    assert weights.sum() == pytest.approx(1)
    np.testing.assert_allclose(weights[500:], (exponent + 1) * (numbers[500:] / steps) ** exponent / steps, rtol=0.02)


@pytest.mark.parametrize("sigma", [0.03, 0.05, 0.07, 0.15, 0.2])
def test_snapshots_combine_to_other_lengths(sigma: float) -> None:
    steps, every = 2000, 50
    snapshots = [Snapshot(length, step) for length in SIGMAS for step in range(every, steps + 1, every)]
    combination = combine_snapshots(snapshots, Snapshot(sigma, steps))
    combined = np.zeros(steps)
    for (length, step), factor in zip(snapshots, combination.factors, strict=True):
        combined[:step] += factor * _profile(length, step)
    wanted = _profile(sigma, steps)
    error = np.linalg.norm(combined - wanted) / np.linalg.norm(wanted)
    assert combination.factors.sum() == pytest.approx(1)
    assert combination.error < 0.02 and error == pytest.approx(combination.error, abs=0.02)
    few = combine_snapshots([s for s in snapshots if s.step == steps], Snapshot(sigma, steps))
    assert (few.error > combination.error + 0.03) == (sigma not in SIGMAS)


def _distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """Return the L2 distance of all weights."""
    return sum(float((one[name].float() - two[name].float()).square().sum()) for name in one) ** 0.5


def test_reconstructed_weights_are_those_of_an_average_kept_in_training(
    finished: Finished, trained: Path, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    other = tmp_path / "direct"
    done = svgpipe(*arguments(finished, other, "diffusion.power_averages={sigmas: [0.07, 0.15], every: 40}"))
    assert done.code == 0, done.err
    made = svgpipe("ema", trained, "--sigma", "0.07,0.15,0.05")
    assert made.code == 0 and "power-0.07" in made.out, made.err
    raw = load_file(trained / "raw.safetensors")
    for sigma, kept_sigma in ((0.07, 0.05), (0.07, 0.1), (0.15, 0.1)):
        direct = load_file(other / "averages" / f"step-{STEPS:08d}-{sigma}.safetensors")
        kept = load_file(trained / "averages" / f"step-{STEPS:08d}-{kept_sigma}.safetensors")
        found = load_file(trained / f"power-{sigma}.safetensors")
        assert found.keys() == raw.keys()
        assert 0 < 4 * _distance(found, direct) < _distance(kept, direct)  # the rest: float16, and 40 discrete steps
    kept = load_file(trained / "averages" / f"step-{STEPS:08d}-0.05.safetensors")
    same = load_file(trained / "power-0.05.safetensors")
    for name, value in kept.items():
        assert torch.equal(same[name].half(), value)


def test_reconstructed_weights_are_sampled_exported_and_verified(
    finished: Finished, trained: Path, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    before = DiffusionManifest.read(model).fingerprint
    given = ["--diffusion", model, "--autoencoder", finished.root / "autoencoder", "--recipe", finished.recipe_file]
    sample = ["sample-and-eval", *given, "--reference", finished.root / "shards", "--ema", "power-0.12"]
    early = svgpipe(*sample, "--out", tmp_path / "samples")
    assert early.code == 2 and f"svgpipe ema {model} makes power averages" in early.err and "averages/" not in early.err
    made = json.loads(svgpipe("ema", model, "--sigma", "0.12", "--evaluate", finished.root / "cache", "--json").out)
    assert [average["name"] for average in made] == ["ema-0.9", "ema-0.5", "raw", "power-0.12"]
    assert all(average["latent_fd"] > 0 and 0 <= average["latent_accuracy"] <= 1 for average in made)
    assert DiffusionManifest.read(model).fingerprint == before
    shown = svgpipe("ema", model, "--sigma", "0.12", "--evaluate", finished.root / "cache")
    assert shown.out.count("(smallest)") == 1 and "right class" in shown.out
    assert svgpipe(*sample, "--out", tmp_path / "samples").code == 0
    report = json.loads((tmp_path / "samples" / "report.json").read_text())
    assert "power-0.12" in json.dumps(report)
    assert svgpipe("export", model, "--out", tmp_path / "exported", "--ema", "power-0.12").code == 0
    exported, made_later = (
        load_file(path) for path in (tmp_path / "exported" / "model.safetensors", model / "power-0.12.safetensors")
    )
    assert all(torch.equal(exported[name], value) for name, value in made_later.items())
    assert svgpipe("verify", model, "--deep").code == 0
    (model / "power-0.12.safetensors").write_bytes(b"damaged")
    damaged = svgpipe("verify", model, "--deep")
    assert damaged.code == 1 and "power-0.12.safetensors" in damaged.out + damaged.err


def test_a_killed_training_ends_with_the_same_snapshots(
    finished: Finished, trained: Path, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    run_and_kill(arguments(finished, out), (out / "averages" / f"step-{3 * EVERY:08d}-0.1.safetensors").exists)
    assert not (out / "manifest.json").exists()
    (out / "averages" / "step-00000003-0.1.safetensors").write_bytes(b"of a shorter run")
    resumed = svgpipe(*arguments(finished, out))
    assert resumed.code == 0 and "resumed at step" in resumed.err, resumed.err
    names = sorted(path.name for path in (trained / "averages").iterdir())
    ends = [f"-{sigma}.safetensors" for sigma in SIGMAS] + [".json"]
    assert names == sorted(f"step-{step:08d}{end}" for step in range(4, 41, 4) for end in ends)
    assert sorted(path.name for path in (out / "averages").iterdir()) == names
    for name in names:
        assert (out / "averages" / name).read_bytes() == (trained / "averages" / name).read_bytes()


def test_factors_sum_to_one_and_large_ones_are_told() -> None:
    """Else the average of few snapshots would have smaller weights; and large factors enlarge the rounding."""
    late = [Snapshot(sigma, 4000) for sigma in SIGMAS]
    assert combine_snapshots(late, Snapshot(0.2, 4000)).factors.sum() == pytest.approx(1)
    many = [Snapshot(sigma, step) for sigma in SIGMAS for step in range(5000, 400_001, 5000)]
    short, kept = (combine_snapshots(many, Snapshot(sigma, 400_000)) for sigma in (0.01, 0.05))
    assert kept.rounding == pytest.approx(2**-12) and short.rounding > 10 * kept.rounding


def test_snapshots_may_be_deleted_during_a_training(
    finished: Finished, trained: Path, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    (model / "manifest.json").unlink()
    (model / "averages" / "step-00000008-0.1.safetensors").unlink()
    (model / "power-0.33.safetensors").write_bytes(b"of a shorter run")
    done = svgpipe(*arguments(finished, model))
    assert done.code == 0 and "1 of 10 snapshots" in done.err, done.err
    assert svgpipe("verify", model, "--deep").code == 0
    assert svgpipe("ema", model, "--sigma", "0.1").code == 0
    assert not (model / "power-0.33.safetensors").exists()


def test_bad_requests_are_refused(
    finished: Finished, trained: Path, vaes: Path, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    def refused(*given: object) -> str:
        found = svgpipe("ema", *given)
        assert found.code in (1, 2) and "Traceback" not in found.err
        return found.err

    assert "expected numbers above 0, such as 0.05,0.10, found 'x'" in refused(trained, "--sigma", "x")
    assert "from 0.005 to 0.28, found 0.5" in refused(trained, "--sigma", "0.5")
    assert "expected numbers above 0, such as 0.05,0.10, found 'nan'" in refused(trained, "--sigma", "nan")
    plain = finished.root / "diffusion"
    assert "Train with diffusion.power_averages" in refused(plain, "--sigma", "0.1")
    assert "expected a diffusion model" in refused(finished.root / "cache", "--sigma", "0.1")
    wrong = refused(trained, "--sigma", "0.11", "--evaluate", vaes / "kl" / "cache")
    assert "Give the cache that it was trained on" in wrong and not (trained / "power-0.11.safetensors").exists()
    for change, message in {
        "sigmas: []": "at least one value",
        "sigmas: [0.1, 0.1]": "no value twice",
        "sigmas: [0.3]": "less than 0.28",
        "sigmas: [0.00001]": "greater than or equal to 0.005",
        "every: 0": "greater than 0",
    }.items():
        found = svgpipe(*arguments(finished, tmp_path / "out", f"diffusion.power_averages={{{change}}}"))
        assert found.code == 2 and message in found.err
    damaged = tmp_path / "damaged"
    shutil.copytree(trained, damaged)
    next((damaged / "averages").glob("*.safetensors")).write_bytes(b"damaged")
    assert "truncated or altered" in refused(damaged, "--sigma", "0.1")
