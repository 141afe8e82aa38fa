"""Extraction: features do not depend on the batch, and interruptions do not change the bytes."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.moments import Moments
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.networks.autoencoder import load_autoencoder

from .commands import Command
from .conftest import SMALL_UNITS, STORE, Finished, Outcome, extract_args, tree_bytes, units_done


def test_cached_features_equal_the_autoencoders_latents(finished: Finished) -> None:
    """The slow reference: one image at a time, no Ray, no batches, no units."""
    cache, shards = finished.cache, finished.shards
    model, _ = load_autoencoder(finished.root / "autoencoder")
    for row in (0, 7, 8, 35):
        image = torch.from_numpy(load_images(shards, [row], 32)).permute(0, 3, 1, 2).float() / 255
        for view, pixels in (("original", image), ("flip", image.flip(-1))):
            with torch.no_grad():
                expected = model.encode(pixels)[0].permute(1, 2, 0).numpy()
            expected = (expected - cache.channel_mean) / cache.channel_std
            np.testing.assert_allclose(cache.read([row], view)[0], expected, rtol=2e-3, atol=2e-3)


def test_a_feature_does_not_depend_on_batch_or_unit(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Up to float16 rounding: other batch sizes use other kernels, which differ in the last float32 bits."""
    changes = ("unit_rows=5", "batch_size=3", "calibration_images=1000")
    options = [part for change in changes for part in ("--set", f"extract.{change}")]
    found = svgpipe(*extract_args(finished, tmp_path / "other", *options))
    assert found.code == 0, found.err
    one, two = finished.cache, FeatureCache(tmp_path / "other")
    for view in ("original", "flip"):
        a, b = (c.denormalize(c.read(range(len(c)), view)) for c in (one, two))
        scale = np.abs(one.channel_std) * np.maximum(1, np.abs(one.read(range(len(one)), view).astype(np.float32)))
        assert (np.abs(a - b) / scale).max() < 2 * 2.0**-10


