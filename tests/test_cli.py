"""The command line: skips finished stages, explains errors, loses nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import ray

from svgpipe.manifests.checkpoint import CheckpointStore
from svgpipe.manifests.errors import SvgpipeError
from svgpipe.manifests.lock import Lock
from svgpipe.manifests.recipe_loader import builtin_names, load_recipe
from svgpipe.pipeline.cli import main
from svgpipe.pipeline.cluster import connected

from .conftest import Finished, Outcome

STAGES = ("shards", "autoencoder", "cache", "diffusion", "evaluation")
STAGE_COMMANDS = ("shard", "train-autoencoder", "extract", "train-diffusion", "sample-and-eval")


def test_a_second_run_skips_all_stages(finished: Finished, photographs: Path, svgpipe: Callable[..., Outcome]) -> None:
    before = {stage: (finished.root / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES}
    found = svgpipe("run", finished.recipe_file, "--workdir", finished.root, "--source", photographs)
    assert found.code == 0, found.err
    assert found.err.count("finished before, unchanged") == 5
    assert {stage: (finished.root / stage / "manifest.json").stat().st_mtime_ns for stage in STAGES} == before
    assert str(finished.root / "evaluation" / "report.html") in found.out


def test_run_refuses_a_changed_recipe_and_names_the_field(
    finished: Finished, photographs: Path, svgpipe: Callable[..., Outcome]
) -> None:
    options = ["--workdir", finished.root, "--source", photographs, "--set", "autoencoder.batch_size=3"]
    found = svgpipe("run", finished.recipe_file, *options)
    assert found.code == 1
    assert "config.batch_size: 4 there, 3 here" in found.err


def test_run_without_a_source(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    found = svgpipe("run", finished.recipe_file, "--workdir", tmp_path / "work")
    assert found.code == 2
    assert "--source" in found.err


@pytest.mark.parametrize("stage", STAGES)
def test_inspect_prints_every_artifact(finished: Finished, svgpipe: Callable[..., Outcome], stage: str) -> None:
    found = svgpipe("inspect", finished.root / stage)
    assert found.code == 0, found.err
    assert len(found.out.splitlines()) < 40
    as_json = json.loads(svgpipe("inspect", finished.root / stage, "--json").out)
    assert as_json["finished"] is True
    assert as_json["fingerprint"][:40] in found.out
    assert as_json["facts"]


def test_inspect_of_a_working_directory_and_of_an_empty_one(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    everything = json.loads(svgpipe("inspect", finished.root, "--json").out)
    assert [Path(a["path"]).name for a in everything["artifacts"]] == list(STAGES)
    found = svgpipe("inspect", tmp_path)
    assert found.code == 1
    assert "expected an svgpipe artifact" in found.err


def test_inspect_of_unfinished_work(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    shutil.copytree(finished.root / "cache", tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    found = svgpipe("inspect", tmp_path / "cache")
    assert "unfinished" in found.out
    assert "units finished" in found.out
    for command in (["train-diffusion", "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--recipe", "demo"],):
        refused = svgpipe(*command)
        assert refused.code == 1
        assert "begun and not finished" in refused.err


def test_inspect_of_altered_work(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    shutil.copytree(finished.root / "cache", tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(path.read_text().replace('"num_valid": 36', '"num_valid": 35'))
    found = svgpipe("inspect", tmp_path / "cache")
    assert found.code == 1
    assert "altered after it was written" in found.err


def test_a_manifest_of_a_newer_schema_is_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    shutil.copytree(finished.root / "cache", tmp_path / "cache")
    path = tmp_path / "cache" / "manifest.json"
    path.write_text(path.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    found = svgpipe("train-diffusion", "--cache", tmp_path / "cache", "--out", tmp_path / "out", "--recipe", "demo")
    assert found.code == 1
    assert "schema 1 or older, found 2" in found.err
    assert "Upgrade svgpipe" in found.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shard"], ["Missing argument"]),
        (["extract", "--shards", "x"], ["Missing option"]),
        (["nonsense"], ["No such command"]),
        (["extract", "--shards", "x/{a.tar", "--autoencoder", "a", "--out", "o"], ["braces"]),
        (["run", "no-such-recipe", "--workdir", "w"], ["no-such-recipe", "expected one of ade20k-probe, demo"]),
        (["run", "demo", "--workdir", "w", "--set", "diffusion.stepz=1"], ["did you mean diffusion.steps"]),
        (["shard", "a", "--out", "b", "--holdout", "2"], ["holdout"]),
    ],
)
def test_usage_errors_exit_with_2(svgpipe: Callable[..., Outcome], arguments: list[str], words: list[str]) -> None:
    found = svgpipe(*arguments)
    assert found.code == 2
    for word in words:
        assert word in found.err


def test_a_full_disk_is_one_message(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/step-00000004")

    monkeypatch.setattr(CheckpointStore, "save", full)
    cache = ["--cache", finished.root / "cache", "--recipe", finished.recipe_file]
    found = svgpipe("train-diffusion", *cache, "--out", tmp_path / "out", "--recipe", "demo")
    assert found.code == 1
    assert "/data/step-00000004: no space left on the device" in found.err


def test_ctrl_c_inside_a_library_is_no_traceback(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signal may arrive while Ray's reader holds the lock of a queue."""

    def interrupted(*_: object) -> None:
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("release unlocked lock")

    monkeypatch.setattr(CheckpointStore, "save", interrupted)
    cache = ["--cache", finished.root / "cache", "--recipe", finished.recipe_file]
    found = svgpipe("train-diffusion", *cache, "--out", tmp_path / "out", "--recipe", "demo")
    assert found.code == 130
    assert "the same command resumes" in found.err


