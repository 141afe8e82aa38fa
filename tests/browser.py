"""Opens pages in headless Chromium, where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
# What a person would see at once: a page wider than the window, a picture that is not decoded, or a console error.
PROBE = """<script>
const problems = [];
addEventListener("error", event => problems.push("script: " + event.message));
addEventListener("load", () => {
  const width = document.documentElement.scrollWidth;
  if (width > innerWidth) problems.push(`${width} pixels wide in a window of ${innerWidth}`);
  for (const image of document.images) {
    if (!image.complete || !image.naturalWidth) problems.push("not decoded: " + image.alt);
    if (!image.alt) problems.push("a picture without alternative text");
  }
  for (const drawing of document.querySelectorAll("svg")) {
    const hidden = drawing.closest("[aria-hidden=true]");
    if (!hidden && !drawing.getAttribute("aria-label")) problems.push("a drawing without a label");
  }
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = JSON.stringify({problems, pictures: document.images.length});
  document.body.append(found);
});
</script>"""


def chromium() -> str:
    """Return the browser's program; skips the test without one."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    return program


def open_page(page: Path, folder: Path, width: int) -> tuple[list[str], int]:
    """Return the problems of a page in a window of `width` pixels, and its number of pictures."""
    probed = folder / f"{page.stem}-{width}.html"
    probed.write_text(page.read_text().replace("<head>", f"<head>{PROBE}", 1))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--virtual-time-budget=10000"]
    data = f"--user-data-dir={folder / f'browser-{width}'}"
    ran = subprocess.run(
        [chromium(), *options, data, f"--window-size={width},900", "--dump-dom", probed.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="found">(.*?)</pre>', ran.stdout, re.DOTALL)
    assert found is not None, ran.stderr[-2000:]
    seen = json.loads(unescape(found.group(1)))
    console = re.findall(r"CONSOLE[^\n]*", ran.stderr)
    return [*seen["problems"], *console], seen["pictures"]


def require_good_page(page: Path, folder: Path, *, pictures: bool = True) -> None:
    """Assert that a page has no problem in a wide and in a narrow window, and that it has pictures or none."""
    for width in (1280, 500):
        problems, count = open_page(page, folder, width)
        assert not problems, f"{page.name} at {width} pixels: {problems}"
        assert bool(count) == pictures
