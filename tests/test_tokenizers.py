"""The kinds of autoencoders beside svg: trained, killed, extracted, decoded and evaluated."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.manifest import read_json, write_json
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.reconstruction import ReconstructionReport
from svgpipe.models.kl_autoencoder import KLAutoencoder, Posterior
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.stages.images.decode import psnr
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.images.tensors import as_pixels, as_unit_range
from svgpipe.stages.networks.autoencoder import load_autoencoder, reconstruct
from svgpipe.stages.train_autoencoder.forward import KLForward, SVGForward

from .commands import run_and_kill
from .conftest import VAE_CHANNELS, Finished, Outcome

ODD = "autoencoder.image_size=30"


def train(shards: Path, out: Path, recipe: Path, *sets: str) -> list[object]:
    more = [part for item in sets for part in ("--set", item)]
    return ["train-autoencoder", "--shards", shards, "--out", out, "--recipe", recipe, *more]


def load_kl(autoencoder: Path) -> KLAutoencoder:
    model, _ = load_autoencoder(autoencoder)
    assert isinstance(model, KLAutoencoder)
    return model


@pytest.mark.parametrize("kind", ["kl", "aligned-kl"])
def test_the_cache_holds_the_posterior_of_every_image(vaes: Path, finished: Finished, kind: str) -> None:
    cache, model = FeatureCache(vaes / kind / "cache"), load_kl(vaes / kind / "autoencoder")
    assert (cache.manifest.distribution, cache.manifest.feature_shape) == ("gaussian", (4, 4, 2 * VAE_CHANNELS))
    rows = [3, 11, 30]
    images = as_unit_range(load_images(finished.shards, rows, 32))
    for view, shown in (("original", images), ("flip", images.flip(-1))):
        with torch.no_grad():
            posterior = model.posterior(shown)
        expected = torch.cat([posterior.mean, posterior.std], dim=1).permute(0, 2, 3, 1).numpy()
        found = cache.denormalize(cache.read(rows, view))
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


def test_drawn_latents_have_mean_0_and_std_1_on_the_calibration_images(vaes: Path) -> None:
    cache = FeatureCache(vaes / "kl" / "cache")
    stored = cache.read(cache.training_rows.tolist()).astype(np.float64).reshape(-1, 2 * VAE_CHANNELS)
    noise = np.random.default_rng(0).standard_normal((50, len(stored), VAE_CHANNELS))
    drawn = (stored[:, :VAE_CHANNELS] + stored[:, VAE_CHANNELS:] * noise).reshape(-1, VAE_CHANNELS)
    np.testing.assert_allclose(drawn.mean(0), 0, atol=0.3)  # calibrated on 16 of 30 images
    np.testing.assert_allclose(drawn.std(0), 1, atol=0.15)


def test_a_factor_replaces_the_measured_normalisation(
    vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    given = ["--shards", finished.root / "shards", "--autoencoder", vaes / "kl" / "autoencoder"]
    recipe = ["--recipe", vaes / "kl.yaml", "--set", "extract.factor=0.18215"]
    for dtype in ("float16", "int8"):
        out = tmp_path / dtype
        done = svgpipe("extract", *given, "--out", out, *recipe, "--store-dtype", dtype)
        assert done.code == 0, done.err
        cache, measured = FeatureCache(out), FeatureCache(vaes / "kl" / "cache")
        assert cache.channel_mean.tolist() == [0.0] * 2 * VAE_CHANNELS
        np.testing.assert_allclose(cache.channel_std, 1 / 0.18215, rtol=1e-6)
        expected = measured.denormalize(measured.read([0, 7])) * 0.18215
        np.testing.assert_allclose(cache.read([0, 7]), expected, atol=2e-3 if dtype == "float16" else 2e-2)


def test_losses_are_logged_and_the_vision_loss_changes_the_weights(
    vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    logged = [e for e in read_metrics(vaes / "aligned-kl" / "autoencoder" / "metrics.jsonl") if "l1" in e]
    assert len(logged) == 6 and all(e["kl"] > 0 and e["vision"] > 0 and e["vision_weight"] > 0 for e in logged)
    plain = [e for e in read_metrics(vaes / "kl" / "autoencoder" / "metrics.jsonl") if "l1" in e]
    assert all("vision" not in e for e in plain)
    # The same first reconstruction, because weights and draws are the same; then the gradients differ.
    assert plain[0]["l1"] == logged[0]["l1"] and plain[2]["l1"] != logged[2]["l1"]
    done = svgpipe(*train(finished.root / "shards", tmp_path / "off", vaes / "aligned-kl.yaml",
                          "autoencoder.vision_loss.weight=0"))  # fmt: skip
    assert done.code == 0, done.err
    off, same = (load_file(f / "autoencoder.safetensors") for f in (tmp_path / "off", vaes / "kl" / "autoencoder"))
    assert off.keys() == same.keys() and all(torch.equal(off[key], same[key]) for key in off)


def test_the_kl_divergence_counts(
    vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    change = ("autoencoder.kl.weight=1.0", "autoencoder.learning_rate=0.01", "autoencoder.steps=20")
    for name, sets in (("heavy", change), ("light", (*change, "autoencoder.kl.weight=0"))):
        assert svgpipe(*train(finished.root / "shards", tmp_path / name, vaes / "kl.yaml", *sets)).code == 0
    heavy, light = (
        [e["kl"] for e in read_metrics(tmp_path / n / "metrics.jsonl") if "kl" in e] for n in ("heavy", "light")
    )
    assert heavy[0] == light[0] and heavy[-1] < 0.7 * light[-1]


def test_noise_depends_on_seed_step_and_position(vaes: Path, finished: Finished) -> None:
    svg, _ = load_autoencoder(finished.root / "autoencoder")
    assert isinstance(svg, SVGAutoencoder)
    noised, channels = SVGForward(svg, noise=0.8), svg.channels
    assert len(SVGForward(svg).draws(1, 2, [3, 4], 32)) == 1
    for forward, count in ((KLForward(load_kl(vaes / "kl" / "autoencoder"), None), VAE_CHANNELS), (noised, channels)):
        *_, draws = forward.draws(1, 2, [3, 4], 32)
        assert draws.shape == (2, count, 4, 4)
        assert torch.equal(draws[1:], forward.draws(1, 2, [4], 32)[-1])
        for other in (forward.draws(2, 2, [3, 4], 32), forward.draws(1, 3, [3, 4], 32)):
            assert not torch.equal(draws, other[-1])
        assert not torch.equal(draws[0], draws[1])
    deviations = torch.cat([noised.draws(0, step, [0], 32)[1].std().reshape(1) for step in range(200)])
    assert deviations.max() < 0.85 and deviations.mean() == pytest.approx(0.4, abs=0.05)  # uniform in [0, 0.8]


def test_a_killed_training_ends_with_the_same_weights(
    vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Posterior noise, the projection to the vision model and its optimizer state are restored too."""
    out, arguments = tmp_path / "killed", train(finished.root / "shards", tmp_path / "killed", vaes / "aligned-kl.yaml")
    run_and_kill(arguments, (out / "checkpoints" / "latest.json").exists)
    resumed = svgpipe(*arguments)
    assert resumed.code == 0 and "resumed at step" in resumed.err, resumed.err
    whole, found = (load_file(f / "autoencoder.safetensors") for f in (vaes / "aligned-kl" / "autoencoder", out))
    assert all(torch.equal(whole[key], found[key]) for key in whole)


