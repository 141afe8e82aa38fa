"""The feature cache: opens without svgpipe, reads any rows in any order, detects damage."""

from __future__ import annotations

import pickle
import resource
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.chunk_reader import files_to_keep
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.shards import ShardSet
from svgpipe.manifests.store_spec import StoreSpec
from svgpipe.stages.extract.quantization import int8_scales

from .conftest import Finished

DEADLINE_S = 60
ROWS, VIEWS = 11, 2
SPEC = StoreSpec(ROWS, ("original", "flip"), (2, 3), 5, 4, ("a", "b"))


class Reads(Dataset[np.ndarray]):
    """Reads one row of a cache at a time, like a training script."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, i: int) -> np.ndarray:
        return np.asarray(self.cache.read([i])[0])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, np.ndarray]:
    path = tmp_path_factory.mktemp("store") / "store"
    store = FeatureStore.create(path, SPEC, np.zeros(5, np.float32), np.ones(5, np.float32))
    values = np.random.default_rng(0).normal(size=(ROWS, VIEWS, 2, 3, 5)).astype(np.float16)
    values[6] = 0  # an all-zero row must be written too, and read back without complaint
    for unit in range(SPEC.num_units):
        rows = SPEC.rows_of(unit)
        store.write_unit(unit, values[rows.start : rows.stop])
    return store, values


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(-ROWS, ROWS - 1), max_size=20), data=st.data())
def test_reads_equal_numpy_indexing(
    written: tuple[FeatureStore, np.ndarray], rows: list[int], data: st.DataObject
) -> None:
    store, values = written
    views = data.draw(st.lists(st.integers(0, VIEWS - 1), min_size=len(rows), max_size=len(rows)))
    index = np.asarray(rows, int)
    np.testing.assert_array_equal(store.read(rows, views), values[index, np.asarray(views, int)])
    np.testing.assert_array_equal(store.read(rows, "flip"), values[index, 1])
    # tensorstore, which reads object stores, is the oracle of the reader of folders.
    chosen = np.asarray(rows, int) % ROWS, np.asarray(views, int)
    np.testing.assert_array_equal(store._by_tensorstore(lambda f: f.vindex[chosen]), values[chosen])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader_workers_read_after_the_parent(finished: Finished, method: str) -> None:
    """A forked child must not use handles and threads of the parent; a hang is a failure."""
    cache = finished.cache
    expected = cache.read(range(len(cache)))
    cache.store.read_unit(0)  # by tensorstore, which aborts a fork that uses it again
    loader = DataLoader(
        Reads(cache), batch_size=None, num_workers=2, multiprocessing_context=method, timeout=DEADLINE_S
    )
    for _ in range(2):
        found = np.stack([np.asarray(row) for row in loader])
        np.testing.assert_array_equal(found, expected)


def test_int8_stores_round_to_the_step_and_clip(tmp_path: Path) -> None:
    spec = replace(SPEC, dtype="int8")
    scale = np.asarray([0.01, 0.02, 0.5, 1.0, 3.0], np.float32)
    store = FeatureStore.create(tmp_path / "store", spec, np.zeros(5, np.float32), np.ones(5, np.float32), scale)
    values = np.random.default_rng(0).normal(size=(ROWS, VIEWS, 2, 3, 5)).astype(np.float16)
    for unit in range(spec.num_units):
        rows = spec.rows_of(unit)
        store.write_unit(unit, values[rows.start : rows.stop])
    found = FeatureStore.open(tmp_path / "store").read(range(ROWS), "flip")
    assert found.dtype == np.float32
    expected = np.clip(values[:, 1].astype(np.float32), -127 * scale, 127 * scale)
    assert (np.abs(found - expected) <= scale / 2 * 1.0001).all()
    plain = zarr.open_group(tmp_path / "store", mode="r")
    np.testing.assert_allclose(plain["features"][3, 1] * plain["feature_scale"][:], found[3], rtol=1e-6)  # type: ignore[index,operator,arg-type]


def test_int8_steps_are_of_least_error() -> None:
    """A few huge values must not coarsen the steps of all others; a constant channel must not divide by zero."""
    values = np.random.default_rng(0).normal(size=(4000, 4)).astype(np.float32)
    values[:2, 1] = 60
    values[:, 2] = 0
    scales = int8_scales(values)

    def error(steps: np.ndarray) -> np.ndarray:
        return np.square(np.clip(np.rint(values / steps), -127, 127) * steps - values).mean(0)

    by_max = np.where(values.any(0), np.abs(values).max(0) / 127, 1)
    assert (error(scales) <= error(by_max) * 1.0001).all()
    assert scales[2] == 1
    for factor in (0.8, 1.25):
        assert (error(scales)[[0, 3]] <= error(scales * factor)[[0, 3]] * 1.02).all()


@settings(max_examples=200)
@given(st.integers(1, 10_000), st.integers(1, 700))
def test_units_partition_the_rows(num_samples: int, unit_rows: int) -> None:
    spec = StoreSpec(num_samples, ("original",), (1, 1), 1, unit_rows, ())
    covered = [row for unit in range(spec.num_units) for row in spec.rows_of(unit)]
    assert covered == list(range(num_samples))


def test_bad_indices_are_refused_at_once(written: tuple[FeatureStore, np.ndarray]) -> None:
    store, _ = written
    for bad in ([ROWS], [-ROWS - 1], [[0, 1]], [0.5], ["a"]):
        with pytest.raises(IndexError, match="expected"):
            store.read(bad)
    with pytest.raises(ValueError, match="expected one of original, flip"):
        store.read([0], view="sideways")
    with pytest.raises(IndexError, match=r"view numbers: expected 0\.\.1"):
        store.read([0], view=[2])


def test_writes_of_another_shape_are_refused(written: tuple[FeatureStore, np.ndarray]) -> None:
    store, values = written
    with pytest.raises(ValueError, match="unit 2: expected float16"):
        store.write_unit(2, values[:4])
    with pytest.raises(ValueError, match="found float32"):
        store.write_unit(0, values[:4].astype(np.float32))


def test_a_missing_shard_is_an_error_not_zeros(written: tuple[FeatureStore, np.ndarray], tmp_path: Path) -> None:
    store, values = written
    copy = tmp_path / "copy"
    shutil.copytree(str(store.path), copy)
    FeatureStore.open(copy).unit_file(1).unlink()
    damaged = FeatureStore.open(copy)
    np.testing.assert_array_equal(damaged.read([0, 10]), values[[0, 10], 0])
    with pytest.raises(ArtifactError, match="cannot read features"):
        damaged.read([5])


def test_a_flipped_bit_is_an_error(written: tuple[FeatureStore, np.ndarray], tmp_path: Path) -> None:
    store, _ = written
    copy = tmp_path / "copy"
    shutil.copytree(str(store.path), copy)
    file = FeatureStore.open(copy).unit_file(0)
    content = bytearray(file.read_bytes())
    content[7] ^= 4
    file.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match="cannot read features"):
        FeatureStore.open(copy).read(range(4))


def test_plain_zarr_and_tensorstore_open_it(finished: Finished) -> None:
    cache = finished.cache
    group = zarr.open_group(str(finished.root / "cache"), mode="r")
    features = group["features"]
    assert isinstance(features, zarr.Array)
    assert features.metadata.dimension_names == ("sample", "view", "row", "column", "channel")  # type: ignore[union-attr]
    assert features.shape == cache.shape
    assert features.dtype == np.dtype(np.float16)
    assert features.chunks == (1, 1, 4, 4, 116)
    assert features.shards == (8, 2, 4, 4, 116)
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(finished.root / "cache" / "features")}}
    other = tensorstore.open(spec).result()
    everything = cache.read(range(len(cache)))
    np.testing.assert_array_equal(np.asarray(features[:, 0]), everything)
    np.testing.assert_array_equal(other[:, 0].read().result(), everything)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # about files in the group that are not Zarr's
        assert {name for name, _ in group.members()} == {"features", *cache.manifest.array_names}
    assert group.attrs["class_names"] == ["astronaut", "cat", "coffee"]
    assert group.attrs["svgpipe"]["fingerprint"] == cache.manifest.fingerprint  # type: ignore[index, call-overload]


def test_the_cache_in_python(finished: Finished) -> None:
    cache = FeatureCache(str(finished.root / "cache"))
    assert len(cache) == 36
    assert cache.shape == (36, 2, 4, 4, 116)
    assert cache.classes == ["astronaut", "cat", "coffee"]
    row = cache[3]
    assert row.features.shape == (4, 4, 116)
    assert row.class_name == cache.classes[row.label]
    assert row.valid
    assert (cache.labels == finished.shards.rows.label).all()
    assert (cache.heldout == finished.shards.rows.heldout).all()
    assert cache[-1].label == cache.labels[-1]
    with pytest.raises(IndexError):
        cache[36]
    with pytest.raises(TypeError, match="read"):
        cache[1:3]
    assert cache.group["features"].shape == cache.shape  # type: ignore[union-attr]
    assert len(list(iter(cache))) == 36


def test_stored_values_are_normalised_and_denormalize_inverts(finished: Finished) -> None:
    cache = finished.cache
    stored = cache.read(range(len(cache))).astype(np.float64)
    assert abs(stored.mean(axis=(0, 1, 2))).mean() < 0.2
    assert abs(stored.std(axis=(0, 1, 2)) - 1).mean() < 0.2
    back = cache.denormalize(stored)
    assert back.dtype == np.float32
    np.testing.assert_allclose((back - cache.channel_mean) / cache.channel_std, stored, atol=1e-4)
    both = np.concatenate([stored, cache.read(range(len(cache)), "flip")]).reshape(-1, 116)
    np.testing.assert_allclose(cache.store.array("stored_mean"), both.mean(0), atol=1e-4)
    np.testing.assert_allclose(cache.store.array("stored_std"), both.std(0), atol=1e-4)


def test_a_cache_survives_pickling(finished: Finished) -> None:
    cache = finished.cache
    cache.read([0])
    again = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(again.read([1]), cache.read([1]))


def test_missing_stores_and_stores_of_another_cache(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="expected a feature cache, found no such directory"):
        FeatureCache(tmp_path / "none")
    with pytest.raises(ArtifactError, match="expected a feature cache"):
        FeatureCache(finished.root / "shards")
    with pytest.raises(ArtifactError, match="expected a Zarr v3 group"):
        FeatureStore.open(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(finished.root / "cache", copy)
    shutil.rmtree(copy / "features")
    with pytest.raises(ArtifactError, match="expected a Zarr v3 group"):
        FeatureCache(copy)


def test_artifacts_are_read_after_the_current_directory_changed(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(finished.root)
    cache, shards = FeatureCache("cache"), ShardSet.open("shards")
    some = ShardSet.open("shards/shard-{000000..000001}.tar")
    monkeypatch.chdir("/")
    np.testing.assert_array_equal(cache.read([1, 0]), finished.cache.read([1, 0]))
    assert shards.read_image(0) == some.read_image(0) == finished.shards.read_image(0)
    assert ShardSet.of_input(some.as_input(), finished.root).read_image(0) == shards.read_image(0)


def test_a_data_loader_collates_the_rows_of_a_cache(finished: Finished) -> None:
    cache = finished.cache
    batch = next(iter(DataLoader(cast("Dataset[Any]", cache), batch_size=4)))
    np.testing.assert_array_equal(batch.features.numpy(), cache.read(range(4)))
    assert batch.label.tolist() == cache.labels[:4].tolist() and batch.valid.all()
    assert list(batch.class_name) == [cache.classes[label] for label in cache.labels[:4]]


@pytest.mark.parametrize(
    ("limits", "may_raise", "expected"),
    [
        ((1024, 1_048_576), True, 5005),
        ((1024, 1_048_576), False, 512),
        ((256, 256), True, 64),
        ((9999, 9999), True, 5005),
    ],
)
def test_open_files_are_bounded_by_the_limit_of_the_process(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], may_raise: bool, expected: int
) -> None:
    """A shuffled batch over 5,005 shards reopens no file where the system allows it."""
    now = [limits]

    def set_limit(_: int, new: tuple[int, int]) -> None:
        if not may_raise:
            raise ValueError("not allowed")
        now[0] = new

    monkeypatch.setattr(resource, "getrlimit", lambda _: now[0])
    monkeypatch.setattr(resource, "setrlimit", set_limit)
    assert files_to_keep(5005) == expected
    assert now[0][0] <= limits[1]
