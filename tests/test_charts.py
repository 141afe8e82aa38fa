"""Charts name their content in selectable text, and are saved as PDF."""

from __future__ import annotations

import itertools
import re
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage.color import deltaE_ciede2000, rgb2lab

from svgpipe.manifests.estimate import Estimate
from svgpipe.pipeline.charts import COLOURS, LEVEL_COLOUR, Drawing, LineChart, curve, curves, scatter


def estimates(*values: float) -> list[Estimate]:
    return [Estimate(value=value, low=value - 0.5, high=value + 1, num_images=9) for value in values]


def texts(drawing: Drawing) -> list[str]:
    """Return all text of the SVG, in drawing order."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", drawing.svg)


def test_a_chart_names_everything_it_shows() -> None:
    series = {"guidance 1": estimates(4, 2), "guidance 1.5": estimates(3, 1)}
    drawn = LineChart("Distance <b>", "steps", "Fréchet distance", [1, 25], series, {"floor": 0.5}).render()
    for text in ("steps", "Fréchet distance", "1", "25", "guidance 1", "guidance 1.5", "floor"):
        assert text in texts(drawn)
    assert drawn.svg.startswith('<svg class="chart" role="img" aria-label="Distance &lt;b&gt;" ')
    assert "width=" not in drawn.svg[: drawn.svg.index(">")]
    assert drawn.pdf.startswith(b"%PDF")
    assert len(set(re.findall(r"stroke: var\(--series-\d\)", drawn.svg))) == 2
    assert not re.search('#[0-9a-f]{6}[ ;"]', drawn.svg)  # every colour follows the page, light or dark


def test_the_same_chart_is_drawn_in_the_same_bytes() -> None:
    chart = LineChart("title", "steps", "distance", [1, 2], {"a": estimates(4, 2)}, {"floor": 1.0})
    assert chart.render() == chart.render()
    assert curve("loss", [1, 2, 3], [3.0, 2.0, 1.0], "step") == curve("loss", [1, 2, 3], [3.0, 2.0, 1.0], "step")


def test_labels_of_horizontal_lines_do_not_overlap() -> None:
    """The ceiling is far above two levels that are close together, as for a good model."""
    levels = {"decoded noise": 400.0, "held-out real": 1.75, "reconstructions": 1.76}
    series = {"guidance 1": estimates(69.38, 12.26, 9.39)}
    drawn = LineChart("t", "steps", "FID", [2, 5, 10], series, levels, logarithmic=True).render()
    names = "|".join(levels)
    places = re.findall(rf"<text[^>]* y=\"([\d.]+)\"[^>]*>(?:{names})<", drawn.svg)
    found = sorted(map(float, places))
    assert len(found) == 3 and all(above - below > 9 for below, above in itertools.pairwise(found))
    assert "FID, logarithmic" in texts(drawn)


@pytest.mark.parametrize("values", [(0.0, 0.0), (-3.0, -1.0), (1e-6, 1e9)])
def test_charts_draw_any_numbers(values: tuple[float, float]) -> None:
    plain = [Estimate(value=value, num_images=9) for value in values]
    for joined in (True, False):
        assert "a" in texts(LineChart("t", "x", "y", ["p", "q"], {"a": plain}, {}, joined=joined).render())
    assert LineChart("t", "x", "y", [1], {"a": plain[:1]}, {}).render().pdf


def test_a_map_names_its_classes() -> None:
    drawn = scatter("map", [(0, 0), (1, 1), (5, 5), (6, 6)], ["cat", "cat", "dog & co", "dog & co"])
    assert "cat" in texts(drawn) and "dog &amp; co" in texts(drawn)
    assert all(f"fill: var(--series-{number})" in drawn.svg for number in (1, 2))
    assert not re.search(r"<text[^>]*--series", drawn.svg)  # text has the ink's contrast


def test_class_names_of_any_script_are_drawn_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    drawn = scatter("map", [(0, 0), (1, 1), (5, 5), (6, 6)], ["猫", "猫", "собака", "собака"])
    assert "猫" in texts(drawn) and "собака" in texts(drawn)
    assert [str(warning.message) for warning in recwarn if "Glyph" in str(warning.message)] == []


def test_the_pdf_lies_beside_the_page(tmp_path: Path) -> None:
    drawn = curve("diffusion: held-out loss", [1, 2], [2.0, 1.0], "step")
    drawn.save_beside(tmp_path / "report.html")
    assert (tmp_path / "report-diffusion-held-out-loss.pdf").read_bytes() == drawn.pdf


def linear_rgb(colour: str) -> NDArray[np.float64]:
    """sRGB hex → linear RGB in [0, 1]."""
    values = np.frombuffer(bytes.fromhex(colour.removeprefix("#")), np.uint8) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, two: str) -> float:
    """By WCAG 2.2: 1 for equal colours, 21 for black and white."""
    low, high = sorted(float(linear_rgb(colour) @ (0.2126, 0.7152, 0.0722)) for colour in (one, two))
    return (high + 0.05) / (low + 0.05)


# What people see of linear RGB, from Machado, Oliveira and Fernandes 2009, severity 1.
VISION = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def distance(one: str, two: str, seen: Any) -> float:
    """CIEDE2000 of two colours as they are seen."""
    linear = np.clip([np.asarray(seen) @ linear_rgb(colour) for colour in (one, two)], 0, 1)
    encoded = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return float(deltaE_ciede2000(*rgb2lab(encoded)))


def themes() -> list[dict[str, str]]:
    """Colours by name of the light page, then of the dark one."""
    style = resources.files("svgpipe.pipeline").joinpath("page_style.html").read_text()
    light, dark = (
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in style.split("prefers-color-scheme")
    )
    assert light.keys() == dark.keys()
    return [light, dark]


def test_charts_have_the_colours_of_the_light_page() -> None:
    """In the PDF, which has no CSS."""
    light = themes()[0]
    assert tuple(light[f"series-{number}"] for number in range(1, len(COLOURS) + 1)) == COLOURS
    assert light["level"] == LEVEL_COLOUR


@pytest.mark.parametrize("theme", themes(), ids=["light", "dark"])
def test_pages_can_be_read_by_all(theme: dict[str, str]) -> None:
    """Text and graphics have the contrast of WCAG AA: 4.5 and 3. Everybody can tell the colours of lines apart."""
    paper, series = theme["paper"], [colour for name, colour in theme.items() if name.startswith("series")]
    assert min(contrast(theme[name], paper) for name in ("ink", "soft", "mark")) >= 4.5
    assert min(contrast(colour, paper) for colour in (*series, theme["graph"], theme["level"])) >= 3
    for one, two in itertools.combinations(series, 2):
        for name, seen in VISION.items():
            assert distance(one, two, seen) > 8, (one, two, name)


@pytest.mark.parametrize(
    ("names", "columns"), [(["SVG", "KL", "a"], 3), (["x" * 25, "b", "c"], 2), (["x" * 80, "b"], 1)]
)
def test_long_names_leave_fewer_columns_in_a_legend(names: list[str], columns: int) -> None:
    """Else the last column would be cut off."""
    lines = {name: [(0.0, 1.0), (1.0, 2.0)] for name in names}
    drawn = curves("title", lines, "x", "y").svg
    places = [re.findall(rf'x="([\d.]+)"[^>]*>{name}</text>', drawn) for name in names]
    assert len({place for found in places for place in found}) == columns


def test_many_series_look_different_and_leave_the_axes_their_height() -> None:
    few, many = ({f"s{i:02d}": [(1.0, 1.0), (2.0, 2.0)] for i in range(count)} for count in (2, 14))
    drawn = curves("title", many, "x", "a long name of an axis").svg
    looks = [look for look in re.findall(r'clip-path="[^"]*" style="([^"]*)"', drawn) if "series" in look]
    assert len(set(looks)) == len(looks) == 14
    assert {"a long name of an axis,", "logarithmic"} <= set(re.findall(r">([^<>\n]+)</t", drawn))
    heights = []
    for lines in (few, many):
        low, high = (float(y) for y in re.findall(r'd="M [\d.]+ ([\d.]+)\s+L [\d.]+ ([\d.]+)', _axes(lines))[0])
        heights.append(abs(low - high))
    assert heights[1] > 0.9 * heights[0]


def _axes(lines: dict[str, list[tuple[float, float]]]) -> str:
    """Return the left border of a chart."""
    drawn = curves("title", lines, "x", "y").svg
    return drawn[drawn.rindex('id="title-patch_3"') :]
