"""Exports: plain safetensors of chosen weights, from a finished model or a checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from svgpipe.manifests.manifest import read_json
from svgpipe.models.dit import DiT

from .conftest import Finished, Outcome, tree_bytes


@pytest.mark.parametrize(
    ("choice", "name"), [("ema", "ema-0.9"), ("0.50", "ema-0.5"), ("ema-0.5", "ema-0.5"), ("raw", "raw")]
)
def test_export_of_every_weights(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], choice: str, name: str
) -> None:
    source, out = finished.root / "diffusion", tmp_path / "exported"
    found = svgpipe("export", source, "--out", out, "--ema", choice)
    assert found.code == 0, found.err
    assert f"{name} of step 12" in found.out
    config = read_json(out / "config.json")
    model = DiT(**config["model"])
    model.load_state_dict(load_file(out / "model.safetensors"))
    ours = load_file(source / f"{name}.safetensors")
    assert all(torch.equal(value, ours[key]) for key, value in model.state_dict().items())
    again = svgpipe("export", source, "--out", out)
    assert again.code == 1
    assert "expected a new or empty folder" in again.err


def test_export_of_a_run_in_progress_and_of_one_checkpoint(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished.root / "diffusion", run)
    (run / "manifest.json").unlink()
    newest = svgpipe("export", run, "--out", tmp_path / "newest", "--ema", "raw")
    assert "raw of step 12" in newest.out, newest.err
    older = svgpipe("export", run / "checkpoints" / "step-00000008", "--out", tmp_path / "older", "--ema", "raw")
    assert "raw of step 8" in older.out, older.err
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("newest", "older"))
    assert any(not torch.equal(one[key], two[key]) for key in one)
    statistics = load_file(tmp_path / "older" / "statistics.safetensors")
    np.testing.assert_array_equal(statistics["channel_std"].numpy(), finished.cache.channel_std)
    missing = svgpipe("export", run / "checkpoints" / "step-00000099", "--out", tmp_path / "none")
    assert missing.code == 1
    assert "expected a diffusion model or a checkpoint of one" in missing.err
    unknown = svgpipe("export", run, "--out", tmp_path / "none", "--ema", "0.7")
    assert unknown.code == 2
    assert "expected one of ema, ema-0.9, ema-0.5, raw" in unknown.err


def test_a_killed_export_can_be_repeated(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    whole, left = tmp_path / "whole", tmp_path / "left"
    assert svgpipe("export", finished.root / "diffusion", "--out", whole).code == 0
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    (left / ".statistics.safetensors.0123.partial").write_bytes(b"less")
    again = svgpipe("export", finished.root / "diffusion", "--out", left)
    assert again.code == 0, again.err
    assert tree_bytes(left, "*", ".*") == tree_bytes(whole, "*", ".*")
    (left / "notes.txt").write_text("somebody's")
    (left / "config.json").unlink()
    assert svgpipe("export", finished.root / "diffusion", "--out", left).code == 1
