"""Damage is found, reported, and repaired to the published content."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.calibration import Calibration
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.shards import ShardSet

from .conftest import STORE, Finished, Outcome, tree_bytes


def unit_file(cache: Path, unit: int) -> Path:
    file = FeatureStore.open(cache).unit_file(unit)
    assert isinstance(file, Path)
    return file


def flip_bit(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 16
    file.write_bytes(content)


def flip_data(cache: Path) -> None:
    flip_bit(unit_file(cache, 2), 12345)


def cut_short(cache: Path) -> None:
    file = unit_file(cache, 1)
    file.write_bytes(file.read_bytes()[:-100])


def lose_shard(cache: Path) -> None:
    unit_file(cache, 4).unlink()


def cut_last(cache: Path) -> None:
    """The last shard is not full: tensorstore reads it before it writes, and fails if it is damaged."""
    file = unit_file(cache, 4)
    file.write_bytes(file.read_bytes()[:-7])


def lose_rejects(cache: Path) -> None:
    (cache / "rejected.jsonl").unlink()


def lose_record(cache: Path) -> None:
    (cache / "journal" / "unit-000003.json").unlink()


def flip_statistics(cache: Path) -> None:
    flip_bit(cache / "journal" / "unit-000000.json", 300)


def lose_metadata(cache: Path) -> None:
    (cache / "features" / "zarr.json").write_text("{}")


def flip_labels(cache: Path) -> None:
    flip_bit(cache / "label" / "c" / "0", 4)


def other_calibration(cache: Path) -> None:
    journal = Journal(cache)
    calibration = Calibration.read(journal)
    Calibration(calibration.mean, calibration.std * 2, calibration.scale).record(journal)


DAMAGE: dict[Callable[[Path], None], tuple[str, str]] = {
    flip_data: ("features/c/2/", "unit 2: expected sha256"),
    cut_short: ("features/c/1/", "unit 1: expected "),
    lose_shard: ("features/c/4/", "unit 4: expected"),
    cut_last: ("features/c/4/", "unit 4: expected"),
    lose_rejects: ("rejected.jsonl", "cannot be read"),
    lose_record: ("journal", "unit 3: has no record"),
    flip_statistics: ("features/c/0/", "unit 0:"),
    lose_metadata: ("cache", "expected a Zarr v3 group"),
    flip_labels: ("label", "expected an array, cannot read it"),
    other_calibration: ("journal", "differs from the normalisation of the store"),
}
MENDED_TOGETHER = [
    [flip_data, cut_last, lose_rejects],
    [cut_short, lose_shard, lose_record, flip_statistics],
    [lose_metadata, flip_labels, other_calibration],
]


def test_all_artifacts_of_the_pipeline_verify(finished: Finished, svgpipe: Callable[..., Outcome]) -> None:
    found = svgpipe("verify", finished.root, "--deep")
    assert found.code == 0, found.out
    assert found.out.count("whole (every byte was read)") == 5


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: d.__name__)
def test_damage_is_named(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], damage: Callable[[Path], None]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", cache)
    damage(cache)
    where, problem = DAMAGE[damage]
    found = svgpipe("verify", cache, "--deep")
    assert found.code == 1
    named = [line for line in found.out.splitlines() if problem in line]
    assert named, found.out
    assert where in named[0]


@pytest.mark.parametrize("damages", MENDED_TOGETHER, ids=lambda d: "+".join(one.__name__ for one in d))
def test_repair_restores_the_published_bytes(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], damages: list[Callable[[Path], None]]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", cache)
    everything = (*STORE, "manifest.json", "zarr.json", "plan.json", "rejected.jsonl")
    before = tree_bytes(cache, *everything)
    for damage in damages:
        damage(cache)
    (cache / "journal" / ".unit-000001.json.0123.partial").write_text("of a killed worker")
    mended = svgpipe("repair", cache)
    assert mended.code == 0, mended.err
    for damage in damages:
        assert DAMAGE[damage][1] in mended.out
    assert tree_bytes(cache, *everything) == before
    assert FeatureCache(cache).manifest.fingerprint == finished.cache.manifest.fingerprint
    assert not (cache / "manifest.before-repair.json").exists()
    assert svgpipe("verify", cache, "--deep").code == 0


def test_repair_computes_only_the_damaged_units(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", cache)
    times = {unit: unit_file(cache, unit).stat().st_mtime_ns for unit in range(5)}
    flip_data(cache)
    assert svgpipe("repair", cache).code == 0
    for unit in (0, 1, 3, 4):
        assert unit_file(cache, unit).stat().st_mtime_ns == times[unit]
    again = svgpipe("repair", cache)
    assert again.code == 0
    assert "repaired" not in again.out


def test_a_killed_repair_resumes(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """State after a kill: the damaged unit is forgotten, the manifest is moved aside, and nobody may read the cache."""
    cache = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", cache)
    (cache / "manifest.json").rename(cache / "manifest.before-repair.json")
    (cache / "journal" / "unit-000001.json").unlink()
    refused = svgpipe("train-diffusion", "--cache", cache, "--out", tmp_path / "model", "--recipe", "demo")
    assert refused.code == 1
    assert "begun and not finished" in refused.err
    assert "unfinished: 4 of 5 units" in svgpipe("verify", cache).out
    assert svgpipe("repair", cache).code == 0
    assert FeatureCache(cache).manifest.fingerprint == finished.cache.manifest.fingerprint


def test_a_repair_killed_before_its_first_change_starts_again(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", cache)
    shutil.copyfile(cache / "manifest.json", cache / "manifest.before-repair.json")
    before = tree_bytes(cache, *STORE)
    flip_data(cache)
    assert svgpipe("repair", cache).code == 0
    assert tree_bytes(cache, *STORE) == before
    # And one killed after everything was mended has only its last file to remove.
    shutil.copyfile(cache / "manifest.json", cache / "manifest.before-repair.json")
    assert svgpipe("repair", cache).code == 0
    assert not (cache / "manifest.before-repair.json").exists()


def test_repair_refuses_altered_images(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """Altered images would be rejected, and zeros would replace their features."""
    cache, shards = tmp_path / "cache", tmp_path / "shards"
    shutil.copytree(finished.root / "cache", cache)
    shutil.copytree(finished.root / "shards", shards)
    flip_data(cache)
    ref = ShardSet.open(shards).refs([8 * 2 + 3])[0]
    assert isinstance(ref.tar, Path)
    flip_bit(ref.tar, ref.offset + ref.size // 2)
    before = tree_bytes(cache, "**/*")
    found = svgpipe("repair", cache, "--shards", shards)
    assert found.code == 1
    assert "The tar was altered" in found.err
    assert tree_bytes(cache, "**/*") == before


def test_repair_refuses_inputs_other_than_those_of_the_cache(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", cache)
    flip_data(cache)
    before = tree_bytes(cache, "**/*")
    found = svgpipe("repair", cache, "--shards", f"{finished.root}/shards/shard-{{000001..000002}}.tar")
    assert found.code == 1
    assert "Repair needs the same inputs" in found.err
    manifest = (cache / "manifest.json").read_text().replace(str(finished.root / "shards"), "/nowhere/shards")
    (cache / "manifest.json").write_text(manifest)
    moved = svgpipe("repair", cache)
    assert moved.code == 1
    assert "If it was moved, give --shards" in moved.err
    assert tree_bytes(cache, "features/**/*", "journal/*") == {
        name: content for name, content in before.items() if name.startswith(("features/", "journal/"))
    }


@pytest.mark.parametrize(
    ("artifact", "file", "word"),
    [
        ("shards", "shard-000001.tar", "expected sha256"),
        ("shards", "shard-000002.parquet", "expected sha256"),
        ("autoencoder", "autoencoder.safetensors", "expected sha256"),
        ("diffusion", "ema-0.9.safetensors", "expected sha256"),
        ("evaluation", "report.json", "not the one that was published"),
        ("evaluation", "images/decoded-noise/shard-000000.tar", "expected sha256"),
        ("cache", "manifest.json", "altered"),
    ],
)
def test_one_bit_anywhere_is_found(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], artifact: str, file: str, word: str
) -> None:
    copy = tmp_path / artifact
    shutil.copytree(finished.root / artifact, copy)
    if file == "manifest.json":
        text = (copy / file).read_text()
        (copy / file).write_text(text.replace('"num_valid": 36', '"num_valid": 35'))
    else:
        flip_bit(copy / file, (copy / file).stat().st_size // 3 if file.endswith((".tar", ".safetensors")) else 2)
    found = svgpipe("verify", copy, "--deep")
    assert found.code == 1
    assert word in found.out, found.out


def test_a_number_that_is_not_finite_is_found(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Written by a tool that kept every checksum correct: only the values show it."""
    cache = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", cache)
    store = FeatureStore.open(cache)
    values = np.array(store.read_unit(0))
    values[1, 0, 2, 2, 5] = np.nan
    store.write_unit(0, values)
    found = svgpipe("verify", cache, "--deep")
    assert found.code == 1
    assert "unit 0: a feature is not finite" in found.out


def test_json_names_the_units(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(finished.root / "cache", cache)
    lose_shard(cache)
    found = svgpipe("verify", cache, "--json")
    assert found.code == 1
    findings = json.loads(found.out)[str(cache)]
    assert [finding["unit"] for finding in findings] == [4]
    assert svgpipe("verify", tmp_path / "nothing").code == 1
