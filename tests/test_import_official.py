"""`svgpipe import-official`: files in the official layout, at tiny sizes, through all later stages."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from svgpipe.manifests import FeatureCache
from svgpipe.models.decoder import Decoder
from svgpipe.models.dit import DiT
from svgpipe.models.official import NO_BIAS, dit_sizes, split_autoencoder
from svgpipe.models.residual import IMAGENET_MEAN, IMAGENET_STD
from svgpipe.stages.images.stream import load_images
from svgpipe.stages.networks.diffusion import open_diffusion

from .conftest import Finished, Outcome

SIZE, PATCH, RESIDUAL = 64, 16, 4
CLASSES = 3  # as the photographs of the other tests


@dataclass(frozen=True)
class Official:
    """Three files as written by the official code, and the modules that they were made from."""

    folder: Path
    backbone: Any  # a timm Eva, which is not typed
    residual: VisionTransformer
    dit: DiT

    @property
    def arguments(self) -> list[object]:
        return [
            *("--autoencoder", self.folder / "autoencoder.ckpt"),
            *("--diffusion", self.folder / "diffusion.pt"),
            *("--stats", self.folder / "stats.pt"),
        ]


def _meta_keys(model: Any) -> dict[str, Tensor]:
    """Rename the weights of a timm DINOv3 to Meta's keys: the inverse of timm's converter."""
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key.endswith(("q_bias", "v_bias")):
            continue
        name = (
            key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma")
        )
        state[name] = value.clone()
    for i, block in enumerate(model.blocks):
        q, v = block.attn.q_bias, block.attn.v_bias
        state[f"blocks.{i}.attn.qkv.bias"] = torch.cat([q, torch.zeros_like(q), v]).detach()
        ones = torch.ones_like(q)
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.cat([ones, 0 * ones, ones])
    state["mask_token"] = torch.zeros(1, state["cls_token"].shape[-1])
    state["rope_embed.periods"] = model.rope.periods.to(torch.bfloat16)
    return state


def _prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{key}": value for key, value in state.items()}


def _decoder() -> Decoder:
    return Decoder(
        z_channels=192 + RESIDUAL,
        ch=32,
        ch_mult=(1, 1, 1, 1, 1),
        num_res_blocks=1,
        attn_resolutions=(SIZE // PATCH,),
        resolution=SIZE,
    )


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Official:
    folder = tmp_path_factory.mktemp("official")
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_dinov3_qkvb", num_classes=0).eval()
    for block in backbone.blocks:  # new models have none to speak of
        nn.init.normal_(block.attn.q_bias, std=0.1)
        nn.init.normal_(block.attn.v_bias, std=0.1)
        nn.init.constant_(block.gamma_1, 0.5)  # of new models next to nothing: no error within a block would show
        nn.init.constant_(block.gamma_2, 0.5)
    residual = VisionTransformer(SIZE, PATCH, num_layers=2, num_heads=8, hidden_dim=32, mlp_dim=64).eval()
    residual.heads = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, RESIDUAL))
    channels = 192 + RESIDUAL
    decoder = _decoder()
    state = {
        **_prefixed("encoder", _meta_keys(backbone)),
        **_prefixed("extra_vit", residual.state_dict()),
        **_prefixed("decoder", decoder.state_dict()),
        "mask_token": torch.randn(1, RESIDUAL, 1),
        "norm_vit.weight": torch.ones(RESIDUAL + 32),
        "norm_vit.bias": torch.zeros(RESIDUAL + 32),
        "loss.logvar": torch.zeros(()),
        "loss.perceptual_loss.lin0.model.1.weight": torch.rand(1, 64, 1, 1),
    }
    lightning = {
        "state_dict": state,
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": argparse.Namespace(lr=1e-4, out=Path("/data")),
        "callbacks": {"ModelCheckpoint": {"best_model_path": Path("/x"), "best_k_models": defaultdict(int, a=1)}},
        "scale": np.float64(2.0),
        "optimizer_states": [],
    }
    torch.save(lightning, folder / "autoencoder.ckpt")
    dit = DiT(grid=(4, 4), in_channels=channels, num_classes=CLASSES, width=32, depth=2, heads=2, learn_sigma=True)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.05)
    table = dit.pos_embed.clone()
    for _ in range(5000):  # the official average takes in this table as well, so rounding moves it
        dit.pos_embed.mul_(0.9999).add_(table, alpha=1 - 0.9999)
    assert (dit.pos_embed - table).abs().max() > 5e-5
    averaged = {key: value.clone() for key, value in dit.state_dict().items()}
    raw = {key: value + 0.01 if key != "pos_embed" else value for key, value in averaged.items()}
    diffusion = {"ema": averaged, "model": _prefixed("module", raw), "opt": {"state": {}}, "epoch": 3}
    torch.save(diffusion, folder / "diffusion.pt")
    mean, std = torch.randn(1, 1, channels), torch.rand(1, 1, channels) + 0.5
    torch.save({"dinov3_sp_mean": mean, "dinov3_sp_std": std}, folder / "stats.pt")
    return Official(folder, backbone, residual, dit.eval())


@pytest.fixture(scope="module")
def imported(official: Official, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from svgpipe.pipeline.cli import main

    out = tmp_path_factory.mktemp("imported") / "svg"
    names = official.folder / "names.txt"
    names.write_text("astronaut\ncat\ncoffee\n")
    assert main(["import-official", *map(str, official.arguments), "--out", str(out), "--class-names", str(names)]) == 0
    return out


@pytest.fixture(scope="module")
def extracted(imported: Path, finished: Finished) -> Path:
    """A cache made with the imported autoencoder."""
    from svgpipe.pipeline.cli import main

    shards, out = finished.root / "shards", imported / "cache"
    arguments = ["extract", "--shards", shards, "--autoencoder", imported / "autoencoder", "--out", out]
    assert main([*map(str, arguments), "--recipe", str(finished.recipe_file)]) == 0
    return out


def test_every_key_is_used_or_listed_with_a_reason(imported: Path, official: Official) -> None:
    listing = json.loads((imported / "import.json").read_text())["imported"]
    autoencoder, diffusion = listing
    state = torch.load(official.folder / "diffusion.pt", weights_only=True)
    assert diffusion["used"] == len(state["ema"]) + len(state["model"])
    assert list(diffusion["ignored"].values()) == [["opt", "epoch"]]
    lightning = torch.load(official.folder / "autoencoder.ckpt", weights_only=False)
    beside = sorted(set(lightning) - {"state_dict"})
    assert beside in [sorted(keys) for keys in autoencoder["ignored"].values()]
    aside = [key for keys in autoencoder["ignored"].values() for key in keys if key not in beside]
    assert sorted(aside) == [
        *sorted(f"encoder.blocks.{i}.attn.qkv.bias_mask" for i in range(12)),
        "encoder.mask_token",
        "loss.logvar",
        "loss.perceptual_loss.lin0.model.1.weight",
        "norm_vit.bias",
        "norm_vit.weight",
    ]
    assert autoencoder["used"] + len(aside) == len(lightning["state_dict"])


def test_an_exported_transformer_gives_the_same_output(imported: Path, official: Official) -> None:
    trained = open_diffusion(imported / "diffusion")
    assert trained.class_names == ["astronaut", "cat", "coffee"]
    x, t, y = torch.randn(2, 16, 196), torch.tensor([0.1, 0.9]), torch.tensor([0, 3])
    with torch.no_grad():
        torch.testing.assert_close(trained.load()(x, t, y), official.dit(x, t, y))
        raw = trained.load("raw")
    assert not torch.equal(raw.ln1.weight, official.dit.ln1.weight)
    mean, std = trained.statistics()
    stats = torch.load(official.folder / "stats.pt", weights_only=True)
    np.testing.assert_array_equal(mean, stats["dinov3_sp_mean"].flatten().numpy())
    np.testing.assert_array_equal(std, stats["dinov3_sp_std"].flatten().numpy())


def test_extraction_measures_the_alignment_and_encodes_as_the_official_modules(
    extracted: Path, imported: Path, official: Official, finished: Finished
) -> None:
    measured = json.loads((imported / "autoencoder" / "alignment.json").read_text())
    cache = FeatureCache(extracted)
    assert measured["shards"] == finished.shards.manifest.fingerprint
    rows = [int(row) for row in np.flatnonzero(cache.valid)[:6]]
    pixels = torch.from_numpy(load_images(finished.shards, rows, SIZE)).permute(0, 3, 1, 2).float() / 255
    images = (pixels - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)
    backbone, vit = official.backbone, official.residual
    backbone.rope.periods.copy_(backbone.rope.periods.to(torch.bfloat16))
    with torch.no_grad():
        frozen = backbone.forward_features(images)[:, backbone.num_prefix_tokens :]
        tokens = torch.cat([vit.class_token.expand(len(rows), -1, -1), vit._process_input(images)], dim=1)
        residual = vit.heads(vit.encoder(tokens)[:, 1:])
    mean_h, std_h, mean_v, std_v = measured["scalars"]
    aligned = (residual - mean_v) / (std_v + 1e-6) * std_h + mean_h
    expected = torch.cat([frozen, aligned], dim=2).numpy()
    found = cache.denormalize(cache.read(rows)).reshape(len(rows), 16, -1)
    np.testing.assert_allclose(found, expected, atol=5e-3 * np.abs(expected).max())  # the cache is float16
    # What alignment is for: the groups' averages of mean and deviation agree (channel statistics: over fewer images).
    assert abs(float(cache.channel_mean[:192].mean() - cache.channel_mean[192:].mean())) < 0.1
    assert float(cache.channel_std[192:].mean() / cache.channel_std[:192].mean()) == pytest.approx(1, abs=0.1)
    assert not (abs(mean_v - mean_h) < 0.01 and std_v / std_h == pytest.approx(1, abs=0.2)), "nothing was aligned"


def test_an_imported_models_paths_are_analysed_beside_a_cache_of_its_autoencoder(
    extracted: Path, imported: Path, finished: Finished, svgpipe: Callable[..., Outcome]
) -> None:
    done = svgpipe("analyze", extracted, "--diffusion", imported / "diffusion", "--json")
    assert done.code == 0, done.err
    (found,) = json.loads(done.out)["caches"]
    assert "of an imported file" in found["straightness"]["weights"]
    assert found["straightness"]["largest_deviation"]["value"] > 0
    refused = svgpipe("analyze", finished.root / "cache", "--diffusion", imported / "diffusion")
    assert refused.code == 1 and "is imported, and samples latents of the autoencoder" in refused.err


def test_the_round_trip_trains_and_samples(
    extracted: Path, imported: Path, finished: Finished, svgpipe: Callable[..., Outcome]
) -> None:
    recipe = ("--recipe", finished.recipe_file)
    trained = imported / "trained"
    assert svgpipe("train-diffusion", "--cache", extracted, "--out", trained, *recipe).code == 0
    common = ("--autoencoder", imported / "autoencoder", "--reference", finished.root / "shards", *recipe)
    for name, model in (("own", trained), ("theirs", imported / "diffusion")):
        out = imported / f"evaluation-{name}"
        done = svgpipe("sample-and-eval", "--diffusion", model, "--out", out, *common, "--steps", "2")
        assert done.code == 0, done.err
        report = json.loads((out / "report.json").read_text())
        assert all(np.isfinite(r["frechet_distance"]["value"]) for r in report["results"])
        page = (out / "report.html").read_text()
        assert page.count("official-autoencoder") >= 1 and "imported from autoencoder.ckpt" in page
        assert ("imported from diffusion.pt" in page) == (name == "theirs") and not re.search(r"\b0 steps", page)
    before = (imported / "autoencoder" / "alignment.json").read_bytes()
    assert svgpipe("verify", imported / "autoencoder", "--deep").code == 0
    assert svgpipe("verify", imported / "diffusion", "--deep").code == 0
    assert (imported / "autoencoder" / "alignment.json").read_bytes() == before


def test_an_evaluation_measures_the_alignment_where_no_extraction_did(
    imported: Path, finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Reconstructions or samples: both measure the same four numbers and print a message."""
    autoencoder, shards = tmp_path / "autoencoder", finished.root / "shards"
    shutil.copytree(imported / "autoencoder", autoencoder)
    measured = autoencoder / "alignment.json"
    measured.unlink(missing_ok=True)
    given = ("--autoencoder", autoencoder)
    backbone = ("--set", "reconstruction.extractor.kind=backbone")
    rebuilt = svgpipe("eval-reconstruction", *given, "--shards", shards, "--out", tmp_path / "rebuilt", *backbone)
    assert rebuilt.code == 0 and "was imported without an alignment; measured on" in rebuilt.out + rebuilt.err
    first = json.loads(measured.read_text())["scalars"]
    measured.unlink()
    diffusion = ("--diffusion", imported / "diffusion", "--reference", shards, "--recipe", finished.recipe_file)
    done = svgpipe("sample-and-eval", *given, *diffusion, "--steps", 1, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert "was imported without an alignment; measured on" in done.out + done.err
    assert json.loads(measured.read_text())["shards"] == finished.shards.manifest.fingerprint
    assert json.loads(measured.read_text())["scalars"] == pytest.approx(first, rel=1e-4)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert "reconstructions" in [r["name"] for r in report["results"]]


def test_reconstructions_depend_on_the_alignment(
    extracted: Path, imported: Path, finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    """A finished evaluation with the first alignment is not reused for the second one."""
    other, shards = tmp_path / "autoencoder", finished.root / "shards"
    shutil.copytree(imported / "autoencoder", other)
    measured = json.loads((other / "alignment.json").read_text())
    (other / "alignment.json").write_text(json.dumps({**measured, "scalars": [9.0, 9.0, 9.0, 9.0]}))
    backbone = "extractor.kind=backbone"
    reconstruct = ("eval-reconstruction", "--shards", shards, "--set", f"reconstruction.{backbone}")
    sample = ("sample-and-eval", "--diffusion", imported / "diffusion", "--reference", shards, "--steps", 1)
    recipe = ("--recipe", finished.recipe_file)
    for number, command in enumerate((reconstruct, (*sample, *recipe))):
        arguments = (*command, "--out", tmp_path / str(number), "--autoencoder")
        assert svgpipe(*arguments, imported / "autoencoder").code == 0
        refused = svgpipe(*arguments, other)
        assert refused.code == 1 and "alignment" in refused.err and "9.0" in refused.err


def test_caches_of_two_measured_alignments_are_not_mixed(
    imported: Path, extracted: Path, finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    """The weights are the same, so only the alignment distinguishes the two imports."""
    kept, other, cache = imported / "autoencoder", tmp_path / "autoencoder", tmp_path / "cache"
    shutil.copytree(kept, other)
    shutil.copytree(extracted, cache)
    measured = json.loads((kept / "alignment.json").read_text())
    assert json.loads((cache / "alignment.json").read_text()) == measured
    assert str(round(measured["scalars"][0], 4)) in svgpipe("inspect", kept, "--json").out
    assert svgpipe("requantize", cache, "--out", tmp_path / "small").code == 0
    assert json.loads((tmp_path / "small" / "alignment.json").read_text()) == measured
    (other / "alignment.json").write_text(json.dumps({**measured, "scalars": [9.0, 9.0, 9.0, 9.0]}))
    shards = finished.root / "shards"
    arguments = ("extract", "--shards", shards, "--out", cache, "--recipe", finished.recipe_file)
    for stopped in (False, True):
        if stopped:
            (cache / "manifest.json").unlink()
        refused = svgpipe(*arguments, "--autoencoder", other)
        assert refused.code == 1 and "alignment" in refused.err and "9.0" in refused.err
    assert svgpipe(*arguments, "--autoencoder", kept).code == 0
    (cache / "alignment.json").write_text((other / "alignment.json").read_text())
    probed = svgpipe("probe", extracted, "--validation", cache)
    assert probed.code == 1 and "alignment" in probed.err


@pytest.mark.parametrize("sigma", [False, True])
@pytest.mark.parametrize("layout", ["ema", "model", "bare"])
def test_every_layout_of_a_diffusion_file_is_sampled_from(
    official: Official, svgpipe: Callable[..., Outcome], tmp_path: Path, layout: str, sigma: bool
) -> None:
    """The official code saves EMA alone, the model alone, or a bare state dict; with and without sigma."""
    dit = DiT(grid=(4, 4), in_channels=196, num_classes=CLASSES, width=32, depth=1, heads=2, learn_sigma=sigma)
    for parameter in dit.parameters():
        nn.init.normal_(parameter, std=0.05)
    state = dit.state_dict()
    torch.save(state if layout == "bare" else {layout: state}, tmp_path / "diffusion.pt")
    files = [tmp_path / "diffusion.pt" if str(a).endswith("diffusion.pt") else a for a in official.arguments]
    done = svgpipe("import-official", *files, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert ("with the unused sigma half" in done.out) == sigma
    assert ("sample with --ema raw" in done.out) == (layout != "ema")
    model = open_diffusion(tmp_path / "out" / "diffusion").load("ema" if layout == "ema" else "raw")
    x, t, y = torch.randn(2, 16, 196), torch.tensor([0.2, 0.7]), torch.tensor([1, 3])
    with torch.no_grad():
        torch.testing.assert_close(model(x, t, y), dit.eval()(x, t, y))


def test_a_second_import_is_skipped_and_other_files_are_refused(
    imported: Path, official: Official, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    names = official.folder / "names.txt"
    again = svgpipe("import-official", *official.arguments, "--out", imported, "--class-names", names)
    assert again.code == 0 and "tensors used" in again.out
    found = torch.load(official.folder / "diffusion.pt", weights_only=True)
    torch.save(found["ema"], tmp_path / "bare.pt")  # no `ema` around it
    other = [tmp_path / "bare.pt" if str(a).endswith("diffusion.pt") else a for a in official.arguments]
    refused = svgpipe("import-official", *other, "--out", imported, "--class-names", names)
    assert refused.code == 1 and "differently" in refused.err
    fresh = svgpipe("import-official", *other, "--out", tmp_path / "fresh")
    assert fresh.code == 0 and "DiT of width 32 and depth 2 with the unused sigma half, 3 classes" in fresh.out
    assert open_diffusion(tmp_path / "fresh" / "diffusion").class_names == ["0", "1", "2"]
    autoencoder = official.arguments[:2]
    assert svgpipe("import-official", *autoencoder, "--out", tmp_path / "fresh").code == 0
    listed = json.loads((tmp_path / "fresh" / "import.json").read_text())["imported"]
    assert {entry["directory"] for entry in listed} == {"autoencoder", "diffusion"}
    useless = svgpipe("import-official", *autoencoder, "--out", tmp_path / "fresh", "--class-names", names)
    assert useless.code == 2 and "--diffusion" in useless.err
    missing = svgpipe("export", tmp_path / "fresh" / "diffusion", "--out", tmp_path / "exported")
    assert missing.code == 2 and "it holds raw" in missing.err


@pytest.mark.parametrize(("grid", "channels"), [(8, 196), (4, 100)])
def test_a_transformer_for_other_latents_than_the_autoencoder_is_refused(
    official: Official, svgpipe: Callable[..., Outcome], tmp_path: Path, grid: int, channels: int
) -> None:
    dit = DiT(grid=(grid, grid), in_channels=channels, num_classes=CLASSES, width=32, depth=1, heads=2)
    torch.save({"ema": dit.state_dict()}, tmp_path / "diffusion.pt")
    statistics = {"dinov3_sp_mean": torch.zeros(channels), "dinov3_sp_std": torch.ones(channels)}
    torch.save(statistics, tmp_path / "stats.pt")
    files = ["--diffusion", tmp_path / "diffusion.pt", "--stats", tmp_path / "stats.pt"]
    refused = svgpipe("import-official", *official.arguments[:2], *files, "--out", tmp_path / "out")
    assert refused.code == 1, refused.err
    assert f"{grid}x{grid}x{channels}, those of the autoencoder 4x4x196" in refused.err


class _Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.update({"surprise.weight": torch.zeros(1)}), "surprise.weight"),
        (lambda s: s.pop("mask_token"), "has no mask_token"),
        (lambda s: s.pop("decoder.conv_out.bias"), "missing decoder.conv_out.bias"),
        (lambda s: s.pop("encoder.storage_tokens"), "Meta's keys"),
        (lambda s: s.update({"extra_vit.heads.5.bias": torch.zeros(1)}), "heads.5.bias"),
        (lambda s: s.update({"extra_vit.encoder.ln.bias": torch.zeros(7)}), "expected (32,), found (7,)"),
        (
            lambda s: s.update({"extra_vit.conv_proj.weight": torch.zeros(())}),
            "conv_proj.weight: expected 4",
        ),
        (lambda s: s.update({"encoder.cls_token": torch.zeros(0)}), "cls_token: expected 3 dimensions"),
        (lambda s: s["encoder.norm.bias"].fill_(torch.nan), "norm.bias: expected finite numbers, found 192 others"),
        (lambda s: s.update({"decoder.conv_out.bias": torch.zeros(3, dtype=torch.int64)}), "found torch.int64"),
        (
            lambda s: s.update({"decoder.conv_out.bias": torch.zeros(3, device="meta")}),
            "conv_out.bias: expected a dense",
        ),
        (lambda s: s.update({"mask_token": torch.zeros(1, RESIDUAL, 1).to_sparse()}), "mask_token: expected a dense"),
    ],
)
def test_mismatching_weights_are_refused_by_name(
    official: Official,
    svgpipe: Callable[..., Outcome],
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], object],
    expected: str,
) -> None:
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(official.folder / "autoencoder.ckpt", weights_only=False)["state_dict"]
    change(state)
    torch.save({"state_dict": state}, tmp_path / "changed.ckpt")
    done = svgpipe("import-official", "--autoencoder", tmp_path / "changed.ckpt", "--out", tmp_path / "out")
    assert done.code == 1 and expected in done.err and "changed.ckpt" in done.err
    assert not (tmp_path / "out").exists()