def test_a_vit_decoder_is_trained_in_place_of_the_convolutions(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """The adversarial loss finds its last layer; levels of the convolutions do not matter; images are complete."""
    out, sizes = tmp_path / "out", "autoencoder.decoder.vit={width: 32, depth: 2, heads: 2, mlp_width: 50}"
    changes = ("autoencoder.kind=vision", "autoencoder.decoder.ch_mult=[1]", sizes, "autoencoder.decoder_noise=0.8")
    done = svgpipe(*train(finished.root / "shards", out, finished.recipe_file, *changes))
    assert done.code == 0, done.err
    state = load_file(out / "autoencoder.safetensors")
    assert state["decoder.blocks.1.mlp.fc1.weight"].shape == (50, 32)
    assert state["decoder.pred.weight"].shape == (8 * 8 * 3, 32)
    entries = [e for e in read_metrics(out / "metrics.jsonl") if "l1" in e]
    assert entries[-1]["adaptive_weight"] > 0 and entries[-1]["discriminator"] > 0
    model, manifest = load_autoencoder(out)
    pixels = load_images(finished.shards, [3, 11], 32)
    rebuilt = reconstruct(model, pixels, 2)
    assert rebuilt.shape == pixels.shape and manifest.heldout_psnr is not None
    again = svgpipe(*train(finished.root / "shards", tmp_path / "odd", finished.recipe_file, *changes, ODD))
    assert again.code == 2 and "multiple of the backbone's 4x4 grid, found 30" in again.err


def test_samples_are_decoded_and_measured(
    vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    at = vaes / "kl"
    given = ["--diffusion", at / "diffusion", "--autoencoder", at / "autoencoder", "--out", tmp_path / "evaluation"]
    done = svgpipe(
        "sample-and-eval", *given, "--reference", finished.root / "shards", "--recipe", vaes / "kl.yaml",
        "--set", "evaluation.steps=[2]",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert (at / "diffusion" / "samples" / "step-00000012.png").exists()
    other = [str(a).replace("/kl/autoencoder", "/aligned-kl/autoencoder") for a in given]
    other[-1] = str(tmp_path / "other")
    wrong = svgpipe("sample-and-eval", *other, "--reference", finished.root / "shards", "--recipe", vaes / "kl.yaml")
    assert wrong.code == 1 and 'kind: "kl" there, "aligned-kl" here' in wrong.err


def test_reconstruction_decodes_the_mean(
    vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    encoder = vaes / "kl" / "autoencoder"
    change = ["--set", "reconstruction.extractor={kind: backbone}", "--set", "reconstruction.bootstrap=0"]
    change += ["--set", "reconstruction.noise=2"]  # one value of a list
    given = ["--autoencoder", encoder, "--shards", finished.root / "shards", "--recipe", vaes / "kl.yaml"]
    done = svgpipe("eval-reconstruction", *given, "--out", tmp_path / "out", *change)
    assert done.code == 0, done.err
    result, noised = ReconstructionReport.read(tmp_path / "out").results
    assert (result.noise, noised.noise, noised.residual) == (None, 2.0, None)
    heldout = np.flatnonzero(finished.shards.rows.heldout).tolist()
    pixels, model = load_images(finished.shards, heldout, 32), load_kl(encoder)
    with torch.no_grad():
        decoded = as_pixels(model.decode(model.posterior(as_unit_range(pixels)).mean))
    assert result.psnr is not None
    assert result.psnr.value == pytest.approx(psnr(pixels, decoded).mean(), abs=0.02)
    assert "The mean of the posterior is decoded." in (tmp_path / "out" / "report.html").read_text()


def test_the_cache_is_inspected_probed_and_analyzed(
    vaes: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    cache = vaes / "kl" / "cache"
    seen = svgpipe("inspect", cache, "--html", tmp_path / "cache.html")
    assert seen.code == 0 and "gaussian: means and standard deviations" in seen.out and "kl encoder" in seen.out
    page = (tmp_path / "cache.html").read_text()
    assert "Latent channels 0&ndash;2" in page and "Backbone" not in page
    assert "kl" in svgpipe("inspect", vaes / "kl" / "autoencoder").out
    probed = svgpipe("probe", cache)
    assert probed.code == 0 and "latent" in probed.out, probed.err
    analyzed = svgpipe("analyze", cache, "--diffusion", vaes / "kl" / "diffusion")
    assert analyzed.code == 0, analyzed.err
    assert svgpipe("verify", cache, "--deep").code == 0


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("kl", "autoencoder.image_size=36", ["stride of 8", "found 36"]),
        ("aligned-kl", "autoencoder.backbone.input_size=128", ["4x4 places", "8x8", "input_size"]),
        ("kl", "autoencoder.kl.channels=0", ["kl.channels"]),
        ("kl", "autoencoder.kind=vae", ["kind", "aligned-kl"]),
        ("kl", "autoencoder.decoder_noise=0.8", ["decoder_noise", "draws its latents from a posterior"]),
        ("kl", "autoencoder.decoder.vit={}", ["decoder.vit", "mirrors its encoder"]),
        ("kl", "autoencoder.decoder.vit.width=30", ["not divisible by heads 16"]),
        ("kl", "autoencoder.decoder_noise=0", ["decoder_noise", "greater than 0"]),
        ("kl", "reconstruction.noise=[0.4, 0.4]", ["no value twice"]),
        ("kl", "reconstruction.noise=[-1]", ["reconstruction.noise", "greater than 0"]),
        ("kl", "autoencoder.residual.enabled=false", ["residual.enabled", "autoencoder.kind: svg or vision now"]),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    vaes: Path,
    finished: Finished,
    tmp_path: Path,
    svgpipe: Callable[..., Outcome],
    kind: str,
    change: str,
    words: list[str],
) -> None:
    found = svgpipe(*train(finished.root / "shards", tmp_path / "out", vaes / f"{kind}.yaml", change))
    assert found.code == 2, found.err
    for word in words:
        assert word in found.err


def test_autoencoders_of_earlier_versions_are_read(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """They have `residual.enabled` instead of `kind`."""
    old = tmp_path / "autoencoder"
    old.mkdir()
    for file in (finished.root / "autoencoder").iterdir():
        if file.is_file():
            (old / file.name).write_bytes(file.read_bytes())
    raw = read_json(old / "manifest.json")
    del raw["posterior_channels"]
    for name in ("kind", "kl", "vision_loss"):
        del raw["config"][name]
    raw["config"]["residual"]["enabled"] = True
    sealed = AutoencoderManifest.model_validate(raw).sealed()
    write_json(old / "manifest.json", {**raw, "fingerprint": sealed.fingerprint})
    assert json.dumps(sealed.config) != json.dumps(sealed.section.model_dump(mode="json"))
    assert load_autoencoder(old)[0].can_encode
    again = svgpipe(*train(finished.root / "shards", old, finished.recipe_file))
    assert again.code == 0, again.err
    without = {**raw["config"], "residual": {**raw["config"]["residual"], "enabled": False}}
    assert AutoencoderManifest.upgraded(without)["kind"] == "vision"
    changed = svgpipe(*train(finished.root / "shards", old, finished.recipe_file, "autoencoder.kind=vision"))
    assert changed.code == 1 and 'kind: "svg" there, "vision" here' in changed.err


def test_log_variances_are_clamped() -> None:
    posterior = Posterior.of(torch.tensor([0.0, 1e4]).view(1, 2, 1, 1))
    assert posterior.log_variance.item() == 20 and torch.isfinite(posterior.divergence()).all()