def test_brace_patterns_extract_a_part(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    arguments = extract_args(finished, tmp_path / "part")
    arguments[2] = f"{finished.root}/shards/shard-{{000001..000002}}.tar"
    assert svgpipe(*arguments).code == 0
    part = FeatureCache(tmp_path / "part")
    assert len(part) == 16
    assert (part.labels == finished.cache.labels[8:24]).all()
    assert part.manifest.inputs["shards"].fingerprint != finished.cache.manifest.inputs["shards"].fingerprint


def test_damaged_images_keep_their_row_and_are_counted(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """A tar is altered after it was indexed, at the same length: the row is invalid, the others are unchanged."""
    shards_copy = tmp_path / "shards"
    shutil.copytree(finished.root / "shards", shards_copy)
    offset = finished.shards.refs([3])[0].offset
    tar = shards_copy / "shard-000000.tar"
    content = bytearray(tar.read_bytes())
    content[offset + 30] ^= 255
    tar.write_bytes(content)
    arguments = extract_args(finished, tmp_path / "cache")
    arguments[2] = shards_copy
    refused = svgpipe(*arguments)
    assert refused.code == 1
    assert "1 × other bytes than indexed" in refused.err
    assert "--max-rejects" in refused.err
    found = svgpipe(*arguments, "--max-rejects", 0.1)
    assert found.code == 0, found.err
    assert "36 samples = 35 valid + 1 rejected" in found.out
    cache = FeatureCache(tmp_path / "cache")
    assert np.flatnonzero(~cache.valid).tolist() == [3]
    assert not cache.read([3]).any()
    reject = json.loads((tmp_path / "cache" / "rejected.jsonl").read_text())
    assert (reject["row"], reject["offset"]) == (3, offset)
    assert reject["tar"].endswith("shard-000000.tar")
    others = [i for i in range(36) if i != 3]
    a, b = (c.denormalize(c.read(others)) for c in (cache, finished.cache))
    np.testing.assert_allclose(a, b, rtol=5e-3, atol=5e-2)


def test_a_journal_record_without_its_shard_is_a_missing_unit(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """After a partial restore or a manual clean-up, the journal lists other files than there are."""
    out = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", out)
    before = tree_bytes(out, *STORE)
    (out / "manifest.json").unlink()
    store = FeatureStore.open(out)
    kept = {unit: Path(str(store.unit_file(unit))) for unit in range(5)}
    times = {unit: file.stat().st_mtime_ns for unit, file in kept.items()}
    kept[0].unlink()
    kept[1].write_bytes(kept[1].read_bytes()[:-1])
    (out / "journal" / "unit-000002.json").write_text('{"sha256": "ab')
    altered = out / "journal" / "unit-000003.json"
    altered.write_text(altered.read_text().replace('"count": ', '"count": 1'))
    found = svgpipe(*extract_args(finished, out))
    assert found.code == 0, found.err
    assert tree_bytes(out, *STORE) == before
    assert kept[4].stat().st_mtime_ns == times[4]
    assert FeatureCache(out).manifest.content == finished.cache.manifest.content


def test_a_scheduler_stops_it_as_ctrl_c_does(finished: Finished, tmp_path: Path) -> None:
    out, log = tmp_path / "cache", tmp_path / "log"
    arguments = extract_args(finished, out, *SMALL_UNITS)
    process = Command(arguments, log)
    process.wait_for(lambda: units_done(out) >= 2)
    process.send(signal.SIGTERM)
    assert process.wait(60) == 130
    text = log.read_text()
    assert "stopped. Finished work is kept; the same command resumes." in text
    assert "SIGTERM received" not in text
    assert "Traceback" not in text
    assert not (out / "lock.json").exists()
    assert 2 <= units_done(out) < 36


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--set", "extract.batch_size=2"], ["config.batch_size: 4 there, 2 here"]),
        (["--set", "extract.views=[original]"], ["config.views"]),
    ],
)
def test_another_config_is_refused(
    finished: Finished, svgpipe: Callable[..., Outcome], change: list[str], words: list[str]
) -> None:
    before = tree_bytes(finished.root / "cache", "**/*")
    found = svgpipe(*extract_args(finished, finished.root / "cache", *change))
    assert found.code == 1
    for word in words:
        assert word in found.err
    assert tree_bytes(finished.root / "cache", "**/*") == before


def test_missing_inputs_are_reported(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    arguments = extract_args(finished, tmp_path / "out")
    arguments[4] = tmp_path / "none"
    found = svgpipe(*arguments)
    assert found.code == 1
    assert "autoencoder, found no such directory" in found.err
    assert not (tmp_path / "out").exists()


def test_a_tar_cut_short_is_named(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    shutil.copytree(finished.root / "shards", tmp_path / "shards")
    tar = tmp_path / "shards" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])
    arguments = extract_args(finished, tmp_path / "out")
    arguments[2] = tmp_path / "shards"
    found = svgpipe(*arguments)
    assert found.code == 1
    assert f"{tar}: expected a tar of" in found.err


@pytest.mark.slow
def test_too_many_workers_are_refused(
    finished: Finished, ray_session: None, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    found = svgpipe(*extract_args(finished, tmp_path / "out", "--workers", 99, "--cpus-per-worker", 1))
    assert found.code == 2
    assert "99 workers of 1 CPUs" in found.err
    found = svgpipe(*extract_args(finished, tmp_path / "out", "--gpus-per-worker", 64))
    assert found.code == 2
    assert "64 GPUs" in found.err


def test_dinov3_at_256_pixels_with_random_weights_asked_for(
    photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """The published architecture end to end: a 16x16x392 cache. The manifest says that the weights are random."""
    recipe = {
        "autoencoder": {
            "backbone": {"weights": "random"},
            "perceptual": {"weight": 0.0},
            "discriminator": {"enabled": False},
            "steps": 0,
            "calibration_images": 2,
            "eval_images": 1,
        },
        "extract": {"unit_rows": 2, "batch_size": 2, "calibration_images": 2, "views": ["original"]},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert svgpipe("shard", photographs, "--out", tmp_path / "all", "--set", "shard.images_per_shard=4").code == 0
    options = ["--recipe", tmp_path / "recipe.yaml", "--shards", tmp_path / "all" / "shard-000000.tar"]
    encoder = tmp_path / "autoencoder"
    assert svgpipe("train-autoencoder", *options, "--out", encoder).code == 0
    assert svgpipe("extract", *options, "--autoencoder", encoder, "--out", tmp_path / "cache").code == 0
    cache = FeatureCache(tmp_path / "cache")
    assert cache.shape == (4, 1, 16, 16, 392)
    assert (cache.manifest.backbone_weights, cache.manifest.frozen_channels) == ("random", 384)
    assert cache.manifest.backbone == "vit_small_plus_patch16_dinov3.lvd1689m"


def test_moments_merge_to_those_of_everything() -> None:
    values = np.random.default_rng(0).normal(3, 2, (7, 5, 4))
    parts = [Moments.of(values[:2]), Moments.of(values[2:2]), Moments.of(values[2:])]
    merged = reduce(Moments.merge, parts, Moments.empty(4))
    flat = values.reshape(-1, 4)
    np.testing.assert_allclose(merged.mean, flat.mean(0))
    np.testing.assert_allclose(merged.std, flat.std(0))
    assert (merged.minimum == flat.min(0)).all()
    assert (merged.maximum == flat.max(0)).all()
    again = Moments.from_json(json.loads(json.dumps(merged.to_json())), 4)
    assert (again.squares == merged.squares).all()
    assert (again.count, again.mean.tolist()) == (merged.count, merged.mean.tolist())
    for damaged in (merged.to_json(), {}, None, {"count": 1, "values": "?"}):
        with pytest.raises(ArtifactError, match="statistics of 5 channels"):
            Moments.from_json(damaged, 5)
