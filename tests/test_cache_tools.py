"""Commands for a cache: requantize and its loss, diff, plan, and the cache page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.stages.artifacts.cache_statistics import CacheStatistics, effective_rank
from svgpipe.stages.artifacts.contact_sheet import HISTOGRAM_RANGE, contact_sheet
from svgpipe.stages.artifacts.requantize_cost import measure_cost

from .conftest import Finished, Outcome, extract_args, tree_bytes


@pytest.fixture(scope="module")
def small(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished cache, requantized to int8 with everything measured."""
    from svgpipe.pipeline.cli import main

    out = tmp_path_factory.mktemp("small") / "cache"
    arguments = ["requantize", finished.root / "cache", "--out", out, "--diffusion", finished.root / "diffusion"]
    assert main([str(a) for a in arguments]) == 0
    return out


def test_requantize_reports_the_quantization_error(finished: Finished, small: Path) -> None:
    cache, other = finished.cache, FeatureCache(small)
    cost = json.loads((small / "cost.json").read_text())
    assert cost["bytes_ratio"] == other.manifest.num_bytes / cache.manifest.num_bytes < 0.5
    assert cost["not_measured"] == []
    assert cost["snr"]["backbone"] > 35 and cost["snr"]["residual"] > 35
    assert abs(cost["psnr_change"]) < 0.05
    assert abs(cost["loss_change"]) < 0.01
    assert other.manifest.store_dtype == "int8"
    rows = list(range(len(cache)))
    scale = other.store.feature_scale
    assert scale is not None
    found, expected = other.read(rows), cache.read(rows).astype(np.float32)
    inside = np.abs(expected) <= 127 * scale
    assert np.abs(found - expected)[inside].max() <= np.broadcast_to(scale, expected.shape)[inside].max() / 2 * 1.001
    for name in ("label", "valid", "heldout", "channel_mean", "channel_std"):
        np.testing.assert_array_equal(other.store.array(name), cache.store.array(name))


