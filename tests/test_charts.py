"""Charts say what was measured, in text that can be read and selected, and as PDF."""

from __future__ import annotations

import itertools
import re
from importlib import resources
from pathlib import Path

import pytest

from svgpipe.manifests.estimate import Estimate
from svgpipe.pipeline.charts import COLOURS, LEVEL_COLOUR, Drawing, LineChart, curve, scatter


def estimates(*values: float) -> list[Estimate]:
    return [Estimate(value=value, low=value - 0.5, high=value + 1, num_images=9) for value in values]


def texts(drawing: Drawing) -> list[str]:
    """All text of the SVG, in the order in which it is drawn."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawing.svg)


def test_a_chart_names_everything_it_shows() -> None:
    series = {"guidance 1": estimates(4, 2), "guidance 1.5": estimates(3, 1)}
    drawn = LineChart("Distance <b>", "steps", "Fréchet distance", [1, 25], series, {"floor": 0.5}).render()
    for text in ("steps", "Fréchet distance", "1", "25", "guidance 1", "guidance 1.5", "floor"):
        assert text in texts(drawn)
    assert drawn.svg.startswith('<svg class="chart" role="img" aria-label="Distance &lt;b&gt;" ')
    assert "width=" not in drawn.svg[: drawn.svg.index(">")]
    assert drawn.pdf.startswith(b"%PDF")
    assert len({colour for colour in COLOURS if f"stroke: {colour}" in drawn.svg}) == 2


def test_the_same_chart_is_drawn_in_the_same_bytes() -> None:
    chart = LineChart("title", "steps", "distance", [1, 2], {"a": estimates(4, 2)}, {"floor": 1.0})
    assert chart.render() == chart.render()
    assert curve("loss", [1, 2, 3], [3.0, 2.0, 1.0], "step") == curve("loss", [1, 2, 3], [3.0, 2.0, 1.0], "step")


def test_names_of_levels_do_not_lie_on_each_other() -> None:
    """With the ceiling far above and two levels close to each other below, as of a model like the paper's."""
    levels = {"decoded noise": 400.0, "held-out real": 1.75, "reconstructions": 1.76}
    series = {"guidance 1": estimates(69.38, 12.26, 9.39)}
    drawn = LineChart("t", "steps", "FID", [2, 5, 10], series, levels, logarithmic=True).render()
    names = "|".join(levels)
    places = re.findall(rf"<text[^>]* y=\"([\d.]+)\"[^>]*>(?:{names})<", drawn.svg)
    found = sorted(map(float, places))
    assert len(found) == 3 and all(above - below > 9 for below, above in itertools.pairwise(found))
    assert "FID, logarithmic" in texts(drawn)


@pytest.mark.parametrize("values", [(0.0, 0.0), (-3.0, -1.0), (1e-6, 1e9)])
def test_any_numbers_can_be_drawn(values: tuple[float, float]) -> None:
    plain = [Estimate(value=value, num_images=9) for value in values]
    for joined in (True, False):
        assert "a" in texts(LineChart("t", "x", "y", ["p", "q"], {"a": plain}, {}, joined=joined).render())
    assert LineChart("t", "x", "y", [1], {"a": plain[:1]}, {}).render().pdf


def test_a_map_names_its_classes_in_their_colours() -> None:
    drawn = scatter("map", [(0, 0), (1, 1), (5, 5), (6, 6)], ["cat", "cat", "dog & co", "dog & co"])
    assert "cat" in texts(drawn) and "dog &amp; co" in texts(drawn)
    assert all(f"fill: {colour}" in drawn.svg for colour in COLOURS[:2])


def test_the_pdf_lies_beside_the_page(tmp_path: Path) -> None:
    drawn = curve("diffusion: held-out loss", [1, 2], [2.0, 1.0], "step")
    drawn.save_beside(tmp_path / "report.html")
    assert (tmp_path / "report-diffusion-held-out-loss.pdf").read_bytes() == drawn.pdf


def contrast_to_white(colour: str) -> float:
    """By WCAG 2.2: 1 for white itself, 21 for black."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
        for c in (b / 255 for b in bytes.fromhex(colour.removeprefix("#")))
    ]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_pages_can_be_read_by_all() -> None:
    """Text has the contrast that WCAG AA asks for (4.5), what is drawn and means something that of graphics (3)."""
    style = resources.files("svgpipe.pipeline").joinpath("page_style.html").read_text()
    named = dict(re.findall(r"--(\w+): #([0-9a-f]{6})", style))
    assert min(contrast_to_white(named[name]) for name in ("ink", "soft", "mark")) >= 4.5
    assert min(map(contrast_to_white, COLOURS)) >= 4.5
    assert min(map(contrast_to_white, (named["graph"], LEVEL_COLOUR))) >= 3
