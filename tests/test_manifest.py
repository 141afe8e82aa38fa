"""Manifests: identity, atomic writes, refusal of mismatching inputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svgpipe.manifests.cache_manifest import CacheManifest
from svgpipe.manifests.checkpoint import save_tensors
from svgpipe.manifests.errors import ArtifactError, MismatchError
from svgpipe.manifests.filesystem import write_atomic
from svgpipe.manifests.manifest import (
    InputRef,
    Json,
    canonical_json,
    differing_fields,
    read_json,
    require_same,
    write_json,
)
from svgpipe.manifests.shards import ShardFile, ShardSetManifest
from svgpipe.manifests.workdir import StageSpec, WorkDir

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


def example(**changes: Any) -> ShardSetManifest:
    shards = [
        ShardFile(name="shard-000000.tar", split="train", num_images=3, num_bytes=10, sha256="ab", index_sha256="cd")
    ]
    fields: dict[str, Any] = {
        "config": {"seed": 0},
        "class_names": ["a"],
        "num_inputs": 3,
        "num_images": 3,
        "num_rejected": 0,
        "num_heldout": 0,
        "content": ShardSetManifest.content_of(shards),
        "shards": shards,
    }
    return ShardSetManifest(**{**fields, **changes})


@given(st.dictionaries(st.text(), JSON))
def test_canonical_json_ignores_order_and_reads_back(value: dict[str, Any]) -> None:
    shuffled = dict(reversed(value.items()))
    assert canonical_json(shuffled) == canonical_json(value)
    assert json.loads(canonical_json(value)) == value


@given(JSON, JSON)
def test_differing_fields_is_empty_exactly_for_equal_values(a: Any, b: Any) -> None:
    assert (not differing_fields({"x": a}, {"x": b})) == (a == b)


def test_round_trip(tmp_path: Path) -> None:
    written = example().publish(tmp_path)
    assert ShardSetManifest.read(tmp_path) == written


def test_fingerprint_covers_content_and_config_but_not_times() -> None:
    first = example().sealed().fingerprint
    assert example(finished_at="another day", seconds=3.0, svgpipe_version="9").sealed().fingerprint == first
    assert example(config={"seed": 1}).sealed().fingerprint != first
    assert example(content="other").sealed().fingerprint != first
    origin = InputRef(kind="image-folder", fingerprint="f", path="p", config={})
    assert example(inputs={"source": origin}).sealed().fingerprint != first
    moved = origin.model_copy(update={"path": "elsewhere"})
    assert (
        example(inputs={"source": moved}).sealed().fingerprint
        == example(inputs={"source": origin}).sealed().fingerprint
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_images": 4}, "altered after it was written"),
        ({"schema_version": 99}, "schema 1 or older, found 99"),
        ({"kind": "feature-cache"}, "expected a shard set"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_damaged_or_foreign_manifests_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    example().publish(tmp_path)
    path = tmp_path / "manifest.json"
    write_json(path, {**read_json(path), **change})
    with pytest.raises(ArtifactError, match=message):
        ShardSetManifest.read(tmp_path)


def test_missing_unfinished_and_unparsable_manifests(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such directory"):
        ShardSetManifest.read(tmp_path / "none")
    WorkDir(StageSpec(tmp_path / "begun", ShardSetManifest, {}, {})).close()
    with pytest.raises(ArtifactError, match=r"begun and not finished.*resumes"):
        ShardSetManifest.read(tmp_path / "begun")
    (tmp_path / "begun" / "manifest.json").write_text("{")
    with pytest.raises(ArtifactError, match="expected JSON"):
        ShardSetManifest.read(tmp_path / "begun")


def test_options_that_do_not_change_results_may_change_at_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardSetManifest, "MAY_CHANGE", frozenset({"batch_size"}))
    WorkDir(StageSpec(tmp_path, ShardSetManifest, {"seed": 0, "batch_size": 8}, {})).close()
    (tmp_path / "shard-000000.tar").write_text("hours of work")
    with WorkDir(StageSpec(tmp_path, ShardSetManifest, {"seed": 0, "batch_size": 2}, {})) as work:
        assert work.finished is None and work.spec.config["batch_size"] == 2
    for config in ({"seed": 1, "batch_size": 8}, {"seed": 0, "batch_size": 8, "more": 1}):
        with pytest.raises(MismatchError) as refused:
            WorkDir(StageSpec(tmp_path, ShardSetManifest, config, {}))
        assert "batch_size" not in str(refused.value)
    done = example(config={"seed": 0, "batch_size": 2}).publish(tmp_path)
    assert WorkDir(StageSpec(tmp_path, ShardSetManifest, {"seed": 0, "batch_size": 1}, {})).finished == done


def test_partial_files_of_killed_writers_are_removed_at_start_and_at_publishing(tmp_path: Path) -> None:
    """Metadata of a store, units and journal records, in any folder below."""
    out = tmp_path / "out"
    left = [out / ".plan.json.0.partial", out / "features" / ".zarr.json.0.partial"]
    WorkDir(StageSpec(out, ShardSetManifest, {}, {})).close()

    def leave() -> None:
        for path in left:
            path.parent.mkdir(exist_ok=True)
            path.write_text("{")

    leave()
    with WorkDir(StageSpec(out, ShardSetManifest, {}, {})) as work:
        assert not any(path.exists() for path in left)
        leave()
        work.publish(example(config={}, inputs={}))
    assert not any(path.exists() for path in left)


def test_a_work_directory_resumes_its_own_work_only(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ref = InputRef(kind="image-folder", fingerprint="one", path="p", config={})
    with WorkDir(StageSpec(out, ShardSetManifest, {"seed": 3}, {"source": ref})) as work:
        assert work.finished is None
    # No work was done under this plan, so another one may replace it.
    (out / ".plan.json.123.partial").write_text("{")
    with WorkDir(StageSpec(out, ShardSetManifest, {"seed": 0}, {"source": ref})) as work:
        assert work.finished is None
    (out / "shard-000000.tar").write_text("hours of work")
    with WorkDir(StageSpec(out, ShardSetManifest, {"seed": 0}, {"source": ref})) as work:
        assert work.finished is None
    with pytest.raises(MismatchError, match=r"config\.seed: 0 there, 1 here"):
        WorkDir(StageSpec(out, ShardSetManifest, {"seed": 1}, {"source": ref}))
    other = ref.model_copy(update={"fingerprint": "two"})
    with pytest.raises(MismatchError, match=r'inputs\.source: "one" there, "two" here'):
        WorkDir(StageSpec(out, ShardSetManifest, {"seed": 0}, {"source": other}))
    done = example(config={"seed": 0}, inputs={"source": ref}).publish(out)
    assert WorkDir(StageSpec(out, ShardSetManifest, {"seed": 0}, {"source": ref})).finished == done
    with pytest.raises(MismatchError, match=done.fingerprint[:12]):
        WorkDir(StageSpec(out, ShardSetManifest, {"seed": 1}, {"source": ref}))


def test_a_key_that_a_later_version_adds_does_not_refuse_older_work(tmp_path: Path) -> None:
    def state(config: Json) -> str:
        return StageSpec(tmp_path, ShardSetManifest, config, {}).state()[0]

    old = {"seed": 0, "model": {"width": 3}}
    with WorkDir(StageSpec(tmp_path, ShardSetManifest, old, {})):
        (tmp_path / "shard-000000.tar").write_text("hours of work")
    for finished in (False, True):
        if finished:
            example(config=old).publish(tmp_path)
        assert state({**old, "added": None, "model": {"width": 3, "flag": False}}) in ("begun", "finished")
        for changed in ({**old, "added": 0}, {**old, "model": {"width": 3, "flag": True}}, {"seed": 0}):
            with pytest.raises(MismatchError):
                state(changed)


def test_a_manifest_field_that_was_added_keeps_old_fingerprints() -> None:
    fields = {name: field for name, field in CacheManifest.model_fields.items() if name in CacheManifest.ADDED}
    assert set(fields) == {"distribution"}
    values = {
        "num_samples": 1,
        "num_valid": 1,
        "num_rejected": 0,
        "num_heldout": 0,
        "feature_shape": (1, 1, 2),
        "frozen_channels": 2,
        "views": ["original"],
        "unit_rows": 1,
        "class_names": ["a"],
        "backbone": "b",
        "backbone_weights": "w",
        "content": "c",
        "num_bytes": 1,
    }
    manifest = CacheManifest.model_validate(values)
    assert "distribution" not in manifest.identity()
    gaussian = CacheManifest.model_validate(values | {"distribution": "gaussian"})
    assert gaussian.sealed().fingerprint != manifest.sealed().fingerprint


def test_a_work_directory_refuses_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ArtifactError, match="not svgpipe's"):
        WorkDir(StageSpec(tmp_path, ShardSetManifest, {}, {}))
    with pytest.raises(ArtifactError, match="found a file"):
        WorkDir(StageSpec(tmp_path / "thesis.tex", ShardSetManifest, {}, {}))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_mismatching_inputs_are_reported_with_their_lineage(tmp_path: Path) -> None:
    source = InputRef(kind="image-folder", fingerprint="one", path="p", config={"files": 3})
    mine = example(inputs={"source": source}).sealed()
    ref = mine.as_input(tmp_path / "mine")
    require_same("here", ref, mine.as_input(tmp_path), what_to_do="")
    other = example(
        inputs={"source": source.model_copy(update={"fingerprint": "two", "config": {"files": 4}})}, config={"seed": 5}
    ).sealed()
    with pytest.raises(MismatchError) as caught:
        require_same("here", ref, other.as_input(tmp_path / "other"), what_to_do="Do this.")
    text = str(caught.value)
    for word in (
        mine.fingerprint[:12],
        other.fingerprint[:12],
        "config.seed",
        "inputs.source.config.files",
        "Do this.",
    ):
        assert word in text


def test_write_atomic_leaves_old_or_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("pulled plug")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="pulled plug"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old"


def test_weight_files_have_the_usual_file_mode(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    save_tensors(tmp_path / "weights.safetensors", {"w": torch.zeros(2)})
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
