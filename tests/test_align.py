"""`train-diffusion --align`: two caches of one shard set in one training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.diffusion_section import AlignSection
from svgpipe.manifests.manifest import read_json
from svgpipe.manifests.metrics_file import read_metrics
from svgpipe.models.dit import DiT
from svgpipe.models.representation_alignment import ConvProjector, representation_loss, spatial_zscore
from svgpipe.pipeline.cli import main
from svgpipe.stages.train_diffusion.aligned import new_aligned
from svgpipe.stages.train_diffusion.alignment_target import alignment_target
from svgpipe.stages.train_diffusion.data import CacheBatches
from svgpipe.stages.train_diffusion.stage import train_diffusion

from .commands import run_and_kill
from .conftest import Finished, Outcome

ALIGN = "diffusion.align={depth: 1, width: 16}"


def align_args(kl: Path, finished: Finished, out: Path, *sets: str, align: Path | None = None) -> list[object]:
    """Arguments of a training on VAE latents that are aligned with the features of the finished cache."""
    more = [part for item in (ALIGN, *sets) for part in ("--set", item)]
    given = ["--cache", kl / "cache", "--align", align or finished.root / "cache", "--out", out]
    return ["train-diffusion", *given, "--recipe", finished.recipe_file, *more]


@pytest.fixture(scope="session")
def aligned(vaes: Path, finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished training."""
    out = tmp_path_factory.mktemp("aligned") / "diffusion"
    assert main([str(a) for a in align_args(vaes / "kl", finished, out)]) == 0
    return out


def logged(folder: Path) -> list[dict[str, float]]:
    return [entry for entry in read_metrics(folder / "metrics.jsonl") if "alignment" in entry]


def test_both_inputs_are_recorded_and_the_loss_is_logged(aligned: Path, vaes: Path, finished: Finished) -> None:
    inputs = read_json(aligned / "manifest.json")["inputs"]
    assert inputs["cache"]["fingerprint"] == FeatureCache(vaes / "kl" / "cache").manifest.fingerprint
    assert inputs["align"]["fingerprint"] == finished.cache.manifest.fingerprint
    entries = logged(aligned)
    assert len(entries) == 12 and all(-1 <= e["alignment"] <= 1 for e in entries)
    assert entries[-1]["alignment"] < entries[0]["alignment"]
    # Before the first update, the loss is that of a training without alignment, and half the loss of alignment.
    plain = next(e["loss"] for e in read_metrics(vaes / "kl" / "diffusion" / "metrics.jsonl") if "loss" in e)
    assert entries[0]["loss"] == pytest.approx(plain + 0.5 * entries[0]["alignment"], rel=1e-5)
    # The projector is only needed in training.
    assert not [key for key in load_file(aligned / "ema-0.9.safetensors") if "projector" in key]


