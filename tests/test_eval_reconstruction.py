"""`svgpipe eval-reconstruction`: its metrics against other implementations, and the command on a real autoencoder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from skimage.metrics import peak_signal_noise_ratio

from svgpipe.manifests.evaluation_section import ReconstructionSection
from svgpipe.manifests.reconstruction import ReconstructionReport
from svgpipe.manifests.shards import ShardSet
from svgpipe.models.losses import LPIPS
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.pipeline.reconstruction_page import _spread_over_classes
from svgpipe.stages.evaluate import compare_images
from svgpipe.stages.evaluate import reconstruction as stage
from svgpipe.stages.evaluate.decode_latents import decoded_images
from svgpipe.stages.images.decode import RGBArray
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.images.tensors import as_unit_range
from svgpipe.stages.networks.autoencoder import load_autoencoder, reconstruct
from svgpipe.stages.networks.backbone import state_digest
from svgpipe.stages.runtime.progress import Silent
from svgpipe.stages.runtime.runner import LocalRunner

from .conftest import Finished, Outcome

SETTINGS = ["--set", "reconstruction.extractor.kind=backbone", "--set", "reconstruction.unit_rows=4"]
NOISE = ("noise-0.2", "noise-1")  # sets with noise on the latents
SETTINGS += ["--set", "reconstruction.noise=[0.2, 1]"]


def arguments(finished: Finished, out: Path, *more: object) -> list[object]:
    return [
        "eval-reconstruction",
        *("--autoencoder", finished.root / "autoencoder"),
        *("--shards", finished.root / "shards"),
        *("--out", out),
        *SETTINGS,
        *more,
    ]


@pytest.fixture(scope="module")
def evaluated(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from svgpipe.pipeline.cli import main

    out = tmp_path_factory.mktemp("reconstruction") / "evaluation"
    assert main([str(a) for a in arguments(finished, out)]) == 0
    return out


def heldout_pixels(finished: Finished) -> RGBArray:
    shards = finished.shards
    rows = np.flatnonzero(shards.rows.heldout & ~shards.rows.rejected)
    return load_images(shards, [int(row) for row in rows], 32)


def test_both_reconstructions_equal_the_autoencoders(evaluated: Path, finished: Finished) -> None:
    model, _ = load_autoencoder(finished.root / "autoencoder")
    pixels = heldout_pixels(finished)
    for name, residual in (("reconstructions", True), ("without-residual", False)):
        found = decoded_images(evaluated, name)
        expected = reconstruct(model, pixels, 5, residual=residual)
        stored = np.stack([found.pixels(i) for i in range(len(found))])
        assert stored.shape == expected.shape == pixels.shape
        assert np.abs(stored.astype(int) - expected.astype(int)).max() <= 1


def test_residual_off_replaces_the_residual_by_the_mask_token(finished: Finished) -> None:
    model, _ = load_autoencoder(finished.root / "autoencoder")
    assert isinstance(model, SVGAutoencoder)
    images = as_unit_range(heldout_pixels(finished)[:2])
    with torch.no_grad():
        on, off = model.encode(images), model.encode_without_residual(images)
        expected = model.alignment(on[:, :112], model.mask_token.expand(2, -1, 4, 4)) if model.alignment else None
    frozen = model.backbone.channels
    torch.testing.assert_close(on[:, :frozen], off[:, :frozen])
    assert expected is not None
    torch.testing.assert_close(off[:, frozen:], expected)
    assert not torch.allclose(on[:, frozen:], off[:, frozen:])


def test_reconstruction_metrics_equal_scikit_image_and_count_their_images(evaluated: Path, finished: Finished) -> None:
    report = ReconstructionReport.read(evaluated)
    pixels = heldout_pixels(finished)
    assert [r.name for r in report.results] == ["reconstructions", "without-residual", *NOISE]
    for result in report.results:
        images = decoded_images(evaluated, result.name)
        psnr = [peak_signal_noise_ratio(p, images.pixels(i), data_range=255) for i, p in enumerate(pixels)]
        assert result.psnr is not None and result.psnr.value == pytest.approx(np.mean(psnr))
        assert result.psnr.num_images == len(pixels) == report.num_images
        assert 0 < result.ssim.value < 1 and result.colour_difference.value > 0
        assert result.ssim.low is not None and result.ssim.low <= result.ssim.value
        assert result.lpips is None
    assert any("LPIPS" in reason and "vgg_weights=FILE" in reason for reason in report.not_measured)
    assert "not FID" in report.metric


def test_lpips_of_given_weights_is_measured(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """The published files are not available here: two with the same layout and random weights replace them."""
    torch.manual_seed(0)
    vgg = torchvision.models.vgg16(weights=None).features
    torch.save({f"features.{key}": value for key, value in vgg.state_dict().items()}, tmp_path / "vgg.pth")
    lins = {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1) for i, width in enumerate((64, 128, 256, 512, 512))}
    torch.save(lins, tmp_path / "lpips.pth")
    files = {"vgg_weights": tmp_path / "vgg.pth", "lpips_weights": tmp_path / "lpips.pth"}
    options = [text for key, file in files.items() for text in ("--set", f"reconstruction.{key}={file}")]
    out = tmp_path / "out"
    found = svgpipe(*arguments(finished, out, *options, "--pool", finished.root))
    assert found.code == 0, found.err
    report = ReconstructionReport.read(out)
    assert not [reason for reason in report.not_measured if "LPIPS" in reason]
    pixels, model = heldout_pixels(finished), LPIPS()
    model.load(torch.load(files["vgg_weights"]), lins)
    for result in report.results:
        images = decoded_images(out, result.name)
        pairs = ((p, images.pixels(i)) for i, p in enumerate(pixels))
        expected = [
            float(model(*(torch.from_numpy(x.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for x in pair)))
            for pair in pairs
        ]
        assert result.lpips is not None and result.lpips.value == pytest.approx(np.mean(expected), rel=1e-4)
        assert result.lpips.low is not None and result.lpips.num_images == len(pixels)
    assert report.lpips_weights == state_digest(model.state_dict())
    assert "LPIPS" in (out / "report.html").read_text()


def test_batch_and_unit_sizes_do_not_change_results(
    evaluated: Path, finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    out = tmp_path / "other"
    more = ("--set", "reconstruction.batch_size=3", "--set", "reconstruction.unit_rows=5")
    assert svgpipe(*arguments(finished, out, *more)).code == 0
    for one, two in zip(
        ReconstructionReport.read(evaluated).results, ReconstructionReport.read(out).results, strict=True
    ):
        for name in ("psnr", "ssim", "colour_difference", "frechet_distance"):
            assert getattr(two, name).value == pytest.approx(getattr(one, name).value, rel=1e-3)


def test_noise_on_the_latents_has_the_deviation_of_each_channel(
    evaluated: Path, finished: Finished, tmp_path: Path
) -> None:
    report = ReconstructionReport.read(evaluated)
    assert [result.noise for result in report.results] == [None, None, 0.2, 1.0]
    sets = [decoded_images(evaluated, name) for name in ("reconstructions", *NOISE)]
    plain, *noised = (np.stack([images.pixels(i) for i in range(len(images))]).astype(np.float64) for images in sets)
    little, much = (np.abs(images - plain).mean() for images in noised)  # this decoder is hardly trained
    assert 0 < 2 * little < much
    config = ReconstructionSection(noise=(0.5,))
    plan = stage.ReconstructionPlan.resolve(finished.root / "autoencoder", finished.shards, tmp_path, config, None)
    model, _ = load_autoencoder(finished.root / "autoencoder")
    with torch.inference_mode():
        latents = model.encode(as_unit_range(heldout_pixels(finished)))
    deviation = latents.transpose(0, 1).flatten(1).double().std(dim=1, correction=0)
    found = stage._deviation(plan, LocalRunner(), Silent())
    np.testing.assert_allclose(found, deviation, rtol=1e-4)
    np.testing.assert_array_equal(stage._deviation(plan, LocalRunner(), Silent()), found)  # of the journal
    robust = finished.recipe.autoencoder.model_copy(update={"decoder_noise": 0.8})
    encoder = plan.encoder.model_copy(update={"config": robust.model_dump(mode="json")})
    assert replace(plan, encoder=encoder, config=ReconstructionSection()).noise == (0.4,)


def test_the_page_shows_originals_and_both(evaluated: Path, finished: Finished) -> None:
    html = (evaluated / "report.html").read_text()
    assert html.count("data:image/webp") == 5 * len(finished.shards.usable("heldout"))  # fewer than eight: all of them
    assert "<script" not in html and "residual off" in html and "noise 0.2" in html and 'href="#p1-1"' in html


def test_a_kind_without_residual_encoder_has_one_set(
    finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    made = ["--shards", finished.root / "shards", "--out", tmp_path / "autoencoder", "--recipe", finished.recipe_file]
    change = ["--set", "autoencoder.steps=1", "--set", "autoencoder.kind=vision"]
    assert svgpipe("train-autoencoder", *made, *change).code == 0
    given = arguments(finished, tmp_path / "out")
    given[given.index("--autoencoder") + 1] = tmp_path / "autoencoder"
    done = svgpipe(*given)
    assert done.code == 0, done.err
    report = ReconstructionReport.read(tmp_path / "out")
    assert [(r.name, r.residual) for r in report.results] == [(name, None) for name in ("reconstructions", *NOISE)]
    assert "residual on" not in done.out and "residual off" not in done.out


def test_overview_columns_use_the_classes_present() -> None:
    labels = np.array([0, 0, 0, 1, 1, 2])
    assert _spread_over_classes(labels, 8) == [0, 1, 2, 3, 4, 5]
    assert _spread_over_classes(labels, 4) == [0, 1, 3, 5]  # one of each, then more of the first
    assert _spread_over_classes(labels, 2) == [0, 5]
    assert _spread_over_classes(np.zeros(20, np.int64), 8) == list(range(8))


def test_decoded_and_measured_images_are_reused(
    evaluated: Path,
    finished: Finished,
    svgpipe: Callable[..., Outcome],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """State after a kill: some units of both phases are recorded, nothing is published."""
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    for name in ("manifest.json", "report.json", "report.html"):
        (out / name).unlink()
    (out / "journal" / "decode" / "without-residual-000001.json").unlink()
    (out / "journal" / "measure" / "unit-000002.json").unlink()
    looked: list[int] = []

    def compare(*given: object) -> dict[str, float]:
        looked.append(1)
        return original(*given)  # type: ignore[arg-type]

    original = compare_images.compare
    monkeypatch.setattr(compare_images, "compare", compare)
    shutil.copytree(evaluated.parent / "features", tmp_path / "features")  # but no decoded tars to be found
    found = svgpipe(*arguments(finished, out))
    assert found.code == 0 and "(7 done before)" in found.err
    assert len(looked) == 4  # images of a unit
    assert (out / "report.json").read_bytes() == (evaluated / "report.json").read_bytes()


def test_a_second_run_finds_the_reconstruction_finished_and_it_verifies(
    evaluated: Path, finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    before = (evaluated / "report.json").read_bytes()
    again = svgpipe(*arguments(finished, evaluated))
    assert again.code == 0 and "residual off" in again.out and (evaluated / "report.json").read_bytes() == before
    assert svgpipe(*arguments(finished, evaluated, "--set", "reconstruction.batch_size=1")).code == 0
    other = svgpipe(*arguments(finished, evaluated, "--set", "reconstruction.seed=1"))
    assert other.code == 1 and "seed" in other.err
    copy = tmp_path / "copy"
    shutil.copytree(evaluated, copy)
    assert svgpipe("verify", copy, "--deep").code == 0
    found = json.loads(svgpipe("inspect", copy, "--json").out)
    assert "reconstructions" in json.dumps(found)
    tar = next((copy / "images" / "reconstructions").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:-512])
    damaged = svgpipe("verify", copy)
    assert damaged.code == 1 and tar.name in damaged.out


def test_invalid_evaluations_are_refused(
    finished: Finished, photographs: Path, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    recipe = ("--recipe", finished.recipe_file)
    assert svgpipe("shard", photographs, "--out", tmp_path / "shards", *recipe, "--holdout", "0").code == 0
    assert not ShardSet.open(tmp_path / "shards").usable("heldout")
    given = arguments(finished, tmp_path / "out")
    given[given.index("--shards") + 1] = tmp_path / "shards"
    none = svgpipe(*given)
    assert none.code == 2 and "--holdout" in none.err
    named = svgpipe(*arguments(finished, tmp_path / "out", "--set", "reconstruction.vgg_weights=gone.pth"))
    assert named.code == 1 and "gone.pth" in named.err
