"""`svgpipe analyze`: measures with known answers, and the command on a real cache."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from svgpipe.models.dit import DiT
from svgpipe.models.empirical_flow import empirical_velocity
from svgpipe.stages.analyze import analyze as analyze_stage
from svgpipe.stages.analyze import velocity_agreement as stage
from svgpipe.stages.analyze.class_distances import class_distances
from svgpipe.stages.analyze.class_velocities import class_velocities
from svgpipe.stages.analyze.straightness import straightness
from svgpipe.stages.analyze.velocity_agreement import _groups, _points, velocity_agreement

from .conftest import Finished, Outcome


def test_the_empirical_velocity_is_the_posterior_mean() -> None:
    data = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    z, t = torch.randn(4, 3, generator=torch.Generator().manual_seed(1)), 0.4
    found = empirical_velocity(z, t, data)
    for point, velocity in zip(z, found, strict=True):
        likelihood = torch.stack([Normal(t * x, 1 - t).log_prob(point).sum().exp() for x in data])
        straight = torch.stack([(x - (point - t * x) / (1 - t)) for x in data])  # x1 - z0
        expected = (likelihood[:, None] * straight).sum(0) / likelihood.sum()
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-4)


def test_the_empirical_velocity_ends_on_the_data() -> None:
    """Integrated to the end, it must reach the data rows."""
    data = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    z = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    steps = 400
    for i in range(steps):
        z = z + empirical_velocity(z, i / steps, data) / steps
    assert torch.cdist(z, data).min(1).values.max() < 1e-3
    with pytest.raises(ValueError, match="0 <= t < 1"):
        empirical_velocity(z, 1.0, data)


def _blobs(apart: float, labels: Tensor, dims: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = apart * torch.randn(int(labels.max()) + 1, dims, generator=generator)
    return centres[labels] + torch.randn(len(labels), dims, generator=generator)


def test_velocity_fields_differ_between_classes() -> None:
    labels = torch.arange(90) % 3
    mixed, separate = (velocity_agreement(_blobs(apart, labels), labels, 20, 0) for apart in (0.0, 2.0))
    assert 0.85 < mixed.mean_parted.value < 1.15 and separate.mean_parted.value > 2
    for found in separate.at_times:
        assert found.within.low is not None and found.within.low <= found.within.value
        assert found.within.value > found.between.value


def test_small_classes_are_left_out_of_velocity_agreement() -> None:
    labels = torch.cat([torch.arange(90) % 3, torch.full((3,), 3)])
    found = velocity_agreement(_blobs(2.0, labels), labels, 20, 0)
    assert found.left_out == [3] and found.mean_parted.num_images == 3 * stage.POINTS_PER_CLASS
    without = velocity_agreement(_blobs(2.0, labels)[:90], labels[:90], 20, 0)
    assert without.left_out == [] and without.mean_parted == found.mean_parted


def test_effective_number_of_images_behind_a_field() -> None:
    """Near the noise all of half a class, near the data a single one; earlier in more dimensions."""
    labels = torch.arange(90) % 3
    few, many = (velocity_agreement(_blobs(0.5, labels, dims), labels, 20, 0).at_times for dims in (8, 4096))
    half = len(_groups(labels, 0)[0][1])
    for found in (few, many):
        rows = [at.rows.value for at in found]
        assert rows[0] > 0.9 * half and rows[-1] < 1.2 and rows == sorted(rows, reverse=True)
    middle = [at.time for at in few].index(0.1)
    assert few[middle].rows.value > 0.9 * half and many[middle].rows.value < 2


def test_velocity_agreement_has_an_interval_over_the_points() -> None:
    """The ratio of two means is resampled as a whole, at all times jointly."""
    labels = torch.arange(90) % 3
    found = velocity_agreement(_blobs(0.7, labels), labels, 200, 0)
    for at in found.at_times:
        assert at.parted.value == pytest.approx((1 - at.between.value) / (1 - at.within.value))
        assert at.parted.low is not None and at.parted.high is not None
        assert at.parted.low < at.parted.value < at.parted.high
    mean, widths = found.mean_parted, [at.parted.high - at.parted.low for at in found.at_times]  # type: ignore[operator]
    assert mean.value == pytest.approx(np.mean([at.parted.value for at in found.at_times]))
    assert mean.high is not None and mean.low is not None and 0 < mean.high - mean.low < max(widths)
    assert mean.num_images == found.at_times[0].within.num_images
    without = velocity_agreement(_blobs(0.7, labels), labels, 0, 0).mean_parted
    assert without.low is None and without.value == pytest.approx(mean.value)


def test_velocity_agreement_of_many_classes_uses_some(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(240) % 8
    latents = _blobs(1.0, labels)
    whole = velocity_agreement(latents, labels, 20, 0)
    looked: list[int] = []

    def counted(z: Tensor, t: float, data: Tensor, likely: Tensor | None = None) -> Tensor:
        looked.append(len(z))
        return empirical_velocity(z, t, data, likely)

    monkeypatch.setattr(stage, "empirical_velocity", counted)
    monkeypatch.setattr(stage, "MAX_FIELDS", 3)
    some = velocity_agreement(latents, labels, 20, 0)
    assert looked.count(max(looked)) == 3 * len(some.at_times)  # at all points, at each time
    for a, b in zip(some.at_times, whole.at_times, strict=True):
        assert a.within == b.within
        assert a.between.value == pytest.approx(b.between.value, abs=0.15) and a.between != b.between


def test_class_distances_of_separate_and_of_mixed_classes() -> None:
    labels = torch.arange(60) % 3
    mixed = class_distances("all", _blobs(0.0, labels), labels, 50, 0)
    assert mixed.ratio.low is not None and mixed.ratio.high is not None
    assert mixed.ratio.low < 1 < mixed.ratio.high
    line = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    known = class_distances("line", line, torch.tensor([0, 0, 1, 1]), 0, 0)
    assert known.within.value == pytest.approx(1) and known.between.value == pytest.approx(10)
    with pytest.raises(ValueError, match="two classes"):
        class_distances("one", line, torch.zeros(4, dtype=torch.int64), 0, 0)


class _Field(DiT):
    """A transformer that returns a given field."""

    def __init__(self, field: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(grid=(1, 1), in_channels=2, num_classes=2, width=8, depth=1, heads=1)
        self.field = field

    def forward(self, x_BTC: Tensor, t_B: Tensor, y_B: Tensor) -> Tensor:  # type: ignore[override]
        return self.field(x_BTC, t_B)


def test_straight_paths_are_straight_and_a_circle_is_not() -> None:
    straight = straightness(_Field(lambda x, t: torch.ones_like(x)), "w", 0, 0)
    assert straight.largest_deviation.value < 1e-5 and straight.curvature.value < 1e-9
    assert straight.one_step.value < 1e-5
    # Half a circle in unit time, v = π · J x: it is furthest from its place on the diameter half way, by r of 2r.
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    circle = straightness(_Field(lambda x, t: torch.pi * x @ turn), "w", 0, 0)
    assert circle.largest_deviation.value == pytest.approx(0.5, rel=0.03)
    assert circle.curvature.value == pytest.approx(torch.pi**2 / 4 - 1, rel=0.15)
    untrained = straightness(_Field(lambda x, t: torch.zeros_like(x)), "w", 0, 0)
    assert untrained.largest_deviation.value == 0


def test_the_deviation_has_an_interval_over_the_samples() -> None:
    """Larger rings turn faster, so that samples differ."""
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    found = straightness(_Field(lambda x, t: x.norm(dim=2, keepdim=True) * (x @ turn)), "w", 100, 0)
    start, *between, end = found.deviation
    assert start.value == 0 and end.value == pytest.approx(0, abs=1e-5)
    for at in between:
        assert at.low is not None and at.high is not None and at.low < at.value < at.high and at.num_images == 64


def test_analyze_real_caches_side_by_side(finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path) -> None:
    cache, small = finished.root / "cache", tmp_path / "int8"
    assert svgpipe("requantize", cache, "--out", small).code == 0
    page = tmp_path / "analysis.html"
    model = finished.root / "diffusion"
    done = svgpipe("analyze", cache, small, "--diffusion", model, "--html", page, "--json")
    assert done.code == 0, done.err
    one, two = json.loads(done.out)["caches"]
    assert one["num_images"] == 36 and [d["group"] for d in one["distances"]] == ["backbone", "residual", "both"]
    assert one["distances"][0]["ratio"]["low"] > 1  # three photographs lie apart
    assert one["mean_parted"]["low"] > 1 and len(one["map"]) == 36
    assert one["straightness"]["weights"].startswith("ema-0.9") and len(one["straightness"]["times"]) == 51
    assert two["straightness"] is None and "curvature" in two["not_measured"][0]
    parted, parted_int8 = (found["mean_parted"]["value"] for found in (one, two))
    assert parted_int8 == pytest.approx(parted, rel=0.05)  # int8 changes next to nothing
    html = page.read_text()
    assert "<script" not in html and "curvature" in html
    assert len(re.findall(r"<use [^>]*fill-opacity: 0\.75", html)) == 2 * 36  # every image on either map
    assert (tmp_path / "analysis-t-sne-of-cache-2.pdf").exists()
    for chart, number in (("Agreement of velocity fields", 2), ("Distance from the straight path", 1)):
        assert html.count(f'aria-label="{chart}') == number
    shown = svgpipe("analyze", cache, "--classes", "2", "--per-class", "4")
    assert shown.code == 0 and "8 of 2 classes" in shown.out and "not measured" in shown.out


def test_a_model_of_another_cache_is_refused(
    finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "int8"
    assert svgpipe("requantize", finished.root / "cache", "--out", small).code == 0
    done = svgpipe("analyze", small, "--diffusion", finished.root / "diffusion")
    assert done.code == 1 and "not one of the given caches" in done.err
    monkeypatch.setattr(analyze_stage, "MAX_IMAGES", 20)
    many = svgpipe("analyze", small, "--classes", 1000, "--per-class", 50)
    assert many.code == 2 and "at most 20 images per cache, found 36" in many.err
    useless = svgpipe("analyze", small, "--ema", "raw")
    assert useless.code == 2 and "no --diffusion" in useless.err


def test_class_distances_of_equal_images_and_of_duplicates() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="are all equal"):
        class_distances("residual", torch.eye(2)[labels], labels, 20, 0)
    rows = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 1.0], [5.0, 2.0], [9.0, 0.0], [9.0, 3.0]])
    found = class_distances("residual", rows, torch.tensor([0, 0, 1, 1, 2, 2]), 100, 0)  # many replicates have only 0s
    assert found.ratio.low is not None and found.ratio.low <= found.ratio.value


def test_velocity_agreement_covers_every_pair_of_classes() -> None:
    latents = torch.randn(24, 6, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(24) % 3
    groups = _groups(labels, 0)
    for found in velocity_agreement(latents, labels, 20, 0).at_times[::5]:
        cosines = []
        for c, (points, one, _) in groups.items():
            z = _points(latents, points, found.time, 0)
            own = empirical_velocity(z, found.time, latents[one])
            for other, (_, half, _) in groups.items():
                if other != c:
                    theirs = empirical_velocity(z, found.time, latents[half])
                    cosines.append(torch.nn.functional.cosine_similarity(own, theirs, dim=1))
        assert found.between.value == pytest.approx(float(torch.cat(cosines).mean()), abs=1e-5)


def test_velocities_of_two_classes_have_known_cosines_and_places() -> None:
    """Two tight classes on the axes of a space in which noise is short against them."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(20, 50, generator=generator) * 0.1 for _ in range(2))
    first[:, 0] += 1000
    second[:, 1] += 1000
    second[:, 2] += torch.linspace(-30, 30, 20)  # the largest variation beside the line between the means
    found = class_velocities((first, second), ("cat", "dog"), 50, 0)
    for plane in found.classes:
        assert plane.own.value == pytest.approx(1, abs=1e-3) and plane.other.value == pytest.approx(0, abs=0.02)
        assert plane.own.num_images == len(plane.images) == 20
        assert plane.mean == pytest.approx(np.mean(plane.images, axis=0), abs=1e-3)
    cat, dog = found.classes
    assert (cat.name, dog.name) == ("cat", "dog")
    assert dog.mean[0] - cat.mean[0] == pytest.approx(1000 * 2**0.5, rel=1e-4)
    assert dog.mean[1] == pytest.approx(cat.mean[1], abs=1)
    heights = np.ptp([y for _, y in dog.images]), np.ptp([y for _, y in cat.images])
    assert heights[0] == pytest.approx(60, rel=0.01) and heights[1] < 1
    assert abs(found.source[0]) < 10  # the noise lies half-way between the classes
    mixed = class_velocities((first[::2], first[1::2]), ("a", "b"), 50, 0)
    assert mixed.classes[0].own.value == pytest.approx(mixed.classes[0].other.value, abs=1e-4)
    # An image is left out of the mean of its class: otherwise few images of the same kind would seem to agree.
    few, fewer = (torch.randn(n, 4000, generator=generator) for n in (5, 4))
    for plane in class_velocities((few, fewer), ("a", "b"), 50, 0).classes:
        assert plane.own.value == pytest.approx(plane.other.value, abs=0.04)
    with pytest.raises(ValueError, match="at least 3 images of cat, found 2"):
        class_velocities((first[:2], second), ("cat", "dog"), 50, 0)
    with pytest.raises(ValueError, match="the same mean"):
        class_velocities((first, first), ("cat", "dog"), 50, 0)
    with pytest.raises(ValueError, match="are all equal"):
        class_velocities((torch.zeros(3, 4), torch.ones(3, 4)), ("cat", "dog"), 50, 0)


def test_velocities_of_two_classes_of_a_cache(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    cache, page = finished.root / "cache", tmp_path / "page.html"
    names = finished.cache.classes
    asked = ["analyze", cache, "--velocities", names[0], "2"]
    done = svgpipe(*asked, "--json", "--html", page)
    assert done.code == 0, done.err
    (one,) = json.loads(done.out)["caches"]
    planes = one["velocities"]["classes"]
    assert [plane["name"] for plane in planes] == [names[0], names[2]]
    rows = np.flatnonzero(finished.cache.labels == 2)
    assert len(planes[1]["images"]) == len(rows[finished.cache.valid[rows]])
    assert all(-1 <= plane["own"]["value"] <= 1 for plane in planes)
    text = page.read_text()
    assert "Velocities of two classes" in text and (tmp_path / "page-velocities-of-two-classes-cache-1.pdf").exists()
    assert "cosine of velocities, own class" in text
    for pair, said in (
        ((names[0], "0"), f"found {names[0]} twice"),
        ((names[0], "nothing"), "expected a class name of"),
    ):
        wrong = svgpipe("analyze", cache, "--velocities", *pair)
        assert wrong.code == 2 and said in wrong.err
