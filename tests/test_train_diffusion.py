"""Diffusion training: from the cache alone, with reproducible batches and exact resume."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.evaluation import Report
from svgpipe.manifests.manifest import read_json
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.manifests.model_manifests import DiffusionManifest
from svgpipe.manifests.schedule_section import ScheduleSection
from svgpipe.models.dit import DiT
from svgpipe.stages.evaluate.decode_latents import decoded_images
from svgpipe.stages.networks.diffusion import open_diffusion
from svgpipe.stages.runtime import retry
from svgpipe.stages.train_diffusion.loss import heldout_loss
from svgpipe.stages.train_diffusion.order import batch_at
from svgpipe.stages.training.distributed import ProcessGroup
from svgpipe.stages.training.optimizer import learning_rate

from .commands import Command, run_and_kill
from .conftest import Finished, Outcome

WEIGHTS = ("ema-0.9.safetensors", "ema-0.5.safetensors", "raw.safetensors")


def train_args(finished: Finished, out: Path, *more: object) -> list[object]:
    return [
        "train-diffusion",
        "--cache",
        finished.root / "cache",
        "--out",
        out,
        "--recipe",
        finished.recipe_file,
        *more,
    ]


def same_weights(one: Path, two: Path) -> bool:
    pairs = [(load_file(one / name), load_file(two / name)) for name in WEIGHTS]
    return all(a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in pairs)


def last_checkpoint(folder: Path) -> object:
    """Return step and hashes of the last checkpoint: weights, EMA, optimizer state, log state."""
    return read_json(folder / "checkpoints" / "latest.json")["checkpoints"][-1]


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    num_views=st.integers(1, 2),
    epoch=st.integers(0, 3),
)
def test_every_epoch_is_a_permutation_without_gaps(
    seed: int, num_rows: int, batch_size: int, num_views: int, epoch: int
) -> None:
    """For any batch size, positions e*N … (e+1)*N-1 of the stream contain every row once."""
    steps = range(-(-(epoch + 1) * num_rows // batch_size))
    batches = [batch_at(s, seed=seed, batch_size=batch_size, num_rows=num_rows, num_views=num_views) for s in steps]
    rows = np.concatenate([b.rows for b in batches])[epoch * num_rows : (epoch + 1) * num_rows]
    assert sorted(rows.tolist()) == list(range(num_rows))
    views = np.concatenate([b.views for b in batches])
    assert views.min() >= 0
    assert views.max() < num_views


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 500), st.integers(1, 16), st.integers(1, 40))
def test_the_stream_does_not_depend_on_the_batch_size(step: int, batch_size: int, num_rows: int) -> None:
    batch = batch_at(step, seed=7, batch_size=batch_size, num_rows=num_rows, num_views=2)
    for i in range(batch_size):
        one = batch_at(step * batch_size + i, seed=7, batch_size=1, num_rows=num_rows, num_views=2)
        assert (one.rows[0], one.views[0]) == (batch.rows[i], batch.views[i])


def test_epochs_and_seeds_differ_and_both_views_occur() -> None:
    def rows(seed: int, step: int) -> tuple[list[int], list[int]]:
        batch = batch_at(step, seed=seed, batch_size=64, num_rows=64, num_views=2)
        return batch.rows.tolist(), batch.views.tolist()

    assert rows(0, 0) == rows(0, 0)
    assert rows(0, 0)[0] != rows(0, 1)[0]
    assert rows(0, 0)[0] != rows(1, 0)[0]
    assert 10 < sum(rows(0, 0)[1]) < 54


def test_learning_rate_schedules() -> None:
    warm = ScheduleSection(warmup_steps=4, kind="cosine", final_factor=0.1)
    rates = [learning_rate(s, 20, 2.0, warm) for s in range(21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == pytest.approx(2.0)
    assert rates[20] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert {learning_rate(s, 20, 2.0, ScheduleSection()) for s in range(20)} == {2.0}


def test_training_needs_the_cache_and_nothing_else(finished: Finished, tmp_path: Path) -> None:
    """In a new process, with shards and autoencoder moved away: no timm, no webdataset, no Ray."""
    alone = tmp_path / "alone"
    shutil.copytree(finished.root / "cache", alone / "cache")
    moved = finished.root.with_name("moved")
    finished.root.rename(moved)
    arguments = [
        "train-diffusion",
        "--cache",
        alone / "cache",
        "--out",
        alone / "out",
        "--recipe",
        finished.recipe_file,
    ]
    code = (
        "import sys; from svgpipe.pipeline.cli import main; code = main(sys.argv[1:]); "
        "print(code, [m for m in ('timm', 'webdataset', 'ray', 'torchvision') if m in sys.modules])"
    )
    try:
        found = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=False
        )
    finally:
        moved.rename(finished.root)
    assert found.stdout.splitlines()[-1] == "0 []", found.stderr
    assert same_weights(alone / "out", finished.root / "diffusion")


def test_files_of_a_finished_training(finished: Finished) -> None:
    folder = finished.root / "diffusion"
    manifest = DiffusionManifest.read(folder)
    assert (manifest.steps, manifest.grid, manifest.channels) == (12, (4, 4), 116)
    assert manifest.class_names == ["astronaut", "cat", "coffee"]
    entries = read_metrics(folder / "metrics.jsonl")
    assert [e["step"] for e in entries if "loss" in e] == list(range(1, 13))
    held = [e["heldout_loss"] for e in entries if "heldout_loss" in e]
    assert [e["step"] for e in entries if "heldout_loss" in e] == [4, 8, 12]
    assert held[-1] == manifest.heldout_loss
    assert held[-1] < held[0]
    with Image.open(folder / "samples" / "step-00000012.png") as grid:
        assert grid.size == (8 * 32, 4 * 32)
    scalars = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [e.step for e in scalars.Scalars("loss")] == list(range(1, 13))
    buckets = [e for e in entries if "loss" in e]
    assert all(any(f"loss_t{i}" in e for e in buckets) for i in range(6))  # shifted times rarely exceed 0.9
    assert all(min(v for k, v in e.items() if k.startswith("loss_t")) <= e["loss"] for e in buckets)
    assert all(0 < e["memory_gb"] < 64 and 0 <= e["data_wait_share"] <= 1 for e in buckets)
    watched = {"loss", "heldout_loss", "loss_t0", "grad_norm", "learning_rate", "samples_per_s", "data_wait_share"}
    assert watched | {"memory_gb", "latent_fd", "latent_accuracy_real"} <= set(scalars.Tags()["scalars"])
    assert scalars.Tags()["images"] == ["samples"]
    measured = [e for e in entries if "latent_fd" in e]
    assert [e["step"] for e in measured] == [6, 12]
    assert all(0 <= e["latent_accuracy"] <= 1 and e["latent_fd"] > e["latent_fd_real"] > 0 for e in measured)
    assert [e.step for e in scalars.Scalars("latent_fd")] == [6, 12]
    statistics = load_file(folder / "statistics.safetensors")
    np.testing.assert_array_equal(statistics["channel_std"].numpy(), finished.cache.channel_std)
    assert not same_weights_of_average_and_raw(folder)


def same_weights_of_average_and_raw(folder: Path) -> bool:
    ema, raw = (load_file(folder / name) for name in ("ema-0.9.safetensors", "raw.safetensors"))
    return all(torch.equal(ema[key], raw[key]) for key in ema)


def test_killed_runs_end_bit_for_bit_the_same(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Killed twice, in the first and in a later epoch, against an uninterrupted run."""
    more = ["--set", "diffusion.steps=60"]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert svgpipe(*train_args(finished, whole, *more)).code == 0
    latest = out / "checkpoints" / "latest.json"

    def reached(step: int) -> bool:
        return latest.exists() and bool(read_json(latest)["checkpoints"][-1]["step"] >= step)

    for step in (4, 24):
        run_and_kill(train_args(finished, out, *more), partial(reached, step))
        assert not (out / "manifest.json").exists()
    resumed = svgpipe(*train_args(finished, out, *more))
    assert resumed.code == 0, resumed.err
    assert "resumed at step" in resumed.err
    assert same_weights(out, whole)
    assert last_checkpoint(out) == last_checkpoint(whole)
    metrics = [
        [(e["step"], e["loss"], e["grad_norm"]) for e in read_metrics(f / "metrics.jsonl") if "loss" in e]
        for f in (out, whole)
    ]
    assert metrics[0] == metrics[1]


