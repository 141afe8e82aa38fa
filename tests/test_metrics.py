"""Metrics against closed forms and torch-fidelity, and their intervals against known spreads."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.nearest_images import QUANTILES, NearestImages
from svgpipe.manifests.selection import evenly_spread
from svgpipe.models import feature_distances, neighbours
from svgpipe.models.feature_distances import FrechetTarget, frechet_distance, nearest_class_accuracy
from svgpipe.models.neighbours import Neighbours, ball_radii, compare_neighbours
from svgpipe.stages.evaluate import metrics, neighbour_metrics
from svgpipe.stages.evaluate.intervals import estimate, mean_estimate, picks
from svgpipe.stages.evaluate.metrics import Comparison, Features, inception_score, inception_scores, kernel_distances


def test_frechet_distance_against_the_closed_form() -> None:
    """Gaussians with diagonal covariance: |m1-m2|² + Σ (s1-s2)². Whitened samples have exactly this covariance."""
    a = torch.randn(500, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = (a - a.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(a.T))).T
    scale, shift = torch.tensor([1.0, 2.0, 0.5, 1.0]), torch.tensor([0.0, 0.0, 0.0, 3.0])
    expected = float((scale - 1).square().sum() + shift.square().sum())
    assert frechet_distance(a, a * scale + shift) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("rows", "block"), [(20, 4096), (400, 4096), (400, 7)])
def test_frechet_distance_equals_torch_fidelity(rows: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with fewer rows than dimensions, where covariances are singular, and in blocks."""
    monkeypatch.setattr(feature_distances, "BLOCK", block)
    torch.manual_seed(1)
    a, b = torch.randn(rows, 64) @ torch.randn(64, 64), torch.randn(rows + 5, 64) @ torch.randn(64, 64) + 1
    expected = fid_statistics_to_metric(*map(fid_features_to_statistics, (a.double(), b.double())), verbose=False)
    assert frechet_distance(a, b) == pytest.approx(expected[KEY_METRIC_FID], rel=1e-3)


def test_kernel_distance_and_class_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 300, 8, generator=generator)
    assert abs(float(kernel_distances(a, b).mean())) < 0.05
    assert float(kernel_distances(a, b + 1).mean()) > 0.5
    expected = kid_features_to_metric(
        a.double(), b.double(), kid_subsets=1, kid_subset_size=300, rng_seed=0, verbose=False
    )
    assert kernel_distances(a, b)[0] == pytest.approx(expected[KEY_METRIC_KID_MEAN], rel=1e-9)
    many, more = torch.randn(2, 1100, 8, generator=generator)
    drawn = kid_features_to_metric(
        many.double(), more.double(), kid_subsets=1, kid_subset_size=1000, rng_seed=7, verbose=False
    )
    assert kernel_distances(many, more)[7] == pytest.approx(drawn[KEY_METRIC_KID_MEAN], rel=1e-9)
    labels = torch.arange(300) % 3
    centres = torch.eye(8)[labels] * 20
    assert nearest_class_accuracy(a + centres, labels, b + centres, labels) == 1.0
    assert nearest_class_accuracy(a + centres, labels, b + centres, (labels + 1) % 3) == 0.0
    assert nearest_class_accuracy(a, torch.zeros(300), b, labels) is None


def gaussians(*sizes: int, dimensions: int = 6, seed: int = 0) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    return [torch.randn(size, dimensions, generator=source) for size in sizes]


def estimate_of(found: Mapping[str, Estimate | NearestImages | None], name: str) -> Estimate:
    value = found[name]
    assert isinstance(value, Estimate)
    return value


def compared(rows: torch.Tensor, reference: torch.Tensor) -> Neighbours:
    return compare_neighbours(rows, reference, ball_radii(rows, [3])[0], ball_radii(reference, [3, 5]))


@pytest.mark.parametrize(("count", "dimensions"), [(40, 6), (12, 30)])
def test_distances_of_resampled_rows_are_those_of_the_rows(count: int, dimensions: int) -> None:
    """With either Gram matrix."""
    rows, reference = gaussians(count, 50, dimensions=dimensions)
    chosen = picks(count, 4, seed=1)
    found = FrechetTarget.of(reference).distances(rows, chosen)
    assert found == pytest.approx([frechet_distance(rows[pick], reference) for pick in chosen])