def test_the_console_script_and_its_version() -> None:
    script = Path(sys.executable).with_name("svgpipe")
    found = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert found.stdout.startswith("svgpipe ")
    assert main(["--help"]) == 0


def dry_run(svgpipe: Callable[..., Outcome], *arguments: object) -> Outcome:
    return svgpipe("run", *arguments, "--dry-run")


def actions(found: Outcome) -> dict[str, str]:
    """Return the action of every stage in the table of a dry run."""
    rows = [line.split() for line in found.out.splitlines()]
    return {row[0]: row[1] for row in rows if row and row[0] in STAGES}


def test_a_dry_run_of_a_finished_pipeline_skips_everything(
    finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    work = ["--workdir", finished.root, "--source", photographs]
    assert actions(dry_run(svgpipe, finished.recipe_file, *work)) == dict.fromkeys(STAGES, "skip")
    changed = dry_run(svgpipe, finished.recipe_file, *work, "--steps", "1,3", "--guidance", "1.0")
    assert changed.code == 1
    assert actions(changed) == dict.fromkeys(STAGES[:4], "skip") | {"evaluation": "refuse"}
    assert "config.steps: [1, 2] there, [1, 3] here" in changed.err
    early = dry_run(svgpipe, finished.recipe_file, *work, "--holdout", "0.4")
    assert actions(early) == {"shards": "refuse"} | dict.fromkeys(STAGES[1:], "unknown")
    new = dry_run(svgpipe, finished.recipe_file, "--workdir", tmp_path / "new", "--source", photographs)
    assert new.code == 0
    assert actions(new) == dict.fromkeys(STAGES, "run")
    assert not (tmp_path / "new").exists()


def test_a_dry_run_of_a_stopped_pipeline_names_the_stage_that_resumes(
    finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    shutil.copytree(finished.root, tmp_path / "work")
    (tmp_path / "work" / "cache" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "work" / "evaluation")
    before = sorted((tmp_path / "work").rglob("*"))
    found = dry_run(svgpipe, finished.recipe_file, "--workdir", tmp_path / "work", "--source", photographs)
    expected = {"shards": "skip", "autoencoder": "skip", "cache": "resume", "diffusion": "unknown", "evaluation": "run"}
    assert actions(found) == expected
    assert sorted((tmp_path / "work").rglob("*")) == before


def test_a_dry_run_of_the_demo_writes_no_photographs(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    found = svgpipe("demo", "--workdir", tmp_path / "demo", "--dry-run")
    assert found.code == 0 and actions(found) == dict.fromkeys(STAGES, "run")
    assert not (tmp_path / "demo").exists()


def test_a_printed_recipe_is_a_recipe(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    assert svgpipe("recipe").out.split() == builtin_names()
    for name in builtin_names():
        mine = tmp_path / f"{name}.yaml"
        mine.write_text(svgpipe("recipe", name, "--set", "diffusion.steps=77").out)
        assert load_recipe(str(mine)) == load_recipe(name, ["diffusion.steps=77"])
        assert "  # Fraction of every class kept out of training.\n" in mine.read_text()
    assert svgpipe("recipe", "no-such").code == 2


def test_run_takes_the_options_of_every_stage(svgpipe: Callable[..., Outcome]) -> None:
    """Except the stage's own inputs and output."""
    own = {"--out", "--shards", "--autoencoder", "--cache", "--diffusion", "--reference", "--recipe"}
    own |= {"--align", "--vision-from", "--from", "--decoder-only"}  # artifacts of another run
    options = {name: set(re.findall(r"--[a-z-]+", svgpipe(name, "-h").out)) for name in ("run", *STAGE_COMMANDS)}
    for name in STAGE_COMMANDS:
        assert options[name] - own <= options["run"], name


def test_help_groups_the_commands(svgpipe: Callable[..., Outcome]) -> None:
    text = svgpipe("-h").out
    titles = ["All stages", "Stages", "Look at artifacts", "Mend and convert", "Analyse"]
    places = [text.index(f" {title} ─") for title in titles]
    assert places == sorted(places)
    assert "--install-completion" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "evaluation.guidance_mode=sideways"], "evaluation.guidance_mode: "),
        (["--ema", "0.99"], "evaluation.weights: weights '0.99': expected one of ema, ema-0.9, ema-0.5, raw"),
        (["--set", "evaluation.extractor.weights=none.pth"], "none.pth: expected a weight file, found none"),
        (
            ["--set", "autoencoder.perceptual.kind=lpips-vgg", "--set", "autoencoder.perceptual.vgg_weights=no.pth"],
            "no.pth",
        ),
        (["--set", "autoencoder.backbone.name=resnet_17"], "resnet_17"),
        (["--guide", "nowhere"], "nowhere: expected a diffusion model"),
    ],
)
def test_run_checks_all_sections_before_the_first_stage(
    finished: Finished,
    photographs: Path,
    tmp_path: Path,
    svgpipe: Callable[..., Outcome],
    options: list[str],
    words: str,
) -> None:
    if "evaluation.extractor.weights=none.pth" in options:
        options = [*options, "--set", "evaluation.extractor.kind=inception"]
    found = svgpipe("run", finished.recipe_file, "--source", photographs, "--workdir", tmp_path / "work", *options)
    assert found.code in (1, 2) and words in found.err
    assert not (tmp_path / "work").exists()


