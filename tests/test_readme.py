"""What the README says is executed, and what it names exists."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.recipe_loader import builtin_names
from svgpipe.pipeline.cli import main

from .conftest import Finished, Outcome

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_blocks_run_against_a_cache(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished.root)
    assert main(["export", str(finished.root / "diffusion"), "--out", str(tmp_path / "exported")]) == 0
    found = blocks("python")
    assert len(found) == 3
    for code in found:
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def commands() -> list[list[str]]:
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("svgpipe")]


@pytest.mark.parametrize("command", commands(), ids=lambda c: c[1])
def test_commands_parse_and_stop_at_the_missing_data(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, svgpipe: Callable[..., Outcome]
) -> None:
    """Options and recipe are understood: what is refused is that the data is not there."""
    monkeypatch.chdir(tmp_path)
    found = svgpipe(*command[1:])
    assert found.code in (1, 2)
    assert re.search(r"error: (imagenet|work)\b", found.err), found.err


def test_the_script_that_these_commands_name_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("svgpipe")
    found = subprocess.run([script, *commands()[0][1:]], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode in (1, 2)
    assert found.stderr.startswith("error: "), found.stderr


def test_the_commands_about_a_cache_run_as_written(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, svgpipe: Callable[..., Outcome]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()
    for name in ("shards", "autoencoder"):
        (tmp_path / "work" / name).symlink_to(finished.root / name)
    shutil.copytree(finished.root / "cache", tmp_path / "work" / "cache")
    ran = [
        command for command in commands() if command[1] in ("plan", "inspect", "verify", "repair", "requantize", "diff")
    ]
    assert len(ran) == 6
    for command in ran:
        found = svgpipe(*command[1:])
        assert found.code == 0, found.err
    assert (tmp_path / "work" / "cache.html").exists()
    assert FeatureCache("work/cache-int8").manifest.store_dtype == "int8"


def test_recipes_targets_and_folders_named_here_exist() -> None:
    for name in builtin_names():
        assert f"`{name}`" in README or f"`-{name.rsplit('-', 1)[-1]}`" in README
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for folder in ("pipeline", "stages", "models", "manifests", "tests"):
        assert f"`{folder}/`" in README
        assert (ROOT / folder).is_dir()
