"""Training on several workers gives the results of one process, after any failures and with any number of workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svgpipe.manifests.checkpoint import Checkpoint, CheckpointStore
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.manifest import read_json
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.models.losses import SyncedBatchNorm2d
from svgpipe.models.residual import Alignment
from svgpipe.stages.training.checkpointing import latest_of_all
from svgpipe.stages.training.distributed import ProcessGroup
from svgpipe.stages.training.ray_train import EventQueue

from .commands import Command, run_and_kill
from .conftest import Finished, Outcome

CPU = torch.device("cpu")
TWO = ("--workers", 2)
# Seven samples on two workers in two parts: slices and parts of uneven size. Both views, dropped labels, clipping.
DIFFUSION = ("diffusion.steps=120", "diffusion.batch_size=7", "diffusion.accumulate=2", "diffusion.learning_rate=1e-4")
# Adam turns rounding into steps of the size of the learning rate, hence the small rate.
# Without dropout, which uses the process's own generator: workers share a batch, but not its dropout masks.
AUTOENCODER = (
    "autoencoder.residual.dropout=0",
    *("autoencoder.steps=14", "autoencoder.batch_size=5", "autoencoder.learning_rate=1e-6", "autoencoder.flip=true"),
    "autoencoder.discriminator.start_step=3",
)


def diffusion_args(finished: Finished, out: Path, *more: object) -> list[object]:
    given = ["--cache", finished.root / "cache", "--out", out, "--recipe", finished.recipe_file]
    return ["train-diffusion", *given, *(part for value in DIFFUSION for part in ("--set", value)), *more]


def autoencoder_args(finished: Finished, out: Path, *more: object) -> list[object]:
    given = ["--shards", finished.root / "shards", "--out", out, "--recipe", finished.recipe_file]
    return ["train-autoencoder", *given, *(part for value in AUTOENCODER for part in ("--set", value)), *more]


def require_same_course(found: Path, expected: Path, names: tuple[str, ...]) -> None:
    """Check that every step is logged once, with values equal to 1e-5.

    Adaptive weights to 1e-3: they divide by a gradient, which is small for the discriminator, and of a loss with hinges
    for the vision model, so that the order of two workers' sums matters. Without the discriminator's own state its
    weight would differ in the first digit.
    """
    ours, theirs = ([e for e in read_metrics(f / "metrics.jsonl") if names[0] in e] for f in (found, expected))
    assert [e["step"] for e in ours] == [e["step"] for e in theirs] == list(range(1, len(theirs) + 1))
    for name in names:
        rtol = 1e-3 if name.endswith("_weight") else 1e-5
        np.testing.assert_allclose(
            [e[name] for e in ours], [e[name] for e in theirs], rtol=rtol, atol=1e-9, err_msg=name
        )


def reached(out: Path, step: int) -> bool:
    latest = out / "checkpoints" / "latest.json"
    return latest.exists() and bool(read_json(latest)["checkpoints"][-1]["step"] >= step)


def training_workers(session: int) -> list[int]:
    """Return the processes of Ray Train below the command that leads this session."""
    found = subprocess.run(["pgrep", "-s", str(session), "-f", "RayTrainWorker"], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def require_workers_end(session: int) -> None:
    """Wait until Ray has killed them after the end of the command."""
    deadline = time.monotonic() + 20
    while training_workers(session):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@given(st.integers(0, 200), st.integers(1, 9))
def test_slices_of_the_workers_cover_the_batch(count: int, size: int) -> None:
    group = [ProcessGroup(CPU, rank, size) for rank in range(size)]
    assert [place for member in group for place in member.local_slice(count)] == list(range(count))
    lengths = [len(member.local_slice(count)) for member in group]
    assert max(lengths) - min(lengths) <= 1
    assert {member.largest_slice(count) for member in group} == {max(lengths)}


def test_batch_norm_and_alignment_over_workers_equal_torch() -> None:
    """The code path of several processes, run by one: values, gradients, and tracked statistics."""
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, 4, requires_grad=True)
    ours, theirs = SyncedBatchNorm2d(3), torch.nn.BatchNorm2d(3)
    ours.total = lambda values: values
    for layer in (ours, theirs):
        torch.nn.init.normal_(layer.weight)
        layer.bias.data.copy_(torch.tensor([1.0, 2.0, 3.0]))
    ours.load_state_dict(theirs.state_dict())
    found, expected = ours(x), theirs(x)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().mean(), x, retain_graph=True)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    flat = x.detach().transpose(0, 1).flatten(1)
    scalars = torch.stack([flat.mean(1).mean(), flat.std(1).mean()])
    torch.testing.assert_close(Alignment.statistics(x, x), scalars.repeat(2))


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_one_process_continues(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Two workers, one of them killed; new ones continue; Ctrl-C stops them after a step; one process finishes."""
    out, log = tmp_path / "out", tmp_path / "log"
    process = Command(diffusion_args(finished, out, *TWO), log)
    process.wait_for(lambda: reached(out, 8))
    workers = training_workers(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    process.wait_for(lambda: "resumed at step" in log.read_text())
    assert "a worker died" in log.read_text()
    again = int(re.findall(r"resumed at step (\d+)", log.read_text())[-1])
    process.wait_for(lambda: reached(out, again + 4))
    process.send(signal.SIGINT)
    assert process.wait(60) == 130
    text = log.read_text()
    assert "saved. The same command resumes." in text
    assert "Traceback" not in text
    require_workers_end(process.pid)
    assert svgpipe(*diffusion_args(finished, out)).code == 0
    assert svgpipe(*diffusion_args(finished, tmp_path / "alone")).code == 0
    require_same_course(out, tmp_path / "alone", ("loss", "grad_norm", "learning_rate"))


@pytest.mark.slow
def test_fsdp2_on_two_workers_resumes_a_run_of_one_process(
    finished: Finished, ray_session: None, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out"
    run_and_kill(diffusion_args(finished, out), lambda: reached(out, 4))
    more = ("--strategy", "fsdp2", "--autoencoder", finished.root / "autoencoder")
    found = svgpipe(*diffusion_args(finished, out, *TWO, *more))
    assert found.code == 0, found.err
    assert "resumed at step" in found.err
    assert svgpipe(*diffusion_args(finished, tmp_path / "alone")).code == 0
    require_same_course(out, tmp_path / "alone", ("loss", "grad_norm", "learning_rate"))
    held = [
        [e["heldout_loss"] for e in read_metrics(f / "metrics.jsonl") if "heldout_loss" in e]
        for f in (out, tmp_path / "alone")
    ]
    np.testing.assert_allclose(held[0], held[1], rtol=1e-5)
    assert (out / "samples" / "step-00000120.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["svg", "aligned-kl"])
def test_one_process_resumes_an_autoencoder_of_two_workers(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], kind: str
) -> None:
    """The discriminator is active before and after; everything is killed in between."""
    noise = "0.5" if kind == "svg" else "null"
    out = tmp_path / "out"
    change = ("--set", f"autoencoder.kind={kind}", "--set", f"autoencoder.decoder_noise={noise}")
    run_and_kill(autoencoder_args(finished, out, *TWO, *change), lambda: reached(out, 6))
    assert svgpipe(*autoencoder_args(finished, out, *change)).code == 0
    assert svgpipe(*autoencoder_args(finished, tmp_path / "alone", *change)).code == 0
    names = ("l1", "perceptual", "adversarial", "adaptive_weight", "discriminator")
    more = {"svg": (), "aligned-kl": ("kl", "vision", "vision_weight")}[kind]
    require_same_course(out, tmp_path / "alone", (*names, *more))


@pytest.mark.slow
def test_one_process_resumes_a_decoder_of_two_workers(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Fine-tuning from the cache, with noise."""
    given = ("--decoder-only", "--from", finished.root / "autoencoder", "--cache", finished.root / "cache")
    change = (*given, "--set", "autoencoder.decoder_noise=0.5")
    out = tmp_path / "out"
    run_and_kill(autoencoder_args(finished, out, *TWO, *change), lambda: reached(out, 6))
    assert svgpipe(*autoencoder_args(finished, out, *change)).code == 0
    assert svgpipe(*autoencoder_args(finished, tmp_path / "alone", *change)).code == 0
    require_same_course(out, tmp_path / "alone", ("l1", "perceptual", "adversarial", "discriminator"))


@pytest.mark.slow
def test_ctrl_c_while_workers_start_stops_at_once(finished: Finished, tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    process = Command(diffusion_args(finished, out, *TWO), log)
    process.wait_for(lambda: bool(training_workers(process.pid)))  # which are loading torch by now
    process.send(signal.SIGINT)
    assert process.wait(60) == 130, log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (out / "checkpoints").exists()
    require_workers_end(process.pid)


def test_workers_do_not_write_for_a_suspended_driver() -> None:
    """When it wakes, another process may hold its lock."""
    event_queue = EventQueue()
    event_queue.require_reader()
    event_queue.taken_at -= 61
    with pytest.raises(TimeoutError, match="has not answered for 61 s"):
        event_queue.require_reader()
    assert event_queue.take(stop=True) == []
    event_queue.require_reader()
    event_queue.close()
    assert event_queue.has_ended()  # so workers that Ray starts anew return at once
    with pytest.raises(TimeoutError, match="this training was ended"):
        event_queue.require_reader()


def test_checkpoints_of_different_steps_are_never_mixed(tmp_path: Path) -> None:
    """As if the folder is not shared between nodes: the other worker finds nothing."""

    class OfTwo(ProcessGroup):
        def gather_rows(self, mine: torch.Tensor, count: int) -> torch.Tensor:
            return torch.cat([mine, torch.tensor([-1])])

    store = CheckpointStore(tmp_path)
    store.save(Checkpoint(4, {"raw": {"w": torch.zeros(1)}}, {}))
    found = latest_of_all(store, ProcessGroup(CPU), print)
    assert found is not None
    assert found.step == 4
    with pytest.raises(ArtifactError, match="found steps 4, -1"):
        latest_of_all(store, OfTwo(CPU, 0, 2), print)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (["--workers", 500], 2, ["500 workers", "but Ray has"]),
        (["--address", "auto"], 2, ["--address", "--workers"]),
        (["--strategy", "fsdp2"], 2, ["--strategy", "--workers"]),
        ([*TWO, "--gpus-per-worker", 0.5], 2, ["cannot share a GPU"]),
        ([*TWO, "--set", "diffusion.batch_size=1", "--set", "diffusion.accumulate=1"], 2, ["one sample for each of 2"]),
        (
            [*TWO, "--set", "diffusion.learning_rate=1e38", "--set", "diffusion.checkpoint_every=1"],
            1,
            ["training diverged at step", "The last good checkpoint is"],
        ),
    ],
)
def test_errors_of_workers_are_reported_as_without_ray(
    finished: Finished,
    ray_session: None,
    tmp_path: Path,
    svgpipe: Callable[..., Outcome],
    more: list[object],
    code: int,
    words: list[str],
) -> None:
    found = svgpipe(*diffusion_args(finished, tmp_path / "out", *more))
    assert found.code == code, found.err
    assert all(word in found.err for word in words), found.err
    assert "a worker died" not in found.err