def test_a_cache_smaller_than_a_batch_trains(
    finished: Finished, small: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    assert svgpipe("verify", small, "--deep").code == 0
    recipe = ["--recipe", finished.recipe_file]
    trained = svgpipe("train-diffusion", "--cache", small, "--out", tmp_path / "model", *recipe)
    assert trained.code == 0, trained.err
    copy = tmp_path / "copy"
    shutil.copytree(small, copy)
    before = tree_bytes(copy, "features/**/*", "journal/*", "*/c/*")
    file = FeatureStore.open(copy).unit_file(1)
    file.write_bytes(file.read_bytes()[:-7])
    assert svgpipe("repair", copy).code == 0
    assert tree_bytes(copy, "features/**/*", "journal/*", "*/c/*") == before
    back = svgpipe("requantize", small, "--out", tmp_path / "back", "--store-dtype", "float16")
    assert back.code == 0, back.err
    np.testing.assert_allclose(
        FeatureCache(tmp_path / "back").read([3]), FeatureCache(small).read([3]), rtol=2e-3, atol=1e-4
    )
    itself = svgpipe("requantize", small, "--out", small, "--store-dtype", "float16")
    assert itself.code == 2
    assert "is the cache itself" in itself.err
    same = svgpipe("requantize", small, "--out", tmp_path / "none", "--store-dtype", "int8")
    assert same.code == 2
    assert "is already stored as int8" in same.err
    wrong = svgpipe("requantize", small, "--out", tmp_path / "none", "--store-dtype", "float8")
    assert wrong.code == 2
    assert "not one of" in wrong.err


def test_a_quantization_without_error_can_be_written(small: Path) -> None:
    cache = FeatureCache(small)
    cost = measure_cost(cache, cache, autoencoder=None, diffusion=None)
    assert cost.snr == {"backbone": None, "residual": None}
    assert json.loads(json.dumps(cost.model_dump(mode="json"), allow_nan=False))["bytes_ratio"] == 1


def test_int8_straight_from_extract(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    out = tmp_path / "cache"
    found = svgpipe(*extract_args(finished, out, "--store-dtype", "int8"))
    assert found.code == 0, found.err
    cache = FeatureCache(out)
    assert cache.manifest.num_bytes < 0.5 * finished.cache.manifest.num_bytes
    assert svgpipe("verify", out, "--deep").code == 0
    difference = cache.read(range(36)) - finished.cache.read(range(36)).astype(np.float32)
    assert np.abs(difference).mean() < 0.02
    refused = svgpipe(*extract_args(finished, out))
    assert refused.code == 1
    assert 'config.store_dtype: "int8" there, "float16" here' in refused.err
    table = found.out
    for word in ("encoder", "reader", "writer", "decode", "wait", "images/s once under way", "too short to say"):
        assert word in table
    timings = cache.manifest.timings
    assert {worker["role"] for worker in timings["workers"]} == {"encoder", "reader", "writer"}
    assert timings["images"] == 36
    assert timings["advice"] in table


def test_diff_of_a_cache_with_itself_and_with_a_rounded_one(
    finished: Finished, small: Path, svgpipe: Callable[..., Outcome]
) -> None:
    cache = finished.root / "cache"
    same = json.loads(svgpipe("diff", cache, cache, "--json").out)
    assert [g["largest_difference"] for g in same["groups"]] == [0, 0]
    assert same["fields"] == []
    assert sum(same["groups"][0]["cosine_counts"]) == 36 * 2 * 16
    other = json.loads(svgpipe("diff", cache, small, "--json", "--rows", 0).out)
    for group in other["groups"]:
        assert 0.999 < group["mean_cosine"] < 1
        assert 0 < group["largest_difference"] < 3  # a clipped tail may lose that much, and few are
        assert sum(group["difference_counts"]) == 36 * 2
    text = svgpipe("diff", cache, small).out
    assert "cosine of vectors" in text
    assert "config.store_dtype" in text


def test_diff_refuses_caches_of_other_images(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    part = tmp_path / "part"
    arguments = extract_args(finished, part)
    arguments[2] = f"{finished.root}/shards/shard-000001.tar"
    assert svgpipe(*arguments).code == 0
    found = svgpipe("diff", finished.root / "cache", part)
    assert found.code == 1
    assert "Give two caches of the same images" in found.err


def test_plan_counts_the_real_shards(finished: Finished, svgpipe: Callable[..., Outcome]) -> None:
    arguments = ["plan", "--shards", finished.root / "shards", "--autoencoder", finished.root / "autoencoder"]
    arguments += ["--recipe", finished.recipe_file, "--deadline", 0.001]
    found = json.loads(svgpipe(*arguments, "--json").out)
    assert found["num_images"] == 36
    actual = finished.cache.manifest.num_bytes / 36 / 2
    assert found["bytes_per_row"]["float16"] == pytest.approx(actual, rel=0.01)
    assert found["gigabytes_per_view"]["int8"] < 0.5 * found["gigabytes_per_view"]["float16"]
    assert found["hours"] == pytest.approx(36 * found["encode_s"] / 3600)
    assert found["workers_for_deadline"] >= 1
    assert "GB per view" in svgpipe(*arguments).out


def test_the_page_holds_everything_in_itself(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    page = tmp_path / "cache.html"
    assert svgpipe("inspect", finished.root / "cache", "--html", page).code == 0
    text = page.read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', text)
    for word in ("astronaut", "cat", "coffee", "source of row", "backbone of row", "residual of row", "decoded of row"):
        assert word in text
    assert "effective rank" in text.lower()
    moved = tmp_path / "moved"
    shutil.copytree(finished.root / "cache", moved)
    manifest = (moved / "manifest.json").read_text().replace(str(finished.root / "shards"), "/nowhere/shards")
    (moved / "manifest.json").write_text(manifest)
    assert svgpipe("inspect", moved, "--html", page).code == 0
    assert "Not shown: source images" in page.read_text()
    assert svgpipe("inspect", finished.root / "shards", "--html", page).code == 1


def test_an_autoencoder_replaced_at_the_same_path_is_refused(finished: Finished, tmp_path: Path) -> None:
    """Its pictures would be taken for those of the cache's own autoencoder."""
    for other, words in (("diffusion", "expected an autoencoder"), ("elsewhere", "no such directory")):
        moved = tmp_path / other
        shutil.copytree(finished.root / "cache", moved)
        manifest = (moved / "manifest.json").read_text()
        (moved / "manifest.json").write_text(
            manifest.replace(f"{finished.root}/autoencoder", f"{finished.root}/{other}")
        )
        missing = contact_sheet(FeatureCache(moved), 3).missing
        assert len(missing) == 1 and words in missing[0]
    retrained = tmp_path / "retrained"
    shutil.copytree(finished.root / "autoencoder", retrained)
    AutoencoderManifest.read(retrained).model_copy(update={"steps": 7}).publish(retrained)
    cache = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", cache)
    text = (cache / "manifest.json").read_text()
    (cache / "manifest.json").write_text(text.replace(f"{finished.root}/autoencoder", str(retrained)))
    sheet = contact_sheet(FeatureCache(cache), 3)
    assert "was made with autoencoder" in sheet.missing[0]


def test_histograms_use_more_rows_than_the_sheet_shows(finished: Finished) -> None:
    sheet = contact_sheet(finished.cache, 3)
    assert len(sheet.rows) == 3
    assert sheet.histogram_rows == 36
    values = finished.cache.read(range(36)).astype(np.float32).reshape(-1, 116)
    edges = np.linspace(-HISTOGRAM_RANGE, HISTOGRAM_RANGE, sheet.histogram.shape[1] + 1)
    clipped = np.clip(values[:, 7], edges[0], edges[-1] - 1e-3)
    counts, _ = np.histogram(clipped, edges)
    np.testing.assert_allclose(sheet.histogram[7], counts / len(values), atol=2 / len(values))


def test_statistics_name_the_channels_that_are_off(finished: Finished, tmp_path: Path) -> None:
    copy = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", copy)
    cache = FeatureCache(copy)
    channels = cache.shape[-1]
    mean, std = np.zeros(channels, np.float32), np.ones(channels, np.float32)
    cache.store.put("stored_mean", mean, "channel")
    cache.store.put("stored_std", std, "channel")
    assert CacheStatistics.of(cache).warnings == []
    mean[7], std[channels - 1] = 0.2, 0.9
    cache.store.put("stored_mean", mean, "channel")
    cache.store.put("stored_std", std, "channel")
    (warning,) = CacheStatistics.of(cache).warnings
    assert "2 of 116 channels" in warning
    assert warning.index("backbone 7 (mean +0.200") < warning.index("residual 3 (mean +0.000, std 0.900)")
    assert "Calibrate over more images" in warning
    config = {**cache.manifest.config, "calibration_images": cache.manifest.num_valid - cache.manifest.num_heldout}
    cache.manifest = cache.manifest.model_copy(update={"config": config})
    assert "used all training images" in CacheStatistics.of(cache).warnings[0]


def test_stored_statistics_cover_all_valid_rows(finished: Finished) -> None:
    cache = finished.cache
    rows = np.flatnonzero(cache.valid)
    values = np.concatenate([cache.read(rows, view) for view in cache.views]).reshape(-1, 116).astype(np.float64)
    np.testing.assert_allclose(cache.store.array("stored_mean"), values.mean(0), atol=1e-6)
    np.testing.assert_allclose(cache.store.array("stored_std"), values.std(0), rtol=1e-6)
    np.testing.assert_array_equal(cache.store.array("stored_max"), values.max(0).astype(np.float32))
    np.testing.assert_array_equal(cache.store.array("stored_min"), values.min(0).astype(np.float32))
    original = cache.read(rows).reshape(-1, 116).astype(np.float64)  # fewer rows than the covariance is sampled over
    np.testing.assert_allclose(cache.store.array("stored_covariance"), np.cov(original.T, bias=True), atol=1e-10)


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(np.eye(5)) == pytest.approx(5)
    assert effective_rank(np.diag([1.0, 1.0, 0.0, 0.0])) == pytest.approx(2)
    assert effective_rank(np.zeros((3, 3))) == 0


def test_a_run_that_was_moved_keeps_its_links(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that was made with relative paths. The copy is used even while the original exists."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in ("shards", "autoencoder"):
        shutil.copytree(finished.root / name, tmp_path / "here" / "work" / name)
    options = ("--shards", "work/shards", "--autoencoder", "work/autoencoder", "--recipe", finished.recipe_file)
    assert svgpipe("extract", *options, "--out", "work/cache").code == 0
    (tmp_path / "here").rename(tmp_path / "there")
    monkeypatch.chdir("/")
    cache = FeatureCache(tmp_path / "there" / "work" / "cache")
    sheet = contact_sheet(cache, 3)
    assert sheet.missing == []
    assert cache.manifest.inputs["shards"].place(cache.path) == tmp_path / "there" / "work" / "shards"
    cache.store.unit_file(1).unlink()
    repaired = svgpipe("repair", cache.path)
    assert repaired.code == 0, repaired.err