def test_a_working_directory_of_other_images_is_not_the_demos(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """A printed recipe names the demo's photographs as its source."""
    shutil.copytree(finished.root, tmp_path / "work")
    for more in ([], ["--dry-run"]):
        change = ["--set", "source=demo-photographs", *more]
        refused = svgpipe("run", finished.recipe_file, "--workdir", tmp_path / "work", *change)
        assert refused.code == 2 and "Give the image folder with --source DIR" in refused.err
    assert not (tmp_path / "work" / "photographs").exists()


def test_run_works_after_the_images_are_gone(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    work, gone = tmp_path / "work", tmp_path / "gone"
    shutil.copytree(finished.root, work)
    manifest = json.loads((work / "shards" / "manifest.json").read_text())
    manifest["inputs"]["source"]["path"] = str(gone)  # a path is no part of the fingerprint
    (work / "shards" / "manifest.json").write_text(json.dumps(manifest))
    run = ("run", finished.recipe_file, "--workdir", work, "--source", gone)
    found = svgpipe(*run)
    assert found.code == 0 and "not there any more; the finished shards" in found.err
    assert actions(dry_run(svgpipe, *run[1:])) == dict.fromkeys(STAGES, "skip")
    refused = svgpipe(*run, "--set", "shard.seed=3")
    assert refused.code == 1 and "config.seed" in refused.err
    other = svgpipe("run", finished.recipe_file, "--workdir", work, "--source", tmp_path / "typo")
    assert other.code == 2 and "typo: expected a folder of class folders" in other.err


def test_a_dry_run_names_the_process_that_works(
    finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    work = tmp_path / "work"
    shutil.copytree(finished.root, work)
    (work / "cache" / "manifest.json").unlink()
    run = (finished.recipe_file, "--workdir", work, "--source", photographs)
    with contextlib.ExitStack() as locks:
        locks.callback(Lock(work / "cache").release)
        busy = dry_run(svgpipe, *run)
    assert busy.code == 1 and actions(busy)["cache"] == "refuse" and f"in use by process {os.getpid()}" in busy.err
    assert actions(dry_run(svgpipe, *run, "--set", "autoencoder.steps=9"))["autoencoder"] == "resume"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_terminals_of_other_encodings(finished: Finished, encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    script = Path(sys.executable).with_name("svgpipe")
    commands: list[list[object]] = [["inspect", finished.root], ["sample-and-eval", "-h"]]
    for command in commands:
        found = subprocess.run([script, *map(str, command)], env=environment, capture_output=True)
        assert found.returncode == 0 and found.stdout and b"Traceback" not in found.stderr, found.stderr
        found.stdout.decode(encoding)


def closed_port() -> str:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return str(unused.getsockname()[1])


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:8265", "expected auto, local, HOST:PORT"),
        ("nonsense", "expected auto, local, HOST:PORT"),
        ("127.0.0.1:99999", "nothing answers there"),
        ("127.0.0.1:", "nothing answers there"),
        ("ray://127.0.0.1:", "nothing answers there"),
    ],
)
def test_addresses_without_a_cluster_are_refused_at_once(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], address: str, words: str
) -> None:
    address += closed_port() if address.endswith(":") else ""
    extract = ("extract", "--shards", finished.root / "shards", "--autoencoder", finished.root / "autoencoder")
    found = svgpipe(*extract, "--recipe", finished.recipe_file, "--out", tmp_path / "out", "--address", address)
    assert found.code == 2 and f"--address {address}: {words}" in found.err


def test_a_ray_that_cannot_start_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("Timed out waiting for file /full/ray/gcs_server_port\nmore")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(SvgpipeError, match=r"Timed out waiting for file .* It needs space in"), connected():
        pass
