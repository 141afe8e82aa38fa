"""Charts put values where their axes say."""

from __future__ import annotations

import itertools
import math
import re
from importlib import resources

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svgpipe.pipeline.chart import COLOURS, Value, chart


def test_places_follow_the_ticks() -> None:
    """A tick's text is the value of its place, for points, intervals and levels alike."""
    series = {"a": [Value(4.0, 3.0, 5.0), Value(2.0)], "b": [Value(1.0), Value(0.0)]}
    found = chart("title", "steps", "distance", [1, 25], series, {"floor": 0.5})
    bottom, top = found.y_ticks[0], found.y_ticks[-1]
    assert [tick.text for tick in found.y_ticks] == ["0", "1", "2", "3", "4", "5"]

    def value_at(y: float) -> float:
        return 5 * (bottom.place - y) / (bottom.place - top.place)

    first, second = found.lines
    assert [value_at(p.y) for p in first.points] == pytest.approx([4, 2])
    assert [value_at(p.y) for p in second.points] == pytest.approx([1, 0])
    point = first.points[0]
    assert point.low is not None
    assert point.high is not None
    assert (value_at(point.low), value_at(point.high)) == pytest.approx((3, 5))
    assert value_at(found.levels[0].y) == pytest.approx(0.5)
    assert [p.x for p in first.points] == [tick.place for tick in found.x_ticks]
    assert first.colour != second.colour
    assert first.dash != second.dash
    assert first.points[1].text == "a, steps 25: 2"


@given(st.floats(1e-6, 1e9))
def test_axes_have_a_few_round_ticks(largest: float) -> None:
    found = chart("title", "steps", "distance", [5], {"a": [Value(largest)]}, {})
    values = [float(tick.text) for tick in found.y_ticks]
    assert 4 <= len(values) <= 9
    assert values[0] == 0
    assert found.y_ticks[-1].place >= found.top - 1e-6
    assert f"{values[1]:e}"[0] in "125"


@given(st.floats(1e-6, 1e6), st.floats(8.1, 1e7))
def test_a_logarithmic_axis_places_by_ratio(least: float, ratio: float) -> None:
    values = [least, least * ratio**0.5, least * ratio]
    found = chart("t", "steps", "distance", [1, 2, 3], {"a": [Value(v) for v in values]}, {}, logarithmic=True)
    first, middle, last = (point.y for point in found.lines[0].points)
    assert first - middle == pytest.approx(middle - last)
    assert found.top < last < first < found.bottom
    assert 1 <= len(found.y_ticks) <= 9 and found.y_name == "distance, logarithmic"
    for tick in found.y_ticks:
        share = math.log(float(tick.text) / least) / math.log(ratio)
        assert tick.place == pytest.approx(first + share * (last - first), abs=0.01)


def test_the_papers_distances_can_be_told_apart_below_decoded_noise() -> None:
    """Of a model like the paper's, with the ceiling far above and two lines close to each other below."""
    values = {"guidance 1": (69.38, 12.26, 9.39, 6.57), "guidance 1.5": (29.48, 9.03, 6.49, 3.54)}
    series = {name: [Value(v) for v in row] for name, row in values.items()}
    levels = {"decoded noise": 400.0, "held-out real": 1.75, "reconstructions": 1.9}
    found = chart("t", "steps", "FID", [2, 5, 10, 25], series, levels, logarithmic=True)
    for one, two in zip(*(line.points for line in found.lines), strict=True):
        assert two.y - one.y > 10
    texts = sorted(level.text_y for level in found.levels)
    assert all(below - above >= 12 for above, below in itertools.pairwise(texts))
    assert [level.name for level in found.levels] == ["decoded noise", "reconstructions", "held-out real"]
    wide = chart("t", "x", "y", [1, 2], {"a": [Value(1.0, 0.001, 3.0), Value(9.0, -1, 99.0)]}, {}, logarithmic=True)
    least, largest = wide.lines[0].points  # ends of intervals do not stretch the axis
    assert least.low == largest.low == pytest.approx(wide.bottom) and largest.high == pytest.approx(wide.top)
    assert least.y - largest.y > 150
    assert chart("t", "x", "y", [1], {"a": [Value(3.0)]}, {}, logarithmic=True).y_ticks[0].text == "3"


def contrast_to_white(colour: str) -> float:
    """By WCAG 2.2: 1 for white itself, 21 for black."""
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (b / 255 for b in bytes.fromhex(colour))
    ]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)


def test_pages_can_be_read_by_all() -> None:
    """Text has the contrast that WCAG AA asks for (4.5), what is drawn and means something that of graphics (3)."""
    folder = resources.files("svgpipe.pipeline")
    style = folder.joinpath("page_style.html").read_text()
    named = dict(re.findall(r"--(\w+): #([0-9a-f]{6})", style))
    assert min(contrast_to_white(named[name]) for name in ("ink", "soft", "mark")) >= 4.5
    assert min(contrast_to_white(colour.removeprefix("#")) for colour in COLOURS) >= 4.5  # names of classes, too
    assert contrast_to_white(named["graph"]) >= 3
    levels = re.findall(r'stroke="#([0-9a-f]{6})" stroke-dasharray', folder.joinpath("page_chart.html").read_text())
    assert levels and min(map(contrast_to_white, levels)) >= 3


def test_a_chart_of_zeros_is_drawn() -> None:
    found = chart("title", "steps", "distance", [5], {"a": [Value(0.0)]}, {})
    assert found.lines[0].points[0].y == found.y_ticks[0].place


@pytest.mark.parametrize("values", [(-2.0, -2.0), (-3.0, -1.0)])
def test_a_chart_of_negative_values_reaches_to_zero(values: tuple[float, float]) -> None:
    drawn = chart("t", "x", "y", [1, 2], {"a": [Value(v) for v in values]}, {})
    heights = [point.y for point in drawn.lines[0].points]
    assert heights[0] >= heights[1] and len({tick.text for tick in drawn.y_ticks}) >= 2
