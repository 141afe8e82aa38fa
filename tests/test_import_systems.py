"""`svgpipe import-official` for SD-VAE, VA-VAE, DiT, SiT, REPA and LightningDiT: recorded weights as released files."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.images.tensors import as_unit_range
from svgpipe.stages.networks.autoencoder import load_autoencoder
from svgpipe.stages.networks.diffusion import open_diffusion

from .conftest import Finished, GoldenFolder, Outcome
from .test_golden import kl_autoencoder, map_from_tokens, older_names, tokens_from_map

SIZE = 64  # pixels: 8x8 latents of SD-VAE, 4x4 of VA-VAE
FROM = {"dit": "sd_vae", "sit": "sd_vae", "repa": "sd_vae", "lightningdit": "va_vae"}
SOLVER = {"dit": "ddpm", "sit": "dopri5", "repa": "sde", "lightningdit": "euler"}


def weights(golden: GoldenFolder, name: str) -> dict[str, Tensor]:
    return {key: value.float() for key, value in golden.weights_of(name).group("sd.").items()}


def write_vae(golden: GoldenFolder, folder: Path, name: str) -> Path:
    """SD-VAE as diffusers saves it, VA-VAE as LightningDiT does, with what its training leaves in the file."""
    state, path = weights(golden, name), folder / f"{name}.safetensors"
    if name == "sd_vae":
        save_file(state, path)
        return path
    path = path.with_suffix(".pt")
    torch.save({"state_dict": {**state, "foundation_model.x": torch.zeros(2), "loss.logvar": torch.zeros(())}}, path)
    return path


def write_transformer(golden: GoldenFolder, folder: Path, system: str) -> Path:
    state, path = weights(golden, system), folder / f"{system}.pt"
    args = argparse.Namespace(lr=1e-4)
    if system == "repa":  # an old file: blocks begin again after the aligned one
        state = {
            f"decoder_blocks.{int(parts[1]) - 1}.{parts[2]}"
            if (parts := key.split(".", 2))[0] == "blocks" and parts[1] != "0"
            else key: value
            for key, value in state.items()
        }
    layout: dict[str, Any] = {
        "dit": {"model": state, "ema": state, "opt": {"state": {}}, "args": args},
        "sit": state,
        "repa": {"ema": state, "steps": 3},
        "lightningdit": {"ema": state},
    }
    torch.save(layout[system], path)
    return path


def import_args(golden: GoldenFolder, folder: Path, system: str) -> list[object]:
    files = ["--autoencoder", write_vae(golden, folder, FROM[system]), "--image-size", SIZE, "--heads", 3]
    files += ["--diffusion", write_transformer(golden, folder, system), "--out", folder / "out"]
    if system in ("dit", "sit"):
        files += ["--system", system]
    if system == "lightningdit":
        shape = (1, 8, 1, 1)
        torch.save({"mean": torch.randn(shape), "std": torch.rand(shape) + 0.5}, folder / "latents_stats.pt")
        files += ["--stats", folder / "latents_stats.pt"]
    return ["import-official", *files]


@pytest.mark.parametrize("system", FROM)
def test_a_released_model_is_imported_and_sampled(
    golden: GoldenFolder, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], system: str
) -> None:
    recording = golden.weights_of(system)
    done = svgpipe(*import_args(golden, tmp_path, system))
    assert done.code == 0, done.err
    trained = open_diffusion(tmp_path / "out" / "diffusion")
    model = trained.load("raw" if system == "sit" else "ema")
    x, t, y = tokens_from_map(recording["x"]), recording["t"], recording["y"]
    expected = recording["out"]
    if system == "repa":  # its noise is at t = 1, and its velocity points towards it
        t, expected = 1 - t, -expected
    with torch.no_grad():
        found = map_from_tokens(model(x, t, y), trained.grid)
    torch.testing.assert_close(found, expected, atol=5e-5, rtol=0)
    assert trained.objective == ("ddpm" if system == "dit" else "flow")
    if system == "lightningdit":
        section = DiffusionSection.model_validate(trained.config)
        assert section.logit_normal_time and section.cosine_loss
    else:
        np.testing.assert_allclose(trained.statistics()[1], 1 / 0.18215, rtol=1e-6)
    given = ["--diffusion", tmp_path / "out" / "diffusion", "--autoencoder", tmp_path / "out" / "autoencoder"]
    change = ["--set", f"evaluation.solver={SOLVER[system]}", "--set", "evaluation.guidance_channels=3"]
    change += ["--set", "evaluation.extractor={kind: timm, name: resnet10t, weights: random}"]
    if system == "sit":
        change += ["--ema", "raw"]
    sampled = svgpipe(
        "sample-and-eval", *given, "--reference", finished.root / "shards", "--out", tmp_path / "evaluation",
        "--recipe", finished.recipe_file, "--steps", 2, "--guidance", 1.5, *change,
    )  # fmt: skip
    assert sampled.code == 0, sampled.err
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text())
    assert all(np.isfinite(result["frechet_distance"]["value"]) for result in report["results"])


def test_every_key_is_used_or_listed_with_a_reason(
    golden: GoldenFolder, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    assert svgpipe(*import_args(golden, tmp_path, "repa")).code == 0
    autoencoder, diffusion = json.loads((tmp_path / "out" / "import.json").read_text())["imported"]
    assert autoencoder["used"] == len(weights(golden, "sd_vae")) and autoencoder["ignored"] == {}
    state = weights(golden, "repa")
    projectors = [key for key in state if key.startswith("projectors.")]
    assert diffusion["used"] == len(state) - len(projectors)
    assert sorted(diffusion["ignored"].values(), key=len) == [["steps"], projectors]
    va = tmp_path / "va"
    va.mkdir()
    assert svgpipe("import-official", "--autoencoder", write_vae(golden, va, "va_vae"), "--out", va / "out").code == 0
    (listed,) = json.loads((va / "out" / "import.json").read_text())["imported"]
    assert sorted(key for keys in listed["ignored"].values() for key in keys) == [
        "foundation_model.x",
        "linear_proj.weight",
        "loss.logvar",
    ]


def test_a_file_of_repa_without_projectors_is_not_taken_for_sit(
    golden: GoldenFolder, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Their layers look the same, but time and velocity run the other way. In bfloat16, as some files are."""
    recording = golden.weights_of("repa")
    state = {key: v.bfloat16() for key, v in weights(golden, "repa").items() if not key.startswith("projectors.")}
    torch.save({f"_orig_mod.{key}": value for key, value in state.items()}, tmp_path / "repa.pt")
    given = ["--autoencoder", write_vae(golden, tmp_path, "sd_vae"), "--image-size", SIZE, "--heads", 3]
    given += ["--diffusion", tmp_path / "repa.pt", "--out", tmp_path / "out"]
    unsaid = svgpipe("import-official", *given)
    assert unsaid.code == 2 and "may be a file of sit or repa" in unsaid.err
    done = svgpipe("import-official", *given, "--system", "repa")
    assert done.code == 0, done.err
    trained = open_diffusion(tmp_path / "out" / "diffusion")
    x, t, y = tokens_from_map(recording["x"]), 1 - recording["t"], recording["y"]
    with torch.no_grad():
        found = map_from_tokens(trained.load("raw")(x, t, y), trained.grid)
    torch.testing.assert_close(found, -recording["out"], atol=0.15, rtol=0)