def test_precision_and_recall_equal_torch_fidelity() -> None:
    samples, reference = gaussians(60, 90)
    expected = prc_features_to_metric(
        samples * 0.5, reference, prc_neighborhood=3, prc_batch_size=1000, save_cpu_ram=False, verbose=False
    )
    narrow = samples * 0.5
    found = compared(narrow, reference)
    precision, recall = found.precise, found.recalled
    assert float(precision.double().mean()) == pytest.approx(expected[KEY_METRIC_PRECISION], abs=1e-6)
    assert float(recall.double().mean()) == pytest.approx(expected[KEY_METRIC_RECALL], abs=1e-6)
    assert precision.double().mean() > recall.double().mean()  # narrow samples lie within, and leave much out
    assert ball_radii(reference[:3], [1, 3])[1].tolist() == [-1, -1, -1]  # no third neighbour, no ball
    both = Comparison(Features(reference), 0, 0).measure(Features(narrow))
    for name, inside in (("precision", precision), ("recall", recall)):
        assert estimate_of(both, name).value == pytest.approx(float(inside.double().mean()))


def test_large_tables_of_distances_are_made_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, reference = gaussians(60, 90)
    whole = compared(samples, reference)
    ordered = torch.cdist(samples, samples).sort(1).values
    by_hand = torch.stack([ordered[:, 3], ordered[:, 5]])
    torch.testing.assert_close(ball_radii(samples, [3, 5]), by_hand)
    monkeypatch.setattr(neighbours, "BLOCK", 7)
    torch.testing.assert_close(ball_radii(samples, [3, 5]), by_hand)
    parts = compared(samples, reference)
    for field in dataclasses.fields(Neighbours):
        torch.testing.assert_close(getattr(parts, field.name), getattr(whole, field.name))


def test_density_and_coverage_are_those_of_their_definition() -> None:
    """arXiv 2002.09797, eq. 3 and 4, with the five neighbours of its authors."""
    samples, reference = gaussians(60, 90)
    samples = samples * 0.5
    apart = torch.cdist(samples, reference)
    radii = torch.cdist(reference, reference).sort(1).values[:, 5]
    found = Comparison(Features(reference), 50, 0).measure(Features(samples))
    density, coverage = estimate_of(found, "density"), estimate_of(found, "coverage")
    assert density.value == pytest.approx(float((apart <= radii).sum()) / (5 * 60))
    assert coverage.value == pytest.approx(float((apart.amin(0) <= radii).double().mean()))
    assert density.value > 1 > coverage.value  # narrow samples are where the reference is dense, and leave much out
    assert density.low is not None and density.high is not None and density.low < density.value < density.high
    assert (density.num_images, coverage.num_images) == (60, 90)


def test_copies_of_reference_images_are_found_and_named() -> None:
    """Of new images 1 % are closer than the threshold; of copies all are, with the images that they copy."""
    reference, heldout, new = gaussians(300, 300, 300)
    copies = reference[40:50] + 1e-4
    names = [f"a.tar: {number}" for number in range(300)]
    comparison = Comparison(Features(reference, names=names), 10, 0, new=heldout)
    found = comparison.measure(Features(torch.cat([new, copies])))["nearest"]
    assert isinstance(found, NearestImages) and found.near_copies is not None and found.threshold is not None
    assert found.threshold == pytest.approx(float(torch.cdist(heldout, reference).amin(1).quantile(0.01)), rel=1e-4)
    assert 10 / 310 <= found.near_copies.value < 20 / 310
    copied = {pair.image: pair.name for pair in found.closest[:10]}
    assert copied == dict(zip(range(300, 310), names[40:50], strict=True))
    assert len(found.closest) == max(10, round(found.near_copies.value * 310))
    assert found.closest[0].distance == pytest.approx(1e-4 * 6**0.5, rel=1e-2)  # not lost in rounding
    distances = torch.cdist(torch.cat([new, copies]), reference).amin(1)
    expected = distances.quantile(torch.tensor(QUANTILES))
    torch.testing.assert_close(torch.tensor(found.distances), expected, atol=1e-3, rtol=1e-3)
    few = Comparison(Features(reference), 10, 0, new=heldout[:99]).measure(Features(new))["nearest"]
    assert isinstance(few, NearestImages) and few.near_copies is None and len(few.closest) == 10


