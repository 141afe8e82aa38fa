"""Code and commands of the READMEs run, and the files that they name exist."""

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
FOLDERS = ("pipeline", "stages", "models", "manifests", "tests")
READMES = [ROOT / "README.md", *(ROOT / folder / "README.md" for folder in FOLDERS)]
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in READMES}
SHOWN = ("plan", "inspect", "verify", "repair", "requantize", "diff")  # commands on a cache in stages/README.md


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[name], re.DOTALL)


def commands(name: str) -> list[list[str]]:
    lines = "\n".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(line, comments=True) for line in lines if line.startswith("svgpipe")]


@pytest.mark.parametrize("name", [name for name in TEXTS if blocks(name, "python")])
def test_python_blocks_run_against_a_cache(finished: Finished, tmp_path: Path, name: str) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "demo").symlink_to(finished.root)
    assert main(["export", str(finished.root / "diffusion"), "--out", str(tmp_path / "exported")]) == 0
    for code in blocks(name, "python"):
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", [name for name in TEXTS if commands(name)])
def test_commands_parse_and_stop_at_the_missing_data(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, svgpipe: Callable[..., Outcome]
) -> None:
    """Options and recipes are valid; the only errors are about missing data."""
    monkeypatch.chdir(tmp_path)
    for study in blocks(name, "yaml"):
        (tmp_path / "mine.yaml").write_text(study)
    for command in commands(name):
        if ">" in command:  # prints a file that the next commands read
            *printing, _, file = command
            (tmp_path / file).write_text(svgpipe(*printing[1:]).out)
            continue
        found = svgpipe(*command[1:])
        assert found.code in (1, 2), command
        assert re.search(r"error: (imagenet|ade20k|work|photos|runs|ILSVRC2012_img_train)\b", found.err), found.err


def test_the_script_that_these_commands_name_is_installed(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("svgpipe")
    found = subprocess.run([script, *commands("stages/README.md")[0][1:]], cwd=tmp_path, capture_output=True, text=True)
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
    ran = [command for command in commands("stages/README.md") if command[1] in SHOWN]
    assert sorted(command[1] for command in ran) == sorted(SHOWN)
    for command in ran:
        found = svgpipe(*command[1:])
        assert found.code == 0, found.err
    assert (tmp_path / "work" / "cache.html").exists()
    assert FeatureCache("work/cache-int8").manifest.store_dtype == "int8"


def test_own_images_are_run_as_written(
    photographs: Path,
    tiny_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    svgpipe: Callable[..., Outcome],
) -> None:
    """The section of the top README, with a smaller recipe."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").symlink_to(photographs)
    shutil.copy(tiny_recipe, tmp_path / "mine.yaml")
    names = {"mine.yaml", "work", "sample"}
    own = [command for command in commands("README.md") if names & set(command) and ">" not in command]
    assert [command[1] for command in own] == ["run", "run", "status", "sample"]
    for command in own:
        found = svgpipe(*command[1:])
        assert found.code == 0, found.err
    assert (tmp_path / "cats.png").exists()


def test_files_and_links_in_readmes_exist() -> None:
    top = TEXTS["README.md"]
    for name in builtin_names():
        assert f"`{name}`" in top or f"`-{name.rsplit('-', 1)[-1]}`" in top
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:^|`)make (\w+)", "".join(TEXTS.values()), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path, text in TEXTS.items():
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert ((ROOT / path).parent / link).exists(), f"{path} links to {link}"
    for folder in FOLDERS[:-1]:
        named = set(re.findall(r"`(\w+\.py)`", TEXTS[f"{folder}/README.md"]))
        assert all(list((ROOT / folder).rglob(file)) or list((ROOT / "tests").rglob(file)) for file in named), named


def test_the_top_readme_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) < 150