def test_a_killed_training_ends_with_the_same_weights(
    aligned: Path, vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "killed"
    arguments = align_args(vaes / "kl", finished, out)
    run_and_kill(arguments, (out / "checkpoints" / "latest.json").exists)
    resumed = svgpipe(*arguments)
    assert resumed.code == 0 and "resumed at step" in resumed.err, resumed.err
    for name in ("raw.safetensors", "ema-0.9.safetensors"):
        whole, found = load_file(aligned / name), load_file(out / name)
        assert all(torch.equal(whole[key], found[key]) for key in whole)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_workers_take_the_same_course(
    aligned: Path, vaes: Path, finished: Finished, ray_session: None, tmp_path: Path, svgpipe: Callable[..., Outcome],
    strategy: str,
) -> None:  # fmt: skip
    done = svgpipe(
        *align_args(vaes / "kl", finished, tmp_path / "two", "diffusion.accumulate=2"),
        *("--workers", 2, "--strategy", strategy),
    )
    assert done.code == 0, done.err
    for name in ("loss", "alignment", "grad_norm"):
        ours, theirs = ([e[name] for e in logged(folder)] for folder in (tmp_path / "two", aligned))
        np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_rows_and_views_of_both_caches_belong_together(vaes: Path, finished: Finished) -> None:
    """The features of every row are those of the same image in the same view, as the vision model gave them."""
    cache, other = FeatureCache(vaes / "kl" / "cache"), finished.cache
    config = finished.recipe.diffusion.model_copy(update={"align": AlignSection(depth=1, width=16)})
    target = alignment_target(cache, config, other)
    assert target is not None and not target.own and target.channels == 112
    rows = cache.training_rows
    batches = iter(CacheBatches(cache, rows, config, 0, range(6), target=target))
    factor, offset = target.scaling()
    found = {}
    for batch in (next(batches) for _ in range(10)):
        assert batch.features is not None
        features = batch.features.float() * factor + offset
        for tokens, feature in zip(batch.tokens, features, strict=True):
            found[tokens.numpy().tobytes()] = feature
    seen = 0
    for view in ("original", "flip"):
        latents = torch.from_numpy(cache.read(rows, view)).flatten(1, 2)
        expected = torch.from_numpy(other.denormalize(other.read(rows, view)))[..., :112].flatten(1, 2)
        for latent, feature in zip(latents, expected, strict=True):
            if latent.numpy().tobytes() in found:
                torch.testing.assert_close(found[latent.numpy().tobytes()], feature)
                seen += 1
    assert seen > len(rows)


def test_a_cache_can_be_aligned_with_its_own_features(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """With and without --align, and with a copy in int8: own features are read once, others beside the latents."""
    given = ["train-diffusion", "--cache", finished.root / "cache", "--recipe", finished.recipe_file, "--set", ALIGN]
    assert svgpipe(*given, "--out", tmp_path / "own").code == 0
    named = svgpipe(*given, "--out", tmp_path / "named", "--align", finished.root / "cache")
    assert named.code == 0, named.err
    one, two = (load_file(tmp_path / name / "raw.safetensors") for name in ("own", "named"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    small = tmp_path / "int8"
    assert svgpipe("requantize", finished.root / "cache", "--out", small, "--store-dtype", "int8").code == 0
    other = svgpipe(*given, "--out", tmp_path / "other", "--align", small)
    assert other.code == 0, other.err
    losses = [[e["alignment"] for e in logged(tmp_path / name)] for name in ("own", "other")]
    np.testing.assert_allclose(losses[0], losses[1], atol=5e-4)


def test_irepa(vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    irepa = "diffusion.align={depth: 2, projector: conv, coefficient: 1.0, zscore: true}"
    done = svgpipe(*align_args(vaes / "kl", finished, tmp_path / "out", irepa))
    assert done.code == 0, done.err
    entries = logged(tmp_path / "out")
    assert entries[-1]["alignment"] < entries[0]["alignment"]
    plain = next(e["loss"] for e in read_metrics(vaes / "kl" / "diffusion" / "metrics.jsonl") if "loss" in e)
    assert entries[0]["loss"] == pytest.approx(plain + entries[0]["alignment"], rel=1e-5)
    raw = irepa.replace("zscore: true", "zscore: false")
    assert svgpipe(*align_args(vaes / "kl", finished, tmp_path / "raw", raw)).code == 0
    assert logged(tmp_path / "raw")[0]["alignment"] != entries[0]["alignment"]


def test_tokens_after_the_chosen_block_are_projected() -> None:
    torch.manual_seed(0)
    model = DiT(grid=(2, 2), in_channels=4, num_classes=3, width=16, depth=3, heads=2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x, t, y = torch.randn(2, 4, 4), torch.tensor([0.1, 0.9]), torch.tensor([0, 3])
    seen: list[torch.Tensor] = []
    model.blocks[1].register_forward_hook(lambda block, given, out: seen.append(out))
    aligned = new_aligned(model, AlignSection(depth=2, width=8), 5, seed=1)
    with torch.no_grad():
        velocity, _, projected = aligned(x, t, y)
        torch.testing.assert_close(projected, aligned.projector(seen[0]))
        torch.testing.assert_close(velocity, model(x, t, y))
    assert projected.shape == (2, 4, 5)


def test_rows_that_one_of_the_caches_rejects_are_not_trained_on(
    vaes: Path, finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, other = FeatureCache(vaes / "kl" / "cache"), FeatureCache(finished.root / "cache")
    rejected = cache.training_rows[:20]
    other.valid[rejected] = False
    read: list[int] = []
    original = FeatureCache.read_stored

    def watched(self: FeatureCache, rows: Any, views: Any) -> Any:
        read.extend(np.asarray(rows).tolist())
        return original(self, rows, views)

    monkeypatch.setattr(FeatureCache, "read_stored", watched)
    config = finished.recipe.diffusion.model_copy(update={"align": AlignSection(depth=1, width=16)})
    train_diffusion(cache, tmp_path / "out", config, align=other)
    assert set(read) == set(cache.training_rows[20:].tolist())


def test_copies_on_a_local_disk_change_nothing(
    aligned: Path, vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    disk = ["--local-cache", tmp_path / "disk", "--local-gb", 0.1]
    done = svgpipe(*align_args(vaes / "kl", finished, tmp_path / "out"), *disk)
    assert done.code == 0, done.err
    whole, found = (load_file(folder / "raw.safetensors") for folder in (aligned, tmp_path / "out"))
    assert all(torch.equal(whole[key], found[key]) for key in whole)
    assert not list((tmp_path / "disk").iterdir())


def test_caches_that_do_not_belong_together_are_refused(
    vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    kl, out = vaes / "kl", tmp_path / "out"
    posterior = svgpipe(*align_args(kl, finished, out, align=vaes / "aligned-kl" / "cache"))
    assert posterior.code == 2 and "found latents of a VAE" in posterior.err
    own = svgpipe(
        "train-diffusion", "--cache", kl / "cache", "--out", out, "--recipe", finished.recipe_file, "--set", ALIGN
    )
    assert own.code == 2 and "found latents of a VAE" in own.err and "--align" in own.err
    deep = svgpipe(*align_args(kl, finished, out, "diffusion.align.depth=3"))
    assert deep.code == 2 and "at most the model's 2 blocks, found 3" in deep.err
    patches = svgpipe(*align_args(kl, finished, out, "diffusion.model.patch_size=2"))
    assert patches.code == 2 and "2x2 places" in patches.err and "found 4x4" in patches.err
    assert not out.exists()
    for sets, word in (
        (["diffusion.align={depth: 3}"], "at most the model's 2 blocks"),
        (["diffusion.align={depth: 1}", "diffusion.model.patch_size=2"], "single cells"),
        (["diffusion.align={depth: 1}", "autoencoder.kind=kl"], "train-diffusion --align"),
        (["evaluation.guidance_channels=117"], "at most the model's 116 channels"),
    ):
        more = [part for item in sets for part in ("--set", item)]
        early = svgpipe("run", finished.recipe_file, "--workdir", tmp_path / "w", "--source", tmp_path, *more)
        assert early.code == 2 and word in early.err, early.err
        assert not (tmp_path / "w").exists()


def test_another_shard_set_is_refused_with_both_fingerprints(
    vaes: Path, finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    shards, cache = tmp_path / "shards", tmp_path / "cache"
    made = svgpipe("shard", photographs, "--out", shards, "--recipe", finished.recipe_file, "--holdout", 0.4)
    assert made.code == 0, made.err
    extracted = svgpipe(
        "extract", "--shards", shards, "--autoencoder", finished.root / "autoencoder", "--out", cache,
        "--recipe", finished.recipe_file,
    )  # fmt: skip
    assert extracted.code == 0, extracted.err
    found = svgpipe(*align_args(vaes / "kl", finished, tmp_path / "out", align=cache))
    assert found.code == 1
    for one in (vaes / "kl" / "cache", cache):
        assert FeatureCache(one).manifest.inputs["shards"].fingerprint[:12] in found.err


def test_flips_must_be_in_both(vaes: Path, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    cache = tmp_path / "cache"
    extracted = svgpipe(
        "extract", "--shards", finished.root / "shards", "--autoencoder", finished.root / "autoencoder", "--out", cache,
        "--recipe", finished.recipe_file, "--set", "extract.views=[original]",
    )  # fmt: skip
    assert extracted.code == 0, extracted.err
    found = svgpipe(*align_args(vaes / "kl", finished, tmp_path / "out", align=cache))
    assert found.code == 2 and "holds no flipped images" in found.err
    without = svgpipe(*align_args(vaes / "kl", finished, tmp_path / "out", "diffusion.use_flips=false", align=cache))
    assert without.code == 0, without.err
    other = svgpipe(*align_args(vaes / "kl", finished, tmp_path / "out", "diffusion.use_flips=false"))
    assert other.code == 1 and "inputs.align" in other.err


def test_projection_and_normalisation() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 6, 5) * 3 + 7
    scored = spatial_zscore(features)
    torch.testing.assert_close(scored.mean(1), torch.zeros(2, 5), atol=1e-5, rtol=0)
    torch.testing.assert_close(scored.std(1), torch.ones(2, 5), atol=1e-4, rtol=0)
    torch.testing.assert_close(representation_loss(features, 2 * features), -torch.ones(2))
    torch.testing.assert_close(representation_loss(features, -features), torch.ones(2))
    conv = ConvProjector(4, 5, (2, 3))
    tokens = torch.randn(2, 6, 4)
    expected = conv.conv(tokens.view(2, 2, 3, 4).permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(2, 6, 5)
    torch.testing.assert_close(conv(tokens), expected)