def test_pickled_code_is_not_executed(svgpipe: Callable[..., Outcome], tmp_path: Path) -> None:
    witness = tmp_path / "was-here"
    torch.save({"state_dict": {}, "extra": _Hostile(witness)}, tmp_path / "hostile.ckpt")
    done = svgpipe("import-official", "--autoencoder", tmp_path / "hostile.ckpt", "--out", tmp_path / "out")
    assert done.code == 1 and "posix.mkdir" in done.err and not witness.exists()


def test_official_files_that_are_invalid_or_do_not_match(
    official: Official, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    autoencoder, diffusion = official.folder / "autoencoder.ckpt", official.folder / "diffusion.pt"
    base = ("import-official", "--autoencoder", autoencoder, "--out", tmp_path / "out")
    alone = svgpipe(*base, "--diffusion", diffusion)
    assert alone.code == 2 and "belong together" in alone.err
    torch.save({"dinov3_sp_mean": torch.zeros(5), "dinov3_sp_std": torch.ones(5)}, tmp_path / "stats.pt")
    other = svgpipe(*base, "--diffusion", diffusion, "--stats", tmp_path / "stats.pt")
    assert other.code == 1 and "statistics of 196 channels, found 5" in other.err
    broken = torch.load(diffusion, weights_only=True)["ema"]
    for key, value, expected in (
        ("pos_embed", torch.zeros(0), "pos_embed: expected 3 dimensions"),
        ("blocks.0.attn.q_norm.weight", torch.ones(64), "invalid sizes"),
        ("blocks.1.mlp.fc1.bias", torch.full((128,), torch.inf), "fc1.bias: expected finite numbers, found 128 others"),
    ):
        torch.save({**broken, key: value}, tmp_path / "broken.pt")
        refused = svgpipe(*base, "--diffusion", tmp_path / "broken.pt", "--stats", official.folder / "stats.pt")
        assert refused.code == 1 and expected in refused.err
    (tmp_path / "short.ckpt").write_bytes(autoencoder.read_bytes()[:10_000])
    short = svgpipe("import-official", "--autoencoder", tmp_path / "short.ckpt", "--out", tmp_path / "o")
    assert short.code == 1 and "not a readable checkpoint" in short.err
    gone = svgpipe("import-official", "--autoencoder", tmp_path / "gone.ckpt", "--out", tmp_path / "o")
    assert gone.code == 1 and "found none" in gone.err
    (tmp_path / "two.txt").write_text("a\nb\n")
    names = svgpipe(
        *base, "--diffusion", diffusion, "--stats", official.folder / "stats.pt", "--class-names", tmp_path / "two.txt"
    )
    assert names.code == 1 and "expected 3 class names, found 2" in names.err


@pytest.mark.parametrize(
    ("name", "width", "depth", "heads"),
    [("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 16)],
)
@pytest.mark.parametrize(("qk_norm", "sigma"), [(True, False), (False, False), (True, True), (False, True)])
def test_published_sizes_are_recognised(
    name: str, width: int, depth: int, heads: int, qk_norm: bool, sigma: bool
) -> None:
    sizes: dict[str, Any] = {"grid": (16, 16), "in_channels": 392, "num_classes": 1000}
    with torch.device("meta"):
        model = DiT(**sizes, width=width, depth=depth, heads=heads, qk_norm=qk_norm, learn_sigma=sigma)
    found = dit_sizes(model.state_dict())
    assert (found.name, found.heads, found.grid, found.num_classes, found.learn_sigma) == (name, heads, 16, 1000, sigma)
    assert (found.in_channels, found.width, found.depth, found.qk_norm) == (392, width, depth, qk_norm)


def test_other_entries_of_a_checkpoint_are_listed(
    official: Official, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    state = torch.load(official.folder / "diffusion.pt", weights_only=True)["ema"]
    torch.save({"state_dict": state, "args": {"lr": 1e-4}}, tmp_path / "diffusion.pt")
    given = ["--autoencoder", official.folder / "autoencoder.ckpt", "--stats", official.folder / "stats.pt"]
    done = svgpipe("import-official", *given, "--diffusion", tmp_path / "diffusion.pt", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    diffusion = json.loads((tmp_path / "out" / "import.json").read_text())["imported"][1]
    assert diffusion["used"] == len(state) and list(diffusion["ignored"].values()) == [["args"]]


def test_keys_that_timm_would_drop_silently_are_reported(official: Official) -> None:
    state = torch.load(official.folder / "autoencoder.ckpt", weights_only=False)["state_dict"]
    for stray in ("encoder.projectors.0.weight", "encoder.blocks.0.rope_scale"):
        with pytest.raises(ValueError, match=f"1 keys have no place in an SVG autoencoder: {stray}"):
            split_autoencoder({**state, stray: torch.zeros(1)})
    # The smallest as a distilled one: of another width, whose biases are zero everywhere.
    wide = {"encoder.cls_token": torch.zeros(1, 1, 384)}
    biases = {key: torch.zeros_like(value) for key, value in state.items() if key.endswith("qkv.bias")}
    found = split_autoencoder({**state, **biases, **wide})
    assert sorted(found.ignored[NO_BIAS]) == sorted(biases)
    assert not [key for key in found.encoder if key.endswith("qkv.bias")]