def test_an_imported_vae_extracts_and_is_trained_on(
    golden: GoldenFolder, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    vae, shards = write_vae(golden, tmp_path, "sd_vae"), finished.root / "shards"
    assert svgpipe("import-official", "--autoencoder", vae, "--image-size", SIZE, "--out", tmp_path / "out").code == 0
    recipe = ["--recipe", finished.recipe_file]
    given = ["--shards", shards, "--autoencoder", tmp_path / "out" / "autoencoder", "--out", tmp_path / "cache"]
    done = svgpipe("extract", *given, *recipe, "--set", "extract.factor=0.18215")
    assert done.code == 0, done.err
    cache, official = FeatureCache(tmp_path / "cache"), kl_autoencoder(weights(golden, "sd_vae"))
    pixels = as_unit_range(load_images(finished.shards, [0, 5], SIZE))
    with torch.no_grad():
        expected = 0.18215 * official.encode(pixels).permute(0, 2, 3, 1)
    torch.testing.assert_close(torch.from_numpy(cache.read([0, 5]).astype(np.float32)), expected, atol=2e-3, rtol=1e-3)
    trained = svgpipe("train-diffusion", "--cache", tmp_path / "cache", "--out", tmp_path / "model", *recipe)
    assert trained.code == 0, trained.err
    page = svgpipe("inspect", tmp_path / "out" / "autoencoder")
    assert "tokenizer" in page.out and "kl" in page.out


def test_all_names_of_sd_vae_give_the_same_autoencoder(
    golden: GoldenFolder, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """diffusers' older names, CompVis's names, and a whole Stable Diffusion model around them."""
    state, contents = weights(golden, "sd_vae"), set()
    for number, names in enumerate([state, *older_names(golden.weights_of("sd_vae"), state)]):
        torch.save({"state_dict": names}, tmp_path / f"{number}.ckpt")
        out = tmp_path / str(number)
        done = svgpipe("import-official", "--autoencoder", tmp_path / f"{number}.ckpt", "--out", out)
        assert done.code == 0, done.err
        contents.add(load_autoencoder(out / "autoencoder")[1].content)
    assert len(contents) == 1


@pytest.mark.parametrize(("levels", "channels"), [(3, 3), (4, 16)])
def test_other_strides_and_channels_are_read_off_the_tensors(
    golden: GoldenFolder, tmp_path: Path, svgpipe: Callable[..., Outcome], levels: int, channels: int
) -> None:
    """f4 with 3 channels; f8 with 16 channels and without 1x1 convolutions at the latents, as in newer VAEs."""
    state = weights(golden, "sd_vae")
    if levels == 3:  # without the lowest level: three of width 32, 64, 32
        drop = ("encoder.down_blocks.3", "encoder.down_blocks.2.downsamplers", "decoder.up_blocks.0.")
        state = {key: value for key, value in state.items() if not key.startswith(drop)}
        state = {re.sub(r"up_blocks\.(\d)", _lower, key): value for key, value in state.items()}
    shapes = {
        "encoder.conv_out": (2, 0),
        "decoder.conv_in": (1, 1),
        "quant_conv": (2, None),
        "post_quant_conv": (1, None),
    }
    for name, (factor, axis) in shapes.items():
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        shape = list(weight.shape)
        for a in (0, 1) if axis is None else (axis,):
            shape[a] = factor * channels
        state[f"{name}.weight"] = torch.randn(shape)
        state[f"{name}.bias"] = torch.randn(shape[0]) if axis in (0, None) else bias
    if channels == 16:
        state = {key: value for key, value in state.items() if "quant_conv" not in key}
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "vae.safetensors")
    done = svgpipe("import-official", "--autoencoder", tmp_path / "vae.safetensors", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    stride = 2 ** (levels - 1)
    assert f"stride {stride}, {channels} channels" in done.out
    model, manifest = load_autoencoder(tmp_path / "out" / "autoencoder")
    assert manifest.grid == (256 // stride, 256 // stride)
    with torch.no_grad():
        stored = model.encode(torch.rand(1, 3, 32, 32))
        assert stored.shape == (1, 2 * channels, 32 // stride, 32 // stride)
        assert model.decode(model.latents(stored)).shape == (1, 3, 32, 32)


def _lower(match: re.Match[str]) -> str:
    return f"up_blocks.{int(match[1]) - 1}"


def test_files_of_another_system_are_named(
    golden: GoldenFolder, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    vae = write_vae(golden, tmp_path, "sd_vae")
    files = {system: write_transformer(golden, tmp_path, system) for system in FROM}
    out = ["--out", tmp_path / "out", "--image-size", SIZE]

    def diffusion(path: Path, *more: object) -> Outcome:
        heads = () if "--heads" in more else ("--heads", 3)
        return svgpipe("import-official", "--autoencoder", vae, "--diffusion", path, *out, *heads, *more)

    for system, found in (("sit", "dit or sit"), ("lightningdit", "lightningdit")):
        swapped = svgpipe("import-official", "--autoencoder", files[system], *out)
        assert swapped.code == 1 and f"looks like {found}: give it as --diffusion" in swapped.err
    both = diffusion(vae)
    assert both.code == 1 and "looks like a KL autoencoder: give it as --autoencoder" in both.err
    unsaid = diffusion(files["dit"])
    assert unsaid.code == 2 and "may be a file of dit or sit" in unsaid.err and "--system" in unsaid.err
    wrong = diffusion(files["repa"], "--system", "sit")
    assert wrong.code == 1 and "expected a transformer of sit, found one that looks like repa" in wrong.err
    other = diffusion(files["lightningdit"])
    assert other.code == 1 and "4x4x8, those of the autoencoder 8x8x4 (--image-size" in other.err
    heads = svgpipe("import-official", "--autoencoder", vae, "--diffusion", files["repa"], *out)
    assert heads.code == 2 and "does not show the number of attention heads. Add --heads" in heads.err
    odd = diffusion(files["repa"], "--heads", 5)
    assert odd.code == 2 and "--heads 5: expected a divisor of the width 48" in odd.err
    seen = diffusion(files["lightningdit"], "--heads", 2)
    assert seen.code == 2 and "--heads 2: expected 3, as the file shows" in seen.err
    infinite = diffusion(files["repa"], "--factor", "inf")
    assert infinite.code == 2 and "--factor" in infinite.err
    torch.save({"x.weight": torch.zeros(2)}, tmp_path / "other.pt")
    foreign = svgpipe("import-official", "--autoencoder", tmp_path / "other.pt", "--out", tmp_path / "foreign")
    assert foreign.code == 1 and "found keys like x.weight" in foreign.err
    two = diffusion(files["repa"], "--stats", vae, "--factor", 0.18215)
    assert two.code == 2 and "two ways" in two.err
    statistics = svgpipe(
        "import-official", "--autoencoder", write_vae(golden, tmp_path, "va_vae"), "--out", tmp_path / "va",
        "--image-size", SIZE, "--diffusion", files["lightningdit"],
    )  # fmt: skip
    assert statistics.code == 2 and "latents_stats.pt" in statistics.err
    size = svgpipe("import-official", "--autoencoder", vae, "--out", tmp_path / "odd", "--image-size", 60)
    assert size.code == 2 and "--image-size: expected a multiple of the stride 8, found 60" in size.err


def test_damaged_weights_are_refused_by_name(
    golden: GoldenFolder, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    state = weights(golden, "sd_vae")
    for key, value, words in (
        ("surprise.weight", torch.zeros(1), "left over surprise.weight"),
        ("encoder.conv_in.weight", torch.zeros(3), "encoder.conv_in.weight: expected"),
        ("encoder.conv_in.bias", torch.full((32,), torch.nan), "finite numbers, found 32 others"),
    ):
        save_file({**state, key: value}, tmp_path / "vae.safetensors")
        done = svgpipe("import-official", "--autoencoder", tmp_path / "vae.safetensors", "--out", tmp_path / "out")
        assert done.code == 1 and words in done.err and not (tmp_path / "out").exists(), done.err
