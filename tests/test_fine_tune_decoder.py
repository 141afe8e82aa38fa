"""Fine-tuning of a decoder on cached latents: the encoder stays, is never run, and the result decodes and encodes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.manifests.model_manifests import AutoencoderManifest, encoder_of
from svgpipe.models.backbone import Backbone
from svgpipe.models.svg_autoencoder import SVGAutoencoder
from svgpipe.stages.images.decode import psnr
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.images.tensors import as_unit_range
from svgpipe.stages.networks.autoencoder import load_autoencoder, load_decoder, reconstruct
from svgpipe.stages.train_autoencoder.decoder_source import DecoderSource
from svgpipe.stages.train_autoencoder.forward import CachedForward, KLForward, SVGForward

from .commands import run_and_kill
from .conftest import Finished, Outcome, extract_args, tree_bytes

NOISE = ("--set", "autoencoder.decoder_noise=0.8", "--set", "autoencoder.flip=true")
# The loss of the tiny recipe uses the vision model; this is the same without any.
NO_VISION = ("--set", "autoencoder.perceptual.weight=0")


def arguments(finished: Finished, out: Path, *more: object, of: Path | None = None) -> list[object]:
    """Fine-tune the decoder of the finished SVG autoencoder, or of another one."""
    at = of or finished.root
    sources = ["--decoder-only", "--from", at / "autoencoder", "--cache", at / "cache"]
    shards = ["--shards", finished.root / "shards", "--recipe", finished.recipe_file, "--out", out]
    return ["train-autoencoder", *sources, *shards, *more]


@pytest.fixture(scope="session")
def tuned(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The decoder of the SVG autoencoder, trained on with noise, without a vision model in the losses."""
    from svgpipe.pipeline.cli import main

    out = tmp_path_factory.mktemp("tuned") / "decoder"
    assert main([str(a) for a in arguments(finished, out, *NOISE, *NO_VISION)]) == 0
    return out


def test_only_the_decoder_changes(finished: Finished, tuned: Path) -> None:
    before, after = (load_file(f / "autoencoder.safetensors") for f in (finished.root / "autoencoder", tuned))
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert {key for key in before if key.startswith("decoder.") and key.endswith("weight")} <= changed
    assert all(key.startswith("decoder.") for key in changed)
    ours, theirs = AutoencoderManifest.read(tuned), AutoencoderManifest.read(finished.root / "autoencoder")
    assert (ours.alignment, ours.grid) == (theirs.alignment, theirs.grid)
    assert encoder_of(ours.as_input(tuned)) == theirs.fingerprint
    assert (ours.steps, ours.config["crop"], ours.config["flip"]) == (6, "centre", True)
    assert ours.fingerprint != theirs.fingerprint


