"""`svgpipe probe`: its results against scikit-learn, and the command on a real cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from svgpipe.models import probes
from svgpipe.models.probes import KNN_TEMPERATURE, fit_linear, knn_votes
from svgpipe.stages.evaluate.intervals import share_estimate

from .conftest import Finished, Outcome, extract_args, write_crops


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's handwritten digits, standardised: training images and labels, test images and labels."""
    data = load_digits()
    x, y = torch.from_numpy(data.data).float(), torch.from_numpy(data.target).long()
    train, test = slice(0, 1200), slice(1200, None)
    mean, std = x[train].mean(0), x[train].std(0).clamp_min(1e-12)
    x = (x - mean) / std
    return x[train], y[train], x[test], y[test]


def test_the_linear_probe_equals_scikit_learns_softmax_regression(digits: tuple[Tensor, ...]) -> None:
    x, y, x_test, _ = digits
    decay = 1e-3
    ours = fit_linear(x, y, 10, decay)
    # Its objective is the sum over rows plus |W|²/(2C): ours times n.
    theirs = LogisticRegression(C=1 / (decay * len(x)), max_iter=2000, tol=1e-8).fit(x.numpy(), y.numpy())
    expected = theirs.predict_proba(x_test.numpy())
    found = ours(x_test).softmax(1).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-2)  # float32, and where each of them stops
    assert (found.argmax(1) == expected.argmax(1)).mean() > 0.995


def test_the_linear_probe_does_not_depend_on_the_blocks(
    digits: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, x_test, _ = digits
    whole = fit_linear(x, y, 10, 1e-2)(x_test).softmax(1)
    monkeypatch.setattr("svgpipe.models.probes.BLOCK", 17)
    torch.testing.assert_close(fit_linear(x, y, 10, 1e-2)(x_test).softmax(1), whole, atol=1e-2, rtol=0)


def test_nearest_neighbours_equal_scikit_learn(digits: tuple[Tensor, ...]) -> None:
    x, y, x_test, _ = digits

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / KNN_TEMPERATURE)

    theirs = KNeighborsClassifier(20, weights=weights, metric="cosine").fit(x.numpy(), y.numpy())
    found = knn_votes(x, y, x_test, 10, 20)
    expected = theirs.predict_proba(x_test.numpy())
    np.testing.assert_allclose((found / found.sum(1, keepdim=True)).numpy(), expected, atol=1e-3)


def test_nearest_neighbours_do_not_depend_on_the_block_size(
    digits: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y, x_test, _ = digits
    whole = knn_votes(x, y, x_test, 10, 20)
    monkeypatch.setattr(probes, "CELLS", 7 * len(x))
    torch.testing.assert_close(knn_votes(x, y, x_test, 10, 20), whole, rtol=1e-4, atol=1e-3)  # as products round


def test_more_neighbours_than_rows_uses_all_rows() -> None:
    votes = knn_votes(torch.eye(2), torch.tensor([0, 1]), torch.tensor([[1.0, 0.1]]), 2, 20)
    assert votes.argmax(1).tolist() == [0]


def test_a_fraction_of_one_has_an_interval() -> None:
    found = share_estimate(torch.ones(256, dtype=torch.bool), interval=True)
    assert found.value == 1 and found.low is not None and 0.98 < found.low < 0.99  # 1 - 1.96²/(n + 1.96²)


def test_probe_of_a_real_cache(finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path) -> None:
    page = tmp_path / "made on demand" / "probe.html"
    refused = svgpipe("probe", finished.root / "cache", "--html", tmp_path)
    assert refused.code == 2 and "found a directory" in refused.err and not refused.out
    refused = svgpipe("probe", finished.root / "cache", "--html", finished.recipe_file / "probe.html")
    assert refused.code == 2 and "is not a folder" in refused.err
    done = svgpipe("probe", finished.root / "cache", "--html", page, "--json")
    assert done.code == 0
    found = json.loads(done.out)
    cache = finished.cache
    assert [g["group"] for g in found["groups"]] == ["backbone", "residual", "both"]
    assert [g["channels"] for g in found["groups"]] == [112, 4, 116]
    assert found["test_images"] == int((cache.valid & cache.heldout).sum())
    assert found["training_images"] == int((cache.valid & ~cache.heldout).sum())
    # Crops of three photographs: ImageNet features tell them apart, and nothing else would do so well.
    assert found["groups"][0]["linear"]["value"] > 0.8 > found["most_frequent"]["high"]
    html = page.read_text()
    assert "<script" not in html and "residual" in html and "81.7" in html
    shown = svgpipe("probe", finished.root / "cache")
    assert shown.code == 0 and "linear probe" in shown.out and "paper: raw DINOv3" in shown.out
    assert [row["top1"] for row in found["paper"]] == [81.7, 81.8]


def test_the_cache_alone_is_probed(finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path) -> None:
    """Neither shards nor autoencoder are read: there is nothing at their recorded paths."""
    whole = svgpipe("probe", finished.root / "cache", "--json")
    alone = tmp_path / "alone"
    shutil.copytree(finished.root / "cache", alone)
    moved = finished.root.rename(finished.root.with_name("elsewhere"))
    try:
        done = svgpipe("probe", alone, "--json")
    finally:
        moved.rename(finished.root)
    assert done.code == 0 and json.loads(done.out)["groups"] == json.loads(whole.out)["groups"]


def test_probe_with_a_validation_cache(finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path) -> None:
    others = tmp_path / "shards"
    write_crops(tmp_path / "more", per_class=5)
    assert svgpipe("shard", tmp_path / "more", "--out", others, "--recipe", finished.recipe_file).code == 0
    arguments = [str(a) for a in extract_args(finished, tmp_path / "validation")]
    arguments[arguments.index("--shards") + 1] = str(others)
    assert svgpipe(*arguments).code == 0
    done = svgpipe("probe", finished.root / "cache", "--validation", tmp_path / "validation", "--json")
    assert done.code == 0
    found = json.loads(done.out)
    assert found["test_images"] == 15 and found["tested_on"] == str(tmp_path / "validation")
    assert found["groups"][0]["linear"]["value"] > 0.8


def test_caches_that_cannot_be_probed_are_refused(
    finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    cache = finished.root / "cache"
    same = svgpipe("probe", cache, "--validation", cache)
    assert same.code == 2 and "holds images of" in same.err
    tars = finished.shards.tars("train")
    parts = []
    for name, chosen in (("first", tars[:2]), ("second", tars[1:3])):
        arguments = [str(a) for a in extract_args(finished, tmp_path / name)]
        numbers = ",".join(tar.stem.removeprefix("shard-") for tar in chosen)
        pattern = f"{finished.root}/shards/shard-{{{numbers}}}.tar"
        arguments[arguments.index("--shards") + 1] = pattern
        assert svgpipe(*arguments).code == 0
        parts.append(tmp_path / name)
    for training, validation in ((cache, parts[0]), (parts[0], parts[1])):  # another fingerprint, the same images
        overlap = svgpipe("probe", training, "--validation", validation)
        assert overlap.code == 2 and "holds images of" in overlap.err
    missing = svgpipe("probe", tmp_path / "nothing")
    assert missing.code == 1 and "expected a feature cache" in missing.err