def test_neighbours_use_balls_of_a_subset_of_very_many_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The balls need all pairs of images; the results say how many images they are over. Nearest images are of all."""
    samples, reference = gaussians(60, 90)
    whole = compared(samples, reference)
    monkeypatch.setattr(neighbour_metrics, "MAX_BALLS", 30)
    found = Comparison(Features(reference), 0, 0).measure(Features(samples))
    some, less = reference[evenly_spread(90, 30)], samples[evenly_spread(60, 30)]
    of_reference, of_samples = compared(samples, some), compared(less, some)
    expected = {
        "precision": of_reference.precise,
        "recall": of_samples.recalled,
        "density": of_reference.balls / 5,
        "coverage": of_reference.covered,
    }
    for name, values in expected.items():
        measured = estimate_of(found, name)
        assert measured.num_images == len(values)
        assert measured.value == pytest.approx(float(values.double().mean())), name
    nearest = found["nearest"]
    assert isinstance(nearest, NearestImages)
    assert nearest.distances[0] == pytest.approx(float(whole.distances.min()))


def test_inception_score_equals_torch_fidelity() -> None:
    (logits,) = gaussians(200, dimensions=10)
    chosen = picks(200, 5, seed=3)
    assert inception_scores(3 * logits, chosen) == pytest.approx([inception_score(3 * logits[p]) for p in chosen])
    few = logits[:30]
    alone = picks(30, 2, seed=3)
    assert inception_scores(few, alone) == pytest.approx([inception_score(few[pick]) for pick in alone])
    odd = torch.cat([logits, logits[:7]])  # 207 do not divide by ten
    assert inception_scores(odd, [torch.arange(207)]) == pytest.approx([inception_score(odd)])
    assert inception_score(3 * logits) == pytest.approx(isc_features_to_metric(3 * logits)[KEY_METRIC_ISC_MEAN])
    assert inception_score(torch.zeros(5, 10)) == pytest.approx(1)
    assert inception_score(100 * torch.eye(10).repeat(100, 1)) > 9
    assert inception_score(100 * torch.eye(10)) > 9  # few images are not split into single ones, which would score 1


def test_the_interval_of_a_mean_is_two_standard_errors() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(3))
    found = mean_estimate(values, replicates=2000, seed=0)
    assert found.value == pytest.approx(float(values.mean()), abs=1e-6)
    assert found.low is not None
    assert found.high is not None
    error = float(values.std()) / 20
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.1)
    assert found.low < found.value < found.high
    assert mean_estimate(values, replicates=0, seed=0).low is None


def test_the_interval_of_a_distance_covers_new_draws() -> None:
    """The distances of other sets of the same size and origin nearly always fall into the interval of the first one."""
    reference, *sets = gaussians(3000, *[200] * 30)
    comparison = Comparison(Features(reference), replicates=200, seed=0)
    shifted = [rows + 0.5 for rows in sets]
    found = estimate_of(comparison.measure(Features(shifted[0])), "frechet_distance")
    assert found.low is not None
    assert found.high is not None
    others = np.array([frechet_distance(rows, reference) for rows in shifted[1:]])
    width = found.high - found.low
    assert 0.5 < width / (4 * others.std()) < 2
    itself = estimate_of(comparison.measure(Features(reference)), "frechet_distance")
    assert itself.low == pytest.approx(0, abs=1e-9) and itself.high is not None
    assert estimate(2.0, [], 5).model_dump() == {"value": 2.0, "low": None, "high": None, "num_images": 5}


def test_metrics_that_cannot_be_computed_are_none() -> None:
    reference, few = gaussians(20, 3)
    found = Comparison(Features(reference), replicates=2, seed=0).measure(Features(few))
    assert found["inception_score"] is None
    assert found["recall"] is None  # three rows have no third neighbour
    assert found["precision"] is not None
    assert found["class_accuracy"] is None


def test_kernel_distance_interval_matches_the_spread_of_new_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if one subset holds all images, or a few images represent all."""
    reference, *samples = gaussians(80, *[80] * 200)
    monkeypatch.setattr(metrics, "KERNEL_SUBSETS", 1)
    for rows in (10_000, 50):
        monkeypatch.setattr(metrics, "KERNEL_ROWS", rows)
        found = [Comparison(Features(reference), 100, 0).kernel(sample * 1.3 + 0.3) for sample in samples]
        spread = np.std([f.value for f in found if f is not None])
        widths = [f.high - f.low for f in found if f is not None and f.high is not None and f.low is not None]
        assert len(widths) == 200 and np.mean(widths) / (2 * 1.96 * spread) == pytest.approx(1, abs=0.2)
    without = Comparison(Features(reference), 0, 0).kernel(samples[0])
    assert without is not None and without.low is None


