"""`svgpipe extract --vision-from`: vision features of another cache give the bytes of a whole extraction."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import Tensor

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.journal import Journal
from svgpipe.models.backbone import Backbone
from svgpipe.pipeline.cli import main

from .conftest import STORE, Finished, Outcome, extract_args, tree_bytes


def make_vision(finished: Finished, root: Path, *changes: str) -> None:
    """Train an autoencoder of kind vision on the shards of `finished`, and extract its cache."""
    every = ("autoencoder.kind=vision", "autoencoder.steps=1", *changes)
    sets = [part for change in every for part in ("--set", change)]
    shards, recipe = ["--shards", finished.root / "shards"], ["--recipe", finished.recipe_file]
    trained = ["train-autoencoder", *shards, "--out", root / "autoencoder", *recipe, *sets]
    extracted = ["extract", *shards, "--autoencoder", root / "autoencoder", "--out", root / "cache", *recipe]
    for arguments in (trained, extracted):
        assert main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def vision(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Autoencoder and cache of kind vision, with the vision model of `finished`."""
    root = tmp_path_factory.mktemp("vision")
    make_vision(finished, root)
    return root


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that the vision model encodes."""
    seen: list[int] = []
    forward = Backbone.forward

    def counted(self: Backbone, images: Tensor) -> Tensor:
        seen.append(len(images))
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", counted)
    return seen


def test_the_cache_is_the_same_and_the_vision_model_does_not_run(
    finished: Finished, vision: Path, tmp_path: Path, svgpipe: Callable[..., Outcome], encoded: list[int]
) -> None:
    done = svgpipe(*extract_args(finished, tmp_path / "svg", "--vision-from", vision / "cache"))
    assert done.code == 0, done.err
    assert "vision features are copied from" in done.err
    assert not encoded
    copied, whole = FeatureCache(tmp_path / "svg"), finished.cache
    assert copied.manifest.fingerprint == whole.manifest.fingerprint
    assert tree_bytes(tmp_path / "svg", *STORE) == tree_bytes(finished.root / "cache", *STORE)
    assert "copied from" in svgpipe("inspect", tmp_path / "svg").out
    # The other way round nothing is computed.
    given = ["--shards", finished.root / "shards", "--autoencoder", vision / "autoencoder"]
    again = ["--recipe", finished.recipe_file, "--vision-from", finished.root / "cache"]
    assert svgpipe("extract", *given, "--out", tmp_path / "vision", *again).code == 0
    assert not encoded and tree_bytes(tmp_path / "vision", *STORE) == tree_bytes(vision / "cache", *STORE)


def test_the_cache_is_the_same_in_bfloat16(
    finished: Finished, vision: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    given = ["--shards", finished.root / "shards", "--recipe", finished.recipe_file]
    imitated = ["--set", "extract.precision=bfloat16"]
    source = ["--autoencoder", vision / "autoencoder", "--out", tmp_path / "vision"]
    assert svgpipe("extract", *given, *source, *imitated).code == 0
    for name, more in (("whole", []), ("copied", ["--vision-from", tmp_path / "vision"])):
        assert svgpipe(*extract_args(finished, tmp_path / name, *imitated, *more)).code == 0
    assert tree_bytes(tmp_path / "copied", *STORE) == tree_bytes(tmp_path / "whole", *STORE)


def test_a_resume_may_go_on_without_the_other_cache(
    finished: Finished, vision: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out, source = tmp_path / "svg", ["--vision-from", vision / "cache"]
    assert svgpipe(*extract_args(finished, out, *source)).code == 0
    before = tree_bytes(out, *STORE)

    def interrupt() -> None:
        for name in ("manifest.json", "journal/unit-000001.json"):
            (out / name).unlink()

    interrupt()
    resumed = svgpipe(*extract_args(finished, out))
    assert resumed.code == 0, resumed.err
    assert tree_bytes(out, *STORE) == before
    # Begun with other statistics, for example on another device, it goes on without the other cache only.
    interrupt()
    entry = Journal(out).read("calibration")
    Journal(out).record("calibration", {**entry, "mean": [entry["mean"][0] + 1e-3, *entry["mean"][1:]]})
    refused = svgpipe(*extract_args(finished, out, *source))
    assert refused.code == 1 and "with other numbers than the extraction that was begun" in refused.err


def test_other_vision_features_are_refused(
    finished: Finished, vision: Path, vaes: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    def refused(source: Path, *options: object) -> Outcome:
        found = svgpipe(*extract_args(finished, tmp_path / "out", "--vision-from", source, *options))
        assert not (tmp_path / "out" / "features").exists() and "Traceback" not in found.err
        return found

    other = refused(vision / "cache", "--set", "extract.calibration_images=9")
    assert other.code == 1 and "extract.calibration_images: 16 there, 9 here" in other.err
    assert "Extract without it" in other.err
    small = refused(vision / "cache", "--store-dtype", "int8")
    assert small.code == 2 and "only float16 caches share them" in small.err
    latents = refused(vaes / "kl" / "cache")
    assert latents.code == 1 and "expected a cache of kind svg or vision" in latents.err
    missing = refused(tmp_path / "none")
    assert missing.code == 1 and "none: expected a feature cache" in missing.err
    compiled = refused(vision / "cache", "--set", "extract.compile=true")
    assert compiled.code == 2 and "needs extract.compile=false" in compiled.err
    for name, source, dtype in (("int8", vision / "cache", "int8"), ("float16", tmp_path / "int8", "float16")):
        assert svgpipe("requantize", source, "--out", tmp_path / name, "--store-dtype", dtype).code == 0
    rounded = refused(tmp_path / "float16")
    assert rounded.code == 1 and "was requantized" in rounded.err
    given = ["--shards", finished.root / "shards", "--autoencoder", vaes / "kl" / "autoencoder"]
    vae = svgpipe(
        "extract", *given, "--out", tmp_path / "kl", "--recipe", vaes / "kl.yaml", "--vision-from", vision / "cache"
    )
    assert vae.code == 2 and "kind kl does not encode with them" in vae.err


def test_weights_of_the_vision_model_are_compared(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    make_vision(finished, tmp_path, "autoencoder.backbone.weights=random")
    found = svgpipe(*extract_args(finished, tmp_path / "out", "--vision-from", tmp_path / "cache"))
    assert found.code == 1 and "They differ in:\n  backbone_weights: " in found.err
    # Another autoencoder in the place of the one that made the cache says nothing about the cache.
    shutil.rmtree(tmp_path / "autoencoder")
    shutil.copytree(finished.root / "autoencoder", tmp_path / "autoencoder")
    found = svgpipe(*extract_args(finished, tmp_path / "out", "--vision-from", tmp_path / "cache"))
    assert found.code == 1 and "is not the autoencoder that made it any more" in found.err


def test_rows_that_were_rejected_there_have_no_features(
    finished: Finished, vision: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    shutil.copytree(vision, tmp_path / "vision")
    cache = tmp_path / "vision" / "cache"
    valid = FeatureCache(cache).valid.copy()
    valid[3] = False
    FeatureCache(cache).store.put("valid", valid, "sample")
    found = svgpipe(*extract_args(finished, tmp_path / "out", "--vision-from", cache))
    assert found.code == 1 and "row 3 was rejected there, but can be decoded now" in found.err
