"""`--local-cache`: copies of the cache's files on a local disk, and the order of rows that needs few of them."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svgpipe.manifests import local_copy
from svgpipe.manifests.filesystem import write_atomic
from svgpipe.manifests.local_copy import LocalCopy, LocalDisk
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.stages.train_diffusion.data import CacheBatches
from svgpipe.stages.train_diffusion.order import Blocks, batch_at, files_ahead, pairs_in_one_file

from .conftest import Finished, Outcome
from .test_train_diffusion import same_weights, train_args

Run = Callable[..., Outcome]


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


@pytest.mark.parametrize(("size", "batch_size"), [(5, 25), (2, 16), (2, 64), (1, 4)])
def test_the_share_of_pairs_in_one_file(size: int, batch_size: int) -> None:
    files = np.repeat(np.arange(40), 8)
    shuffled = Blocks(files, size)
    measured = pairs_in_one_file(files, seed=3, batch_size=batch_size, num_views=1, blocks=shuffled)
    pairs = []
    for step in range(400):  # over many epochs
        rows = files[batch_at(step, seed=4, batch_size=batch_size, num_rows=320, num_views=1, blocks=shuffled).rows]
        pairs.append((rows[:, None] == rows).sum() - batch_size)
    assert measured == pytest.approx(np.mean(pairs) / (batch_size * (batch_size - 1)), rel=0.15)
    ideal = pairs_in_one_file(files, seed=3, batch_size=batch_size, num_views=1, blocks=None)
    assert ideal == pytest.approx(7 / 319, rel=0.5)
    assert measured > 1.2 * ideal


def test_a_local_copy_changes_no_value_and_keeps_no_other_file(finished: Finished, tmp_path: Path) -> None:
    cache, rows = finished.cache, np.asarray([0, 35, 9, 9, 17], np.int64)
    views = np.asarray([0, 1, 1, 0, 1], np.int64)
    copy = LocalCopy(cache, tmp_path)
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
    copy = LocalCopy(cache, tmp_path)
    copy.keep([2])
    copy.wait()
    expected = cache.read([17])
    monkeypatch.setattr(cache.store, "read_stored", None)  # the cache itself cannot be read any more
    np.testing.assert_array_equal(copy.read_stored(np.asarray([17]), np.asarray([0])), expected)


def test_a_damaged_or_deleted_copy_is_not_used(finished: Finished, tmp_path: Path) -> None:
    cache, rows, views = finished.cache, np.arange(36), np.zeros(36, np.int64)
    copy = LocalCopy(cache, tmp_path)
    copy.keep(range(5))
    copy.wait()
    files = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert len(files) == 5  # of eight rows, the last of four
    files[0].write_bytes(bytes(len(files[0].read_bytes())))
    files[1].unlink()
    np.testing.assert_array_equal(copy.read_stored(rows, views), cache.read(rows))
    copy.wait()  # the damaged one is downloaded again
    assert files[0].read_bytes() == (cache.path / files[0].relative_to(tmp_path)).read_bytes()
    assert not files[1].exists()
    np.testing.assert_array_equal(copy.read_stored(rows, views), cache.read(rows))


def test_a_full_local_disk_is_a_warning(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        if "c/3/" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write_atomic(path, content)

    said: list[str] = []
    monkeypatch.setattr(local_copy, "write_atomic", full)
    monkeypatch.setattr(local_copy, "DOWNLOADS", 1)
    copy = LocalCopy(finished.cache, tmp_path, say=said.append)
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
    copy = LocalCopy(cache, tmp_path)
    copied = iter(CacheBatches(cache, cache.training_rows, config, 0, range(6), copy=copy))
    for _ in range(30):
        one, two = next(plain), next(copied)
        assert torch.equal(one.tokens, two.tokens) and torch.equal(one.labels, two.labels)
    copy.wait()
    assert len(copy.units_here()) <= 2
    opened = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    assert not [path for path in opened if path.startswith(str(tmp_path)) and path.endswith("(deleted)")]


@pytest.mark.parametrize("settings", [[], ["--set", "diffusion.shuffle_files=2"]])
def test_training_with_a_local_copy_gives_the_same_weights(
    settings: list[str], finished: Finished, tmp_path: Path, svgpipe: Run
) -> None:
    local = ["--local-cache", tmp_path / "local", "--local-gb", 1]
    assert svgpipe(*train_args(finished, tmp_path / "one", *settings, *local)).code == 0
    assert not [*(tmp_path / "local").iterdir()]  # a finished training needs no copy
    outcome = svgpipe(*train_args(finished, tmp_path / "two", *settings))
    assert outcome.code == 0
    assert same_weights(tmp_path / "one", tmp_path / "two")
    assert same_weights(tmp_path / "one", finished.root / "diffusion") is not bool(settings)
    assert ("of the pairs of rows in a batch lie in one file" in outcome.err) is bool(settings)


def test_too_little_space_is_refused_with_the_setting_that_fits(
    finished: Finished, tmp_path: Path, svgpipe: Run
) -> None:
    size = (finished.root / "cache/features/c/0/0/0/0/0").stat().st_size / 1e9  # four files hold training rows
    local = ["--local-cache", tmp_path / "local", "--local-gb"]
    outcome = svgpipe(*train_args(finished, tmp_path / "out", *local, 3.5 * size))
    assert (outcome.code, (tmp_path / "out").exists()) == (2, False)
    assert "3 of them fit, and all are needed" in outcome.err
    assert "--set diffusion.shuffle_files=1" in outcome.err
    three = ["--set", "diffusion.shuffle_files=2", *local, 3.5 * size]
    assert "two blocks of 2 are needed" in svgpipe(*train_args(finished, tmp_path / "out", *three)).err
    assert "0 of them fit" in svgpipe(*train_args(finished, tmp_path / "out", *local, 1e-9)).err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--local-gb", 5], "expected --local-cache DIR"),
        (["--local-cache", "s3://bucket/x"], "found an object store"),
        (["--local-cache", "local", "--local-gb", "inf"], "--local-gb inf: expected a number"),
        (["--local-cache", "local", "--local-gb", 0], "--local-gb 0: expected a number"),
        (["--local-cache", "file/below"], "expected a folder on a local disk"),
    ],
)
def test_mistakes_stop_before_the_training(
    options: list[object],
    problem: str,
    finished: Finished,
    tmp_path: Path,
    svgpipe: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    outcome = svgpipe(*train_args(finished, tmp_path / "out", *options))
    assert (outcome.code, (tmp_path / "out").exists()) == (2, False)
    assert problem in outcome.err


def test_a_failing_local_disk_costs_speed_alone(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, rows, views = finished.cache, np.arange(36), np.zeros(36, np.int64)
    copy = LocalCopy(cache, tmp_path)
    copy.keep(range(5))
    copy.wait()
    exists, unlink = Path.exists, Path.unlink

    def fail(method: Callable[..., object]) -> Callable[..., object]:
        def call(path: Path, *arguments: object, **options: object) -> object:
            if path.is_relative_to(tmp_path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return method(path, *arguments, **options)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "exists", fail(exists))
        patch.setattr(Path, "unlink", fail(unlink))
        np.testing.assert_array_equal(copy.read_stored(rows, views), cache.read(rows))
        copy.keep([1])
        np.testing.assert_array_equal(copy.read_stored(rows, views), cache.read(rows))
    np.testing.assert_array_equal(copy.read_stored(rows, views), cache.read(rows))


def test_workers_begin_with_their_own_files(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_copy, "DOWNLOADS", 1)
    written: list[str] = []
    monkeypatch.setattr(local_copy, "write_atomic", lambda path, content: written.append(path.parts[-5]))
    for rank in range(2):
        copy = LocalCopy(finished.cache, tmp_path, rank, 2)
        copy.keep([4, 3, 2, 1, 0])
        copy.wait()
        copy.close()
    assert written == ["4", "2", "0", "3", "1", "3", "1", "4", "2", "0"]


def test_every_training_has_its_own_folder(finished: Finished, tmp_path: Path) -> None:
    disk = LocalDisk(tmp_path, 1)
    folders = {disk.folder_of(finished.cache, tmp_path / name) for name in ("one", "two")}
    assert len(folders) == 2
    assert {folder.parent for folder in folders} == {tmp_path}
