"""Every kind of page opens in a browser without an error, in a wide and a narrow window. Studies: test_study.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .browser import chromium, open_page, require_good_page
from .conftest import PHOTOGRAPHS, Finished, Outcome

COMMANDS: dict[str, list[str]] = {
    "cache.html": ["inspect", "cache", "--html", "PAGE"],
    "probe.html": ["probe", "cache", "--html", "PAGE"],
    "analysis.html": ["analyze", "cache", "--diffusion", "diffusion", "--velocities", "0", "1", "--html", "PAGE"],
    "reconstruction/report.html": [
        *("eval-reconstruction", "--autoencoder", "autoencoder", "--shards", "shards", "--out", "FOLDER"),
        *("--set", "reconstruction.extractor.kind=backbone", "--set", "reconstruction.bootstrap=0"),
    ],
    "curve/checkpoints.html": [
        *("evaluate-checkpoints", "diffusion", "--cache", "cache", "--autoencoder", "autoencoder"),
        *("--reference", "shards", "--out", "FOLDER", "--pool", ".", "--recipe", "RECIPE", "--steps", "1"),
    ],
    "edit/edit.html": [
        *("edit", "diffusion", "PHOTOGRAPH", "--box", "0,0,16,32", "--class", "cat", "--steps", "2", "--out", "FOLDER"),
    ],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_pages_of_commands_open_in_a_browser(
    finished: Finished,
    photographs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    svgpipe: Callable[..., Outcome],
    name: str,
) -> None:
    chromium()
    monkeypatch.chdir(finished.root)
    photograph = next((photographs / next(iter(PHOTOGRAPHS))).iterdir())
    page = tmp_path / name
    places = {"PAGE": page, "FOLDER": page.parent, "PHOTOGRAPH": photograph, "RECIPE": finished.recipe_file}
    ran = svgpipe(*(places.get(argument, argument) for argument in COMMANDS[name]))
    assert ran.code == 0, ran.err
    require_good_page(page, tmp_path, pictures=name not in ("probe.html", "analysis.html"))


def test_the_report_opens_in_a_browser(finished: Finished, tmp_path: Path) -> None:
    require_good_page(finished.root / "evaluation" / "report.html", tmp_path)


def test_what_is_wrong_on_a_page_is_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    wide, broken = '<p style="width: 900px">wide</p>', '<img src="missing.png" alt="cat">'
    page.write_text(
        f"<!doctype html><html><head></head><body>{wide}{broken}<img><svg></svg>"
        '<script>console.error("oh"); throw Error("no")</script></body></html>'
    )
    problems, pictures = open_page(page, tmp_path, 500)
    assert pictures == 2
    for word in (
        "wide in a window of 500",
        "not decoded: cat",
        "without alternative text",
        "label",
        "oh",
        "Uncaught Error: no",
    ):
        assert any(word in problem for problem in problems), (word, problems)
    assert not any("wide in" in problem for problem in open_page(page, tmp_path, 1280)[0])