def losses_of(folder: Path) -> list[float]:
    return [entry["loss"] for entry in read_metrics(folder / "metrics.jsonl") if "loss" in entry]


def without_clocks(folder: Path) -> list[dict[str, float]]:
    """Return the log without seconds and megabytes."""
    clocks = {"samples_per_s", "data_wait_share", "memory_gb"}
    entries = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in entry.items() if name not in clocks} for entry in entries]


@pytest.mark.parametrize(
    ("option", "tolerance"),
    [("accumulate=3", 1e-6), ("accumulate=4", 1e-6), ("activation_checkpointing=true", 0)],
)
def test_accumulation_and_activation_checkpointing_change_rounding_only(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], option: str, tolerance: float
) -> None:
    """Including parts of uneven size: six samples in four parts.

    Two EMA decays, both views, clipping, dropped labels.
    """
    found = svgpipe(*train_args(finished, tmp_path / "out", "--set", f"diffusion.{option}"))
    assert found.code == 0, found.err
    expected = losses_of(finished.root / "diffusion")
    np.testing.assert_allclose(losses_of(tmp_path / "out"), expected, rtol=tolerance, atol=0)
    for name in WEIGHTS:
        ours, theirs = load_file(tmp_path / "out" / name), load_file(finished.root / "diffusion" / name)
        for key in theirs:
            # Adam divides by the gradient's own size: where that is rounding noise, a step may differ by the rate.
            torch.testing.assert_close(ours[key], theirs[key], rtol=0, atol=0 if tolerance == 0 else 2e-3)