def test_influence_of_an_image_on_the_kernel_distance_is_its_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving out row i changes the unbiased distance of n rows by about -(influence - mean) / (n - 1)."""
    monkeypatch.setattr(feature_distances, "BLOCK", 7)
    rows, reference = (x.double() for x in gaussians(20, 30))
    found = feature_distances.kernel_influences(rows, torch.arange(20), reference)

    def distance(x: torch.Tensor) -> float:
        inner, outer = (x @ x.T / 6 + 1) ** 3, (x @ reference.T / 6 + 1) ** 3
        return float((inner.sum() - inner.trace()) / (len(x) * (len(x) - 1)) - 2 * outer.mean())

    whole = distance(rows)
    moved = [distance(torch.cat([rows[:i], rows[i + 1 :]])) - whole for i in range(20)]
    first_order = -(found - found.mean()) / 19
    assert np.corrcoef(moved, first_order)[0, 1] > 0.99
    assert np.linalg.norm(moved) == pytest.approx(float(first_order.norm()), rel=0.2)


def test_first_order_interval_of_a_frechet_distance_is_that_of_resampled_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, samples = gaussians(4000, 3 * 48, dimensions=48)
    comparison = Comparison(Features(reference * torch.linspace(0.1, 2, 48)), 200, 0)
    first_order = comparison.frechet(samples**3 / 3)
    monkeypatch.setattr(metrics, "FIRST_ORDER", 10**6)
    resampled = comparison.frechet(samples**3 / 3)
    assert first_order.value == pytest.approx(resampled.value)
    for one, other in ((first_order.low, resampled.low), (first_order.high, resampled.high)):
        assert one is not None and other is not None
        assert one - first_order.value == pytest.approx(other - resampled.value, rel=0.25)


def test_influences_leave_out_dimensions_that_do_not_vary() -> None:
    reference, samples = gaussians(50, 40)
    flat = torch.cat([samples, torch.zeros(40, 1)], dim=1)
    target = FrechetTarget.of(torch.cat([reference, torch.zeros(50, 1)], dim=1))
    expected = FrechetTarget.of(reference).distance_and_influences(samples)
    found = target.distance_and_influences(flat)
    assert found[0] == pytest.approx(expected[0])
    torch.testing.assert_close(found[1], expected[1])


def test_the_interval_of_a_mean_lies_within_its_values() -> None:
    values = torch.tensor([1.0] * 5 + [0.0])
    found, opposite = mean_estimate(values, 100, 0), mean_estimate(1 - values, 100, 0)
    assert found.high == 1 and found.low is not None and 0.3 < found.low < 5 / 6
    assert opposite.low == 0 and opposite.high is not None and 1 / 6 < opposite.high < 0.7


def test_wilson_interval_of_all_hits() -> None:
    """Six hits of six say little about the seventh sample."""
    reference = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 2
    among = Features(reference[:6] + 1e-3, labels=labels[:6])
    apart = Features(reference + 10 * labels[:, None], labels=labels)
    found = Comparison(apart, 20, 0).measure(replace(among, pooled=apart.pooled[:6] + 1e-3))
    for name in ("precision", "class_accuracy"):
        share = estimate_of(found, name)
        assert share.value == 1 and share.high == pytest.approx(1)
        assert share.low is not None and 0.5 < share.low < 0.7
    assert estimate_of(Comparison(apart, 0, 0).measure(among), "precision").low is None