def test_the_vision_model_is_not_built(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the vision model was built")

    monkeypatch.setattr(Backbone, "__init__", refuse)
    done = svgpipe(*arguments(finished, tmp_path / "out", *NO_VISION))
    assert done.code == 0, done.err


def test_held_out_psnr_is_that_of_the_whole_autoencoder(finished: Finished, tuned: Path) -> None:
    """It decodes cached float16 latents; encoding the images anew gives the same to a hundredth of a dB."""
    model, manifest = load_autoencoder(tuned)
    rows = np.flatnonzero(finished.shards.rows.heldout)
    pixels = load_images(finished.shards, [int(rows[i]) for i in np.linspace(0, 5, 4).round().astype(int)], 32)
    assert manifest.heldout_psnr == pytest.approx(psnr(pixels, reconstruct(model, pixels, 3)).mean(), abs=0.02)
    assert [e["step"] for e in read_metrics(tuned / "metrics.jsonl") if "heldout_psnr" in e] == [3, 6]


@pytest.mark.parametrize("kind", ["svg", "kl"])
def test_a_step_decodes_what_encoding_would_give(finished: Finished, vaes: Path, kind: str) -> None:
    """Same decoder, same noise: the reconstruction from the cache equals that from the images, flipped or not."""
    at = finished.root if kind == "svg" else vaes / "kl"
    source = DecoderSource.open(at / "autoencoder", FeatureCache(at / "cache"), finished.shards)
    model, _ = load_autoencoder(at / "autoencoder")
    rows, flipped = np.asarray([3, 11, 30]), np.asarray([False, True, False])
    images = as_unit_range(load_images(finished.shards, rows.tolist(), 32))
    images[1] = images[1].flip(-1)
    tau = 0.8 if kind == "svg" else None
    cached = CachedForward(
        load_decoder(source.path)[0].train(), source.stored_shape, source.scaling(), tau, lambda values: values
    )
    stored = source.stored(rows, flipped)
    with torch.no_grad():
        if isinstance(model, SVGAutoencoder):
            direct = SVGForward(model, tau).eval()
            masking, noise = direct.draws(0, 5, range(3), 32)
            expected = direct(images, torch.ones_like(masking), noise)
        else:
            direct = KLForward(model, None).eval()  # type: ignore[arg-type, assignment]
            (noise,) = direct.draws(0, 5, range(3), 32)
            expected = direct(images, noise)
        found = cached(stored, *cached.draws(0, 5, range(3), 32))
    assert (found.reconstruction - expected.reconstruction).abs().max() < 0.02
    assert (found.reconstruction[0] - found.reconstruction[1]).abs().max() > 0.1


def test_the_vision_model_is_the_recipes_where_it_does_not_encode(finished: Finished, vaes: Path) -> None:
    """A KL autoencoder may have been trained without it, or imported; in SVG's it makes the latents."""
    other = finished.recipe.autoencoder.backbone.model_copy(update={"weights": "random"})
    for at, kind, taken in ((finished.root, "svg", False), (vaes / "kl", "kl", True)):
        source = DecoderSource.open(at / "autoencoder", FeatureCache(at / "cache"), finished.shards)
        config = finished.recipe.autoencoder.model_copy(update={"kind": kind, "backbone": other})
        assert source.section(config).backbone == (other if taken else source.manifest.section.backbone)
        assert source.section(config).crop == "centre"


def test_a_killed_fine_tuning_ends_with_the_same_weights(
    finished: Finished, tuned: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "killed"
    command = arguments(finished, out, *NOISE, *NO_VISION)
    run_and_kill(command, (out / "checkpoints" / "latest.json").exists)
    resumed = svgpipe(*command)
    assert resumed.code == 0 and "resumed at step" in resumed.err, resumed.err
    whole, found = (load_file(f / "autoencoder.safetensors") for f in (tuned, out))
    assert all(torch.equal(whole[key], found[key]) for key in whole)
    assert AutoencoderManifest.read(out).fingerprint == AutoencoderManifest.read(tuned).fingerprint


def test_samples_of_the_caches_models_are_decoded(
    finished: Finished, tuned: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """The model was trained on the cache of the first autoencoder."""
    done = svgpipe(
        *("sample-and-eval", "--diffusion", finished.root / "diffusion", "--autoencoder", tuned),
        *("--reference", finished.root / "shards", "--out", tmp_path / "evaluation"),
        *("--recipe", finished.recipe_file, "--steps", "1", "--guidance", "1.0"),
    )
    assert done.code == 0, done.err
    verified = svgpipe("verify", tuned)
    assert verified.code == 0, verified.err


def test_a_decoder_of_a_decoder_decodes_too(
    finished: Finished, tuned: Path, vaes: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """A second fine-tuning from the same cache, and one of the posteriors of a KL autoencoder."""
    command = arguments(finished, tmp_path / "again", *NO_VISION)
    command[command.index("--from") + 1] = tuned
    again = svgpipe(*command)
    assert again.code == 0, again.err
    first = AutoencoderManifest.read(finished.root / "autoencoder")
    assert encoder_of(AutoencoderManifest.read(tmp_path / "again").as_input(tmp_path)) == first.fingerprint
    of_kl = arguments(finished, tmp_path / "kl", *NO_VISION, of=vaes / "kl")
    of_kl[of_kl.index("--recipe") + 1] = vaes / "kl.yaml"
    done = svgpipe(*of_kl)
    assert done.code == 0, done.err
    before, after = (load_file(f / "autoencoder.safetensors") for f in (vaes / "kl" / "autoencoder", tmp_path / "kl"))
    changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"decoder", "post_quant_conv"}


def test_every_decoder_of_one_encoder_decodes_its_caches(
    finished: Finished, tuned: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """The fine-tuned autoencoder extracts a cache with the same bytes; decoders trained on either decode both."""
    cache = tmp_path / "cache"
    command = extract_args(finished, cache)
    command[command.index("--autoencoder") + 1] = tuned
    assert svgpipe(*command).code == 0
    assert tree_bytes(cache, "features/**/*") == tree_bytes(finished.root / "cache", "features/**/*")
    int8 = tmp_path / "int8"
    assert svgpipe("requantize", cache, "--out", int8, "--store-dtype", "int8").code == 0
    second = arguments(finished, tmp_path / "second", *NO_VISION)
    second[second.index("--from") + 1], second[second.index("--cache") + 1] = tuned, int8
    done = svgpipe(*second)
    assert done.code == 0, done.err
    for autoencoder in (finished.root / "autoencoder", tuned, tmp_path / "second"):
        for held in (finished.root / "cache", cache):
            assert DecoderSource.open(autoencoder, FeatureCache(held), finished.shards).path == autoencoder


def test_what_does_not_fit_is_refused(
    finished: Finished, photographs: Path, vaes: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out"
    lone = svgpipe(*(a for a in arguments(finished, out) if a != "--decoder-only"))
    assert lone.code == 2 and "--decoder-only, --from and --cache together" in lone.err
    other = arguments(finished, out)
    other[other.index("--cache") + 1] = vaes / "kl" / "cache"
    found = svgpipe(*other)
    assert found.code == 1 and "Give the autoencoder that extracted the cache" in found.err
    wide = svgpipe(*arguments(finished, out, "--set", "autoencoder.decoder.ch=64"))
    assert wide.code == 2 and "decoder.ch: 32 there, 64 here" in wide.err
    few = tmp_path / "few"
    options = ("--recipe", finished.recipe_file, "--set", "shard.images_per_shard=9")
    assert svgpipe("shard", photographs, "--out", few, *options).code == 0
    shards = arguments(finished, out)
    shards[shards.index("--shards") + 1] = few
    foreign = svgpipe(*shards)
    assert foreign.code == 1 and "Give the shard set that the cache was extracted from" in foreign.err
    plain = tmp_path / "plain"
    assert svgpipe(*extract_args(finished, plain, "--set", "extract.views=[original]")).code == 0
    unflipped = arguments(finished, out, *NOISE)
    unflipped[unflipped.index("--cache") + 1] = plain
    flips = svgpipe(*unflipped)
    assert flips.code == 2 and "holds no flipped images" in flips.err
    cache = FeatureCache(finished.root / "cache")
    FeatureCache.create(tmp_path / "own", cache.read(range(len(cache))), cache.labels, mean=0.0, std=1.0)
    unknown = arguments(finished, out)
    unknown[unknown.index("--cache") + 1] = tmp_path / "own"
    found = svgpipe(*unknown)
    assert found.code == 2 and "does not say which images it holds" in found.err
    assert not out.exists()
