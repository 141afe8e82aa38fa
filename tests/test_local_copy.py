"""`--local-cache`: copies of the cache's files on a local disk, and the order of rows that needs few of them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svgpipe.manifests import FeatureCache, local_copy
from svgpipe.manifests.filesystem import write_atomic
from svgpipe.manifests.local_copy import LocalCopy, LocalDisk
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.stages.train_diffusion.data import CacheBatches
from svgpipe.stages.train_diffusion.order import Blocks, batch_at, files_ahead

from .conftest import Finished, Outcome
from .test_train_diffusion import same_weights, train_args

Run = Callable[..., Outcome]
MANY = LocalDisk(Path("unused"), 1 << 40)


@st.composite
def blocks(draw: st.DrawFn) -> Blocks:
    """Files with different numbers of training rows."""
    counts = draw(st.lists(st.integers(1, 7), min_size=1, max_size=9))
    numbers = np.cumsum([draw(st.integers(1, 3)) for _ in counts])  # some files have no training rows
    return Blocks(np.repeat(numbers, counts), draw(st.integers(1, 5)))


@settings(max_examples=80, deadline=None)
@given(blocks(), st.integers(0, 2**31), st.integers(1, 12), st.integers(0, 40))
def test_blocks_are_permutations_that_need_two_blocks_of_files(
    shuffled: Blocks, seed: int, batch_size: int, step: int
) -> None:
    rows = len(shuffled.units)
    where = {"seed": seed, "batch_size": batch_size, "num_rows": rows, "num_views": 2}
    epoch = step * batch_size // rows
    steps = range(-(-(epoch + 1) * rows // batch_size))
    stream = np.concatenate([batch_at(s, blocks=shuffled, **where).rows for s in steps])
    assert sorted(stream[epoch * rows : (epoch + 1) * rows].tolist()) == list(range(rows))
    ahead = files_ahead(step, blocks=shuffled, **where)
    assert len(ahead) <= 2 * shuffled.size
    batch = batch_at(step, blocks=shuffled, **where)
    assert shuffled.units[batch.rows[0]] in ahead[: shuffled.size]
    if batch_size <= min(np.bincount(shuffled.units)[np.unique(shuffled.units)]):  # not longer than any block
        assert {*shuffled.units[batch.rows].tolist()} <= set(ahead)


def test_pairs_per_batch_are_those_of_real_batches() -> None:
    shuffled = Blocks(np.repeat(np.arange(40), 25), 5)
    where = {"seed": 3, "batch_size": 25, "num_rows": 1000, "num_views": 1}

    def pairs(blocks: Blocks | None) -> float:
        files = [shuffled.units[batch_at(step, blocks=blocks, **where).rows] for step in range(4000)]
        return float(np.mean([sum(n * (n - 1) / 2 for n in np.bincount(own)) for own in files]))

    expected, ideal = shuffled.pairs_per_batch(25)
    assert pairs(shuffled) == pytest.approx(expected, rel=0.05)
    assert pairs(None) == pytest.approx(ideal, rel=0.05)
    assert expected > 5 * ideal


def test_a_local_copy_changes_no_value_and_keeps_no_other_file(finished: Finished, tmp_path: Path) -> None:
    cache, rows = finished.cache, np.asarray([0, 35, 9, 9, 17], np.int64)
    views = np.asarray([0, 1, 1, 0, 1], np.int64)
    copy = LocalCopy(cache, LocalDisk(tmp_path, 1 << 30))
    expected = cache.read_stored(rows, views)
    np.testing.assert_array_equal(copy.read_stored(rows, views), expected)  # nothing is here yet
    copy.keep([1, 4])
    copy.wait()
    assert copy.units_here() == {1, 4}
    np.testing.assert_array_equal(copy.read_stored(rows, views), expected)
    copy.keep([4, 0, 2])
    copy.wait()
    assert copy.units_here() == {0, 2, 4}
    np.testing.assert_array_equal(copy.read_stored(rows, views), expected)
    copy.close()


def test_rows_come_from_the_local_disk(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = finished.cache
    copy = LocalCopy(cache, LocalDisk(tmp_path, 1 << 30))
    copy.keep([2])
    copy.wait()
    expected = cache.read([17])
    monkeypatch.setattr(cache.store, "read_stored", None)  # the cache itself cannot be read any more
    np.testing.assert_array_equal(copy.read_stored(np.asarray([17]), np.asarray([0])), expected)


def test_a_damaged_or_deleted_copy_is_not_used(finished: Finished, tmp_path: Path) -> None:
    cache, rows, views = finished.cache, np.arange(36), np.zeros(36, np.int64)
    copy = LocalCopy(cache, LocalDisk(tmp_path, 1 << 30))
    copy.keep(range(5))
    copy.wait()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 5  # of eight rows, the last of four
    files[0].write_bytes(bytes(len(files[0].read_bytes())))
    files[1].unlink()
    again = LocalCopy(cache, LocalDisk(tmp_path, 1 << 30))
    np.testing.assert_array_equal(again.read_stored(rows, views), cache.read(rows))


def test_a_full_local_disk_is_a_warning(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        if "c/3/" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomic(path, content)

    said: list[str] = []
    monkeypatch.setattr(local_copy, "write_atomic", full)
    monkeypatch.setattr(local_copy, "DOWNLOADS", 1)
    copy = LocalCopy(finished.cache, LocalDisk(tmp_path, 1 << 30), said.append)
    copy.keep([3, 0, 1])
    copy.wait()
    assert copy.units_here() == set()
    assert len(said) == 1 and "No space left on device" in said[0]
    expected = finished.cache.read([24, 0])
    np.testing.assert_array_equal(copy.read_stored(np.asarray([24, 0]), np.zeros(2, np.int64)), expected)


def test_batches_stay_within_the_space(finished: Finished, tmp_path: Path) -> None:
    config = load_recipe(str(finished.recipe_file), ["diffusion.shuffle_files=1"]).diffusion
    cache = finished.cache
    plain = iter(CacheBatches(cache, cache.training_rows, config, 0, range(6)))
    copied = iter(CacheBatches(cache, cache.training_rows, config, 0, range(6), disk=LocalDisk(tmp_path, 1 << 30)))
    for _ in range(30):
        one, two = next(plain), next(copied)
        assert all((a == b).all() for a, b in zip(one, two, strict=True))
        assert len([path for path in tmp_path.rglob("*") if path.is_file() and ".partial" not in path.name]) <= 2


@pytest.mark.parametrize("settings", [[], ["--set", "diffusion.shuffle_files=2"]])
def test_training_with_a_local_copy_gives_the_same_weights(
    settings: list[str], finished: Finished, tmp_path: Path, svgpipe: Run
) -> None:
    local = ["--local-cache", tmp_path / "local", "--local-gb", 1]
    assert svgpipe(*train_args(finished, tmp_path / "one", *settings, *local)).code == 0
    assert any(path.is_file() for path in (tmp_path / "local").rglob("*"))
    outcome = svgpipe(*train_args(finished, tmp_path / "two", *settings))
    assert outcome.code == 0
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert same_weights(tmp_path / "one", finished.root / "diffusion") is not bool(settings)
    assert ("pairs of rows of a batch lie in one file" in outcome.err) is bool(settings)


def test_too_little_space_is_refused_with_the_setting_that_fits(
    finished: Finished, tmp_path: Path, svgpipe: Run
) -> None:
    size = finished.cache.manifest.num_bytes / 5 / 1e9
    local = ["--local-cache", tmp_path / "local", "--local-gb"]
    outcome = svgpipe(*train_args(finished, tmp_path / "out", *local, 4.5 * size))
    assert (outcome.code, (tmp_path / "out").exists()) == (2, False)
    assert "holds 4, and all are needed" in outcome.err
    assert "--set diffusion.shuffle_files=2" in outcome.err
    three = ["--set", "diffusion.shuffle_files=2", *local, 3.5 * size]
    assert "two blocks of 2 are needed" in svgpipe(*train_args(finished, tmp_path / "out", *three)).err
    assert "expected two or more" in svgpipe(*train_args(finished, tmp_path / "out", *local, 0)).err


def test_a_cache_of_another_content_is_not_mixed_up(finished: Finished, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(36, 2, 2, 3)).astype(np.float32)
    caches = [
        FeatureCache.create(tmp_path / name, values + offset, np.zeros(36, int), mean=0, std=1, unit_rows=8)
        for name, offset in (("one", 0), ("two", 1))
    ]
    for cache in caches:
        copy = LocalCopy(cache, LocalDisk(tmp_path / "local", 1 << 30))
        copy.keep(range(5))
        copy.wait()
        np.testing.assert_array_equal(copy.read_stored(np.arange(36), np.zeros(36, np.int64)), cache.read(range(36)))
