"""Failures around a training: storage, disk, memory, Ctrl-C. Nothing that was saved is lost."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from svgpipe.manifests.manifest import read_json
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.stages.runtime import retry
from svgpipe.stages.runtime.retry import call_with_retries
from svgpipe.stages.train_diffusion import run
from svgpipe.stages.training.distributed import ProcessGroup

from .commands import Command
from .conftest import Finished, Outcome
from .test_train_diffusion import same_weights, train_args

ALONE = ProcessGroup(torch.device("cpu"))
SIZES: dict[str, Any] = {"grid": (4, 4), "channels": 12, "num_classes": 3}


def test_storage_that_comes_back_is_waited_for(finished: Finished, tmp_path: Path) -> None:
    """A part of the cache is unavailable at first, and available a moment later."""
    cache, log = tmp_path / "cache", tmp_path / "log"
    shutil.copytree(finished.root / "cache", cache)
    shard = cache / "features" / "c" / "1" / "0" / "0" / "0" / "0"
    shard.rename(tmp_path / "away")
    arguments = train_args(finished, tmp_path / "out")
    arguments[2] = cache
    process = Command(arguments, log)
    process.wait_for(lambda: "storage failed" in log.read_text())
    (tmp_path / "away").rename(shard)
    assert process.wait(60) == 0, log.read_text()
    assert "retry in" in log.read_text()
    assert same_weights(tmp_path / "out", finished.root / "diffusion")


def test_retries_end_and_permanent_errors_are_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "WAITS_S", (0.0, 0.0))
    said: list[str] = []

    def failing(error: Exception, times: int) -> Callable[[], str]:
        left = [error] * times

        def call() -> str:
            if left:
                raise left.pop()
            return "done"

        return call

    assert call_with_retries(failing(OSError(5, "Input/output error"), 2), said.append) == "done"
    assert len(said) == 2
    with pytest.raises(OSError, match="Input/output"):
        call_with_retries(failing(OSError(5, "Input/output error"), 3), said.append)
    for error in (OSError(28, "No space left on device"), ValueError("a bug")):
        said.clear()
        with pytest.raises(type(error)):
            call_with_retries(failing(error, 1), said.append)
        assert not said


def test_a_full_disk_at_a_checkpoint_keeps_the_one_before(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """A real full disk: a file system with room for one checkpoint. With more room, the run ends normally."""
    disk = tmp_path / "disk"
    disk.mkdir()
    checkpoint = max(finished.root.glob("diffusion/checkpoints/step-*"))
    size = sum(file.stat().st_size for file in checkpoint.iterdir())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.7)}", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        found = svgpipe(*train_args(finished, disk / "out"))
        assert found.code == 1
        assert "no space left on the device. Finished work is kept" in found.err
        listed = read_json(disk / "out" / "checkpoints" / "latest.json")["checkpoints"]
        assert [entry["step"] for entry in listed] == [4]
        subprocess.run(["mount", "-o", "remount,size=256m", str(disk)], check=True)
        resumed = svgpipe(*train_args(finished, disk / "out"))
        assert resumed.code == 0, resumed.err
        assert "resumed at step 4" in resumed.err
        assert same_weights(disk / "out", finished.root / "diffusion")
    finally:
        subprocess.run(["umount", str(disk)], check=True)  # nothing holds a file open, after errors neither


def test_a_full_disk_at_the_final_weights_loses_no_step(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten steps, a checkpoint every fourth: the last two are saved before the weights are written."""
    out, options = tmp_path / "out", ("--set", "diffusion.steps=10")

    def full(path: Path, tensors: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(run, "save_tensors", full)
        stopped = svgpipe(*train_args(finished, out, *options))
    assert stopped.code == 1 and "no space left on the device" in stopped.err
    again = svgpipe(*train_args(finished, out, *options))
    assert again.code == 0 and "resumed at step 10" in again.err, again.err
    assert svgpipe(*train_args(finished, tmp_path / "whole", *options)).code == 0
    assert same_weights(out, tmp_path / "whole")


def test_a_model_too_large_for_this_machine_says_which_options_help(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """A matrix of 200 GB: the allocation fails at once."""
    found = svgpipe(*train_args(finished, tmp_path / "out", "--set", "diffusion.model.width=131072"))
    assert found.code == 1
    for word in ("out of memory", "activation_checkpointing=true", "accumulate", "fsdp2"):
        assert word in found.err
    ended = svgpipe(*train_args(finished, tmp_path / "out2"))
    assert "peak memory after one step: " in ended.err


def test_a_machine_without_a_compiler_says_how_to_train_without_compiling(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, "/nonexistent/g++"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    torch.compiler.reset()
    found = svgpipe(*train_args(finished, tmp_path / "out", "--set", "diffusion.compile=true"))
    assert found.code == 1
    assert "No working C++ compiler" in found.err and "--set diffusion.compile=false" in found.err


def test_ctrl_c_twice_stops_in_the_middle_of_a_step(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Steps take several seconds: the second Ctrl-C does not wait for the end of the step; saved work is kept."""
    log, out = tmp_path / "log", tmp_path / "out"
    slow = ("batch_size=3000", "model.width=128", "model.depth=8", "eval_every=1000", "checkpoint_every=1")
    process = Command(train_args(finished, out, *(p for v in slow for p in ("--set", f"diffusion.{v}"))), log)
    latest = out / "checkpoints" / "latest.json"
    process.wait_for(latest.exists)
    process.send(signal.SIGINT)
    time.sleep(0.3)
    assert process.returncode is None  # it is finishing its step
    process.send(signal.SIGINT)
    assert process.wait(60) == 130
    text = log.read_text()
    assert "stopped. Finished work is kept" in text
    assert "Traceback" not in text
    assert [entry["step"] for entry in read_json(latest)["checkpoints"]] == [1]


def test_a_batch_larger_than_the_data_is_reported(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    found = svgpipe(*train_args(finished, tmp_path / "out", "--set", "diffusion.batch_size=70"))
    assert found.code == 0, found.err
    assert "a batch of 70 is larger than the 30 rows" in found.err
    assert len([e for e in read_metrics(tmp_path / "out" / "metrics.jsonl") if "loss" in e]) == 12
