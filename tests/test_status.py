"""`svgpipe status` and the logs: progress, time left, last metrics; Weights & Biases if requested."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.manifests.progress_file import ProgressEntry, read_progress

from .commands import Command
from .conftest import Finished, Outcome


def test_time_left_uses_the_speed_of_this_run() -> None:
    """A resumed task: items of an earlier run do not count for the pace."""
    entry = ProgressEntry("train", total=100, unit="steps", done=60, began_at=1000, began_done=40, updated_at=1010)
    assert (entry.per_second, entry.seconds_left) == (2.0, 20.0)
    assert ProgressEntry("train", 100, "steps", 40, 1000, 40, 1010).seconds_left is None


def test_unreadable_progress_is_none(tmp_path: Path) -> None:
    assert read_progress(tmp_path) is None
    (tmp_path / "progress.json").write_text('{"task":')
    assert read_progress(tmp_path) is None


def test_a_finished_pipeline(finished: Finished, svgpipe: Callable[..., Outcome]) -> None:
    found = svgpipe("status", finished.root, "--json")
    entries = json.loads(found.out)
    kinds = ["shard-set", "autoencoder", "feature-cache", "diffusion", "evaluation"]
    assert [(e["kind"], e["state"], e["progress"]) for e in entries] == [(kind, "finished", None) for kind in kinds]
    assert not list(finished.root.rglob("progress.json"))
    screen = svgpipe("status", finished.root)
    assert screen.out.count("finished") == 5
    assert "latent_fd" in screen.out
    assert "warning" not in screen.out


def steps_done(out: Path) -> int:
    entry = read_progress(out)
    return 0 if entry is None else entry.done


def test_a_running_and_a_killed_training(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished.root / "cache", work / "cache")
    arguments = ["train-diffusion", "--cache", work / "cache", "--out", work / "diffusion", "--recipe"]
    process = Command([*arguments, finished.recipe_file, "--set", "diffusion.steps=50000"], tmp_path / "log")
    try:
        process.wait_for(lambda: steps_done(work / "diffusion") >= 20)
        running = json.loads(svgpipe("status", work, "--json").out)[-1]
        assert (running["state"], running["progress"]["task"]) == ("running", "train-diffusion")
        assert 20 <= running["progress"]["done"] < running["progress"]["total"] == 50000
        assert running["progress"]["seconds_left"] > 0
        assert running["metrics"]["loss"] > 0
        assert not [text for text in running["warnings"] if "for data" not in text]  # its steps are tiny
        screen = svgpipe("status", work).out
        assert "running" in screen
        assert "train-diffusion" in screen
        assert "held-out loss" in screen
    finally:
        process.kill_all()
    stopped = svgpipe("status", work)
    assert stopped.code == 0
    assert "not running and not finished; run the same command to resume" in stopped.out


def test_status_of_an_empty_directory(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    found = svgpipe("status", tmp_path)
    assert found.code == 1
    assert "expected an svgpipe artifact" in found.err


def test_weights_and_biases_gets_what_is_logged(finished: Finished, tmp_path: Path) -> None:
    """Offline: its own file holds the metrics. Without an account, the error says what to do."""
    pytest.importorskip("wandb")
    out = tmp_path / "out"
    arguments = ["train-diffusion", "--cache", finished.root / "cache", "--out", out, "--recipe", finished.recipe_file]
    command = [sys.executable, "-c", "from svgpipe.pipeline.cli import entry; entry()", *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
    refused = subprocess.run(
        [*command, "--wandb", "test"],
        env=environment | {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 2, refused.stderr
    assert "WANDB_MODE=offline" in refused.stderr
    assert "Traceback" not in refused.stderr
    done = subprocess.run(
        [*command, "--wandb", "test"], env=environment | {"WANDB_MODE": "offline"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("wandb/offline-run-*/*.wandb")
    assert file.stem == f"run-{(out / 'wandb-id').read_text()}"  # a copy of the folder continues this run, no other
    content = file.read_bytes()
    for name in ("loss", "heldout_loss", "latent_fd", "loss_t0"):
        assert name.encode() in content
    assert [e["step"] for e in read_metrics(out / "metrics.jsonl") if "loss" in e] == list(range(1, 13))


def test_every_run_is_logged_in_its_directory(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """A refused command leaves its error there too, and does not count as begun work."""
    out = tmp_path / "out"
    command = ["train-diffusion", "--cache", finished.root / "cache", "--out", out, "--recipe", finished.recipe_file]
    refused = svgpipe(*command, "--set", "diffusion.model.depth=3", "--set", "diffusion.batch_size=1", "--workers", 2)
    assert refused.code == 2
    assert "UsageError: " in (out / "run.log").read_text()
    found = svgpipe(*command)
    assert found.code == 0, found.err
    lines = (out / "run.log").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d{4} ", line) for line in lines)
    said = [line.partition(" ")[2] for line in lines]
    assert "train-diffusion: 12 steps, 0 done before" in said and said[-1] == "finished"
    assert any(line.startswith("train-diffusion: 12/12 steps  loss") for line in said)
    assert any(line.startswith("step 12: held-out loss") for line in said)
    assert re.search(r"^\d\d:\d\d:\d\d step 12: held-out loss", found.err, re.MULTILINE)