OPTIONS = "diffusion.model={width: 32, depth: 2, heads: 2, patch_size: 2, rms_norm: true, swiglu: true, rope: true}"


def test_a_transformer_with_the_options_of_other_systems(
    finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """It trains, recomputes its blocks without a difference, exports and samples."""
    for name, more in (("out", []), ("recomputed", ["--set", "diffusion.activation_checkpointing=true"])):
        losses = ("--set", "diffusion.logit_normal_time=true", "--set", "diffusion.cosine_loss=true")
        found = svgpipe(*train_args(finished, tmp_path / name, "--set", OPTIONS, *losses, *more))
        assert found.code == 0, found.err
    assert same_weights(tmp_path / "out", tmp_path / "recomputed")
    trained = losses_of(tmp_path / "out")
    assert trained[-1] < trained[0]
    held = DiffusionManifest.read(tmp_path / "out").heldout_loss
    assert held is not None and trained[0] > held + 0.5  # held out: the squared error alone, without the cosine
    weights = load_file(tmp_path / "out" / "raw.safetensors")
    assert weights["ln1.weight"].shape == (32, 2 * 2 * finished.cache.shape[-1])
    assert weights["pos_embed"].shape == (1, 4, 32) and not any(name.startswith("rotary") for name in weights)
    assert svgpipe("export", tmp_path / "out", "--out", tmp_path / "exported").code == 0
    exported = DiT(**json.loads((tmp_path / "exported" / "config.json").read_text())["model"])
    exported.load_state_dict(load_file(tmp_path / "exported" / "model.safetensors"))
    command = ("sample-and-eval", "--diffusion", tmp_path / "out", "--autoencoder", finished.root / "autoencoder")
    found = svgpipe(
        *command, "--reference", finished.root / "shards", "--out", tmp_path / "e", "--recipe", finished.recipe_file
    )
    assert found.code == 0, found.err
    refused = svgpipe(*train_args(finished, tmp_path / "three", "--set", "diffusion.model.patch_size=3"))
    assert refused.code == 2 and "expected a divisor of the grid of" in refused.err and "4x4, found 3" in refused.err
    whole = ("run", finished.recipe_file, "--workdir", tmp_path / "w", "--source", photographs)
    refused = svgpipe(*whole, "--set", "diffusion.model.patch_size=3")
    assert refused.code == 2 and "expected a divisor of the grid of the latents of kind svg" in refused.err
    assert not (tmp_path / "w" / "shards").exists()


def test_a_run_killed_after_its_last_step_measures_once(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """All steps done and measured, but not published: the log has no duplicate entries."""
    out = tmp_path / "out"
    shutil.copytree(finished.root / "diffusion", out)
    (out / "manifest.json").unlink()
    found = svgpipe(*train_args(finished, out, "--autoencoder", finished.root / "autoencoder"))
    assert found.code == 0, found.err
    assert "resumed at step 12" in found.err
    assert without_clocks(out) == without_clocks(finished.root / "diffusion")


@pytest.mark.parametrize(
    ("seed", "more"),
    [
        (7, ("accumulate=2", "log_every=3")),  # lines of the log span checkpoints, and so a resume
        (20261, ("label_dropout=0.5", "batch_size=7", "checkpoint_every=3")),  # epochs end inside of batches
        (3, ("use_flips=false", "accumulate=4", "schedule.kind=cosine", "schedule.warmup_steps=9")),
    ],
)
def test_a_killed_run_ends_bit_for_bit_the_same(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], seed: int, more: tuple[str, ...]
) -> None:
    """With parts, dropped labels, both views or one, in the middle of an epoch."""
    values = ("steps=40", f"seed={seed}", *more)
    options = [part for value in values for part in ("--set", f"diffusion.{value}")]
    whole, out = tmp_path / "whole", tmp_path / "killed"
    assert svgpipe(*train_args(finished, whole, *options)).code == 0
    latest = out / "checkpoints" / "latest.json"
    run_and_kill(train_args(finished, out, *options), latest.exists)
    assert svgpipe(*train_args(finished, out, *options)).code == 0
    assert same_weights(out, whole)
    assert last_checkpoint(out) == last_checkpoint(whole)
    assert without_clocks(out) == without_clocks(whole)


def test_ctrl_c_finishes_the_step_saves_and_resumes(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    more = ["--set", "diffusion.steps=5000", "--set", "diffusion.checkpoint_every=100000"]
    process = Command(train_args(finished, out, *more), log)
    metrics = out / "metrics.jsonl"
    process.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3)
    process.send(signal.SIGINT)
    assert process.wait(60) == 130
    err = log.read_text()
    assert "saved. The same command resumes." in err
    assert "Traceback" not in err
    described = svgpipe("inspect", out)
    assert "checkpoint at step" in described.out


def test_divergence_stops_with_the_step_and_the_last_checkpoint(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    more = ["--set", "diffusion.learning_rate=1e38", "--set", "diffusion.checkpoint_every=1"]
    found = svgpipe(*train_args(finished, tmp_path / "out", *more))
    assert found.code == 1
    assert "training diverged at step" in found.err
    assert "The last good checkpoint is" in found.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_another_cache_is_refused(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    other = tmp_path / "cache"
    options = ["--shards", finished.root / "shards", "--autoencoder", finished.root / "autoencoder", "--out", other]
    more = ["--recipe", finished.recipe_file, "--set", "extract.views=[original]"]
    assert svgpipe("extract", *options, *more).code == 0
    arguments = train_args(finished, finished.root / "diffusion")
    arguments[2] = other
    found = svgpipe(*arguments)
    assert found.code == 1
    assert "inputs.cache" in found.err


def test_a_cache_without_training_rows_is_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", copy)
    from svgpipe.manifests.feature_store import FeatureStore

    FeatureStore.open(copy).put("heldout", np.ones(36, bool))
    arguments = train_args(finished, tmp_path / "out")
    arguments[2] = copy
    found = svgpipe(*arguments)
    assert found.code == 2
    assert "expected valid rows to train on" in found.err


def test_a_cache_that_lost_a_shard_stops_with_its_name(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "WAITS_S", (0.0,))
    copy = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", copy)
    (copy / "features" / "c" / "1" / "0" / "0" / "0" / "0").unlink()
    arguments = train_args(finished, tmp_path / "out")
    arguments[2] = copy
    found = svgpipe(*arguments)
    assert found.code == 1
    assert f"{copy}/features/c/1/0/0/0/0: cannot read features: no such shard was written" in found.err


def test_classes_without_training_images_are_not_sampled(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """All images of class 1 are held out here."""
    shutil.copytree(finished.root / "cache", tmp_path / "cache")
    cache = FeatureCache(tmp_path / "cache")
    cache.store.put("heldout", cache.heldout | (cache.labels == 1), "sample")
    assert FeatureCache(tmp_path / "cache").untrained_classes == [1] and cache.untrained_classes == []
    out = tmp_path / "diffusion"
    found = svgpipe(*train_args(finished, out, "--cache", tmp_path / "cache"))
    assert found.code == 0, found.err
    assert "1 of 3 classes have no training images: 1 (cat)" in found.err
    checkpoint = max((out / "checkpoints").glob("step-*"))
    assert open_diffusion(checkpoint).classes == open_diffusion(out).classes == (0, 2)
    assert "1 of 3: 1 (cat)" in svgpipe("inspect", out).out
    options = ("--autoencoder", finished.root / "autoencoder", "--recipe", finished.recipe_file, "--npz")
    sampled = ("--steps", 1, "--guidance", 1.0, "--reference", finished.root / "shards")
    found = svgpipe("sample-and-eval", "--diffusion", out, "--out", tmp_path / "evaluation", *options, *sampled)
    assert found.code == 0, found.err
    report = Report.read(tmp_path / "evaluation")
    assert report.results[0].sampler is not None and report.results[0].sampler.classes == [0, 2]
    samples = decoded_images(tmp_path / "evaluation", report.results[0].name)
    assert samples.labels[:4].tolist() == [0, 2, 0, 2]


def test_held_out_loss_is_measured_on_rows_of_all_classes(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a cache that is sorted by class, the first rows are the first classes."""
    read: list[int] = []
    real = FeatureCache.read

    def recorded(self: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float16]:
        read.extend(rows.tolist())
        return real(self, rows)

    monkeypatch.setattr(FeatureCache, "read", recorded)
    config = finished.recipe.diffusion.model_copy(update={"eval_rows": 3})
    model = open_diffusion(finished.root / "diffusion").load()
    assert heldout_loss(model, finished.cache, config, ProcessGroup(torch.device("cpu"), 0, 1)) is not None
    held = finished.cache.heldout_rows
    assert len(held) == 6 and read == held[[0, 2, 5]].tolist()


def test_a_finished_training_continues_with_more_steps(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """It ends with the bits of a training that had all steps from the start. Fewer steps are refused."""
    out = tmp_path / "diffusion"
    first = svgpipe(*train_args(finished, out, "--set", "diffusion.steps=7"))
    assert first.code == 0 and "7 steps of 6 rows: 1.4 epochs of 30 training rows" in first.err
    before = DiffusionManifest.read(out)
    found = svgpipe(*train_args(finished, out))
    assert found.code == 0, found.err
    assert "resumed at step 7" in found.err
    assert DiffusionManifest.read(out).steps == 12 and before.fingerprint != DiffusionManifest.read(out).fingerprint
    assert same_weights(out, finished.root / "diffusion")
    fewer = svgpipe(*train_args(finished, out, "--set", "diffusion.steps=7"))
    assert fewer.code == 1 and "config.steps: 12 there, 7 here" in fewer.err
    other = svgpipe(*train_args(finished, out, "--set", "diffusion.steps=20", "--set", "diffusion.seed=9"))
    assert other.code == 1 and "config.seed" in other.err and "config.steps" not in other.err
    assert svgpipe("verify", out, "--deep").code == 0


def test_an_extension_that_was_stopped_is_resumed(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "diffusion"
    shutil.copytree(finished.root / "diffusion", out)
    more = train_args(finished, out, "--set", "diffusion.steps=50000")
    process = Command(more, tmp_path / "log")
    process.wait_for(lambda: read_json(out / "checkpoints" / "latest.json")["checkpoints"][-1]["step"] > 20)
    process.send(signal.SIGINT)
    assert process.wait() == 130 and "resumed at step 12" in process.text()
    assert "error" not in process.text() and "The same command resumes" in process.text()
    assert not (out / "manifest.json").exists()
    fewer = svgpipe(*train_args(finished, out))
    assert fewer.code == 1 and "config.steps: 50000 there, 12 here" in fewer.err
    process = Command(train_args(finished, out, "--set", "diffusion.steps=50001"), tmp_path / "again")
    process.wait_for(lambda: "resumed at step" in process.text())
    process.kill_all()
