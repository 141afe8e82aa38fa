"""Protocols of measurement: ADM's figures, other feature spaces, several seeds."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg

from svgpipe.manifests import feature_spaces
from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.evaluation import EvaluationManifest, Report
from svgpipe.manifests.evaluation_section import ExtractorSection
from svgpipe.manifests.feature_spaces import Space, SpaceName
from svgpipe.manifests.recipe_loader import load_recipe, recipe_yaml
from svgpipe.models.feature_distances import FrechetTarget
from svgpipe.stages.evaluate import metrics, reference_npz
from svgpipe.stages.evaluate.decode_latents import decoded_images
from svgpipe.stages.evaluate.features import POOLED, SPATIAL, load_extractor, space_extractor
from svgpipe.stages.evaluate.metrics import Comparison, Features
from svgpipe.stages.images.image_set import ImageSet

from .conftest import Finished, Outcome


def eval_args(finished: Finished, out: Path, *more: object) -> list[object]:
    return [
        "sample-and-eval",
        *("--diffusion", finished.root / "diffusion"),
        *("--autoencoder", finished.root / "autoencoder"),
        *("--pool", finished.root),
        *("--out", out),
        *("--recipe", finished.recipe_file),
        *("--steps", "1", "--guidance", "1.0"),
        *more,
    ]


def test_a_protocol_fills_in_what_is_not_given(tmp_path: Path) -> None:
    edm2 = load_recipe("demo", ["evaluation.protocol=edm2"]).evaluation
    assert (edm2.num_samples, edm2.seeds, edm2.spaces_used) == (50_000, 3, {"dinov2-l": "hub"})
    assert edm2.extractor.kind == "inception" and edm2.deviations() == []
    # Files of weights belong to the protocol; another network or number does not.
    files = ["evaluation.spaces.dinov2-l=dino.pth", "evaluation.extractor.weights=inception.pth"]
    assert load_recipe("demo", ["evaluation.protocol=edm2", *files]).evaluation.deviations() == []
    fewer = load_recipe(
        "demo", ["evaluation.num_samples=9", "evaluation.protocol=fdr6", "evaluation.spaces.mae-l=null"]
    )
    assert list(fewer.evaluation.spaces_used) == ["convnextv2-b", "dinov2-l", "siglip-so400m", "clip-l"]
    assert [text.partition(":")[0] for text in fewer.evaluation.deviations()] == ["num_samples", "spaces"]
    file = tmp_path / "mine.yaml"
    file.write_text("extends: demo\nevaluation: {protocol: adm, preset: repa, bootstrap: 0}\n")
    both = load_recipe(str(file)).evaluation
    assert (both.spatial_distance, both.inception_in_order, both.steps) == (True, True, (250,))
    assert both.deviations() == []
    file.write_text(recipe_yaml(load_recipe(str(file))))
    again = load_recipe(str(file)).evaluation
    assert again == both
    other = load_recipe(str(file), ["evaluation.protocol=fdr6"]).evaluation
    assert not other.spatial_distance and len(other.spaces_used) == 5  # nothing of the first protocol is left
    assert load_recipe("demo", ["evaluation.protocol=custom"]) == load_recipe("demo")
    for wrong, said in (
        ("protocol=adn", "evaluation.protocol: expected 'adm'"),
        ("spaces.dino=hub", "evaluation.spaces.dino"),
        ("spatial_distance=true", "spatial_distance needs extractor.kind inception, found backbone"),
        ("seeds=0", "evaluation.seeds"),
    ):
        with pytest.raises(UsageError, match=said):
            load_recipe("demo", [f"evaluation.{wrong}"])


def adm_frechet(first: np.ndarray, second: np.ndarray) -> float:
    """guided-diffusion's formula: the trace of the square root of a product of covariances."""
    means, covariances = [x.mean(0) for x in (first, second)], [np.cov(x, rowvar=False) for x in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    return float(np.square(means[0] - means[1]).sum() + np.trace(covariances[0] + covariances[1] - 2 * root))


def adm_score(logits: np.ndarray, split: int) -> float:
    """guided-diffusion's formula: mean over splits of the images in their order."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    parts = [p[start : start + split] for start in range(0, len(p), split)]
    return float(np.mean([np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in parts]))


def adm_precision(reference: np.ndarray, samples: np.ndarray) -> tuple[float, float]:
    """guided-diffusion's formula: squared distances, and the third nearest besides the image itself."""

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.maximum(np.square(a).sum(1)[:, None] - 2 * a @ b.T + np.square(b).sum(1), 0)

    radii = [np.partition(squared(x, x), range(4), axis=1)[:, 3] for x in (reference, samples)]
    between = squared(reference, samples)
    return float((between <= radii[0][:, None]).any(0).mean()), float((between <= radii[1]).any(1).mean())


def test_the_figures_of_adm_are_those_of_its_formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "ADM_SPLIT", 50)
    rng = np.random.default_rng(0)
    pooled, real = rng.normal(0.2, 1.2, (230, 12)), rng.normal(0, 1, (180, 12))
    spatial, real_spatial = rng.normal(1, 1, (230, 9)), rng.normal(0, 2, (400, 9))
    logits = rng.normal(0, 3, (230, 17)) + np.linspace(0, 4, 230)[:, None] * np.eye(17)[0]  # the order matters

    def rows(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(x).float()

    # As from an .npz: some images, and statistics of more spatial features.
    target = FrechetTarget(torch.from_numpy(real_spatial.mean(0)), torch.from_numpy(np.cov(real_spatial, rowvar=False)))
    comparison = Comparison(Features(rows(real)), 0, 0, spatial_target=target, in_order=True)
    found = comparison.measure(Features(rows(pooled), rows(logits), rows(spatial)))
    values = {name: getattr(found[name], "value", None) for name in found}
    assert values["frechet_distance"] == pytest.approx(adm_frechet(pooled, real), rel=1e-4)
    assert values["spatial_distance"] == pytest.approx(adm_frechet(spatial, real_spatial), rel=1e-4)
    assert values["inception_score"] == pytest.approx(adm_score(logits, 50), rel=1e-4)
    precision, recall = adm_precision(real.astype(np.float32), pooled.astype(np.float32))
    assert (values["precision"], values["recall"]) == pytest.approx((precision, recall))
    shuffled = Comparison(Features(rows(real)), 0, 0).measure(Features(rows(pooled), rows(logits)))
    assert getattr(shuffled["inception_score"], "value", 0) != pytest.approx(values["inception_score"], rel=1e-3)


def test_spatial_features_are_seven_channels_of_a_block(finished: Finished, inception_file: Path) -> None:
    section = ExtractorSection(kind="inception", weights=str(inception_file))
    extractor = load_extractor(section, None, spatial=True)
    images = decoded_images(finished.root / "evaluation", "reconstructions")
    found = extractor.features(images.all_pixels(), 4)
    assert found[SPATIAL].shape == (6, 2023) and found[SPATIAL].dtype == torch.float32
    maps: list[torch.Tensor] = []
    plain = load_extractor(section, None)
    plain.module.Mixed_6d.branch1x1.register_forward_hook(lambda _, __, output: maps.append(output))  # type: ignore[union-attr]
    others = plain.features(images.all_pixels(), 6)
    expected = maps[0][:, :7].permute(0, 2, 3, 1).reshape(6, 17 * 17 * 7)
    torch.testing.assert_close(found[SPATIAL], expected, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found[POOLED], others[POOLED], rtol=1e-3, atol=1e-5)


def test_adm_s_protocol_with_an_npz_as_reference(
    finished: Finished,
    inception_file: Path,
    tmp_path: Path,
    svgpipe: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Distances to its statistics, precision and recall to its images, which are unpacked once."""
    monkeypatch.setattr(reference_npz, "PER_TAR", 20)
    usable = finished.shards.usable("train")
    pixels = np.stack([ImageSet(usable, 32).pixels(i) for i in range(len(usable))])
    rng = np.random.default_rng(0)
    moments = {f"mu{end}": rng.normal(size=size) for end, size in (("", 2048), ("_s", 2023))}
    moments |= {f"sigma{end}": np.eye(size) for end, size in (("", 2048), ("_s", 2023))}
    arrays: dict[str, Any] = {"arr_0": pixels, **moments}
    np.savez(tmp_path / "adm.npz", **arrays)
    weights = ["--set", f"evaluation.extractor.weights={inception_file}", "--set", "evaluation.num_samples=6"]
    arguments = eval_args(finished, tmp_path / "out", "--protocol", "adm", *weights, "--set", "evaluation.bootstrap=0")
    done = svgpipe(*arguments, "--reference", tmp_path / "adm.npz")
    assert done.code == 0, done.err
    report = Report.read(tmp_path / "out")
    assert (report.protocol, report.reference.kind, report.reference.num_images) == ("adm", "npz", len(usable))
    assert [text.partition(":")[0] for text in report.deviations] == ["num_samples"]
    extractor = load_extractor(ExtractorSection(weights=str(inception_file)), None, spatial=True)
    drawn = extractor.features(decoded_images(tmp_path / "out", "steps-001_guidance-1").all_pixels(), 6)
    by_name = {result.name: result for result in report.results}
    sample = by_name["steps-001_guidance-1"]
    for distance, layer, end in (
        (sample.frechet_distance, POOLED, ""),
        (sample.spatial_distance, SPATIAL, "_s"),
    ):
        target = FrechetTarget(torch.from_numpy(moments[f"mu{end}"]), torch.from_numpy(moments[f"sigma{end}"]))
        assert distance is not None and distance.value == pytest.approx(target.distance(drawn[layer]), rel=1e-4)
    real = extractor.features(ImageSet(usable, 32).all_pixels(), 6)
    precision, recall = adm_precision(real[POOLED].numpy(), drawn[POOLED].numpy())
    assert sample.precision is not None and sample.precision.value == pytest.approx(precision)
    assert sample.recall is not None and sample.recall.value == pytest.approx(recall)
    page = (tmp_path / "out/report.html").read_text()
    for words in ("<strong>Protocol adm</strong>, with deviations: num_samples", ">sFID<", "adm.npz"):
        assert words in page
    assert svgpipe("verify", tmp_path / "out", "--deep").code == 0
    # Unpacked images that were deleted are unpacked again.
    (folder,) = (finished.root / "features/reference-hashes").glob("npz-*")
    tars = sorted(folder.glob("*.tar"))
    assert len(tars) == -(-len(usable) // 20)
    before = [tar.read_bytes() for tar in tars]
    tars[1].unlink()
    assert svgpipe(*arguments, "--reference", tmp_path / "adm.npz").code == 0
    assert [tar.read_bytes() for tar in tars] == before
    whole = (tmp_path / "adm.npz").read_bytes()
    np.savez(tmp_path / "wrong.npz", arr_0=pixels.astype(np.float32))
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    for name, said in (("wrong", "expected images (n,H,W,3) uint8 in arr_0"), ("cut", "not a readable .npz")):
        refused = svgpipe(*arguments, "--reference", tmp_path / f"{name}.npz")
        assert refused.code == 1 and said in refused.err and "Traceback" not in refused.err


SMALL: dict[SpaceName, Space] = {"dinov2-l": Space("vit_tiny_patch16_224", 32), "mae-l": Space("resnet10t", 32)}


def test_spaces_and_seeds(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With small networks in the place of two of the published ones, and two seeds."""
    for name, space in SMALL.items():
        monkeypatch.setitem(feature_spaces.SPACES, name, space)
    asked = [f"evaluation.spaces.{name}=random" for name in SMALL]
    more = [part for text in [*asked, "evaluation.seeds=2", "evaluation.bootstrap=0"] for part in ("--set", text)]
    arguments = eval_args(finished, tmp_path / "out", "--reference", finished.root / "shards", *more)
    done = svgpipe(*arguments)
    assert done.code == 0, done.err
    report = Report.read(tmp_path / "out")
    names = ["steps-001_guidance-1", "steps-001_guidance-1_seed-1"]
    assert EvaluationManifest.read(tmp_path / "out").settings == names
    samples = [result for result in report.results if result.sampler is not None]
    assert [result.sampler.seed for result in samples if result.sampler] == [0, 1]
    assert samples[0].frechet_distance.value == pytest.approx(
        next(r for r in Report.read(finished.root / "evaluation").results if r.name == names[0]).frechet_distance.value
    )
    real = next(result for result in report.results if result.role == "heldout")
    for result in report.results:
        ratios = [result.frechet_distance.value / real.frechet_distance.value]
        ratios += [result.spaces[name].value / real.spaces[name].value for name in SMALL]
        assert result.distance_ratio == pytest.approx(statistics.mean(ratios))
    assert real.distance_ratio == pytest.approx(1)
    extractor = space_extractor("mae-l", "random")
    sets = [ImageSet(finished.shards.usable("train"), 32), decoded_images(tmp_path / "out", names[1])]
    train, drawn = (extractor.features(images.all_pixels(), 4)[POOLED] for images in sets)
    assert samples[1].spaces["mae-l"].value == pytest.approx(FrechetTarget.of(train).distance(drawn), rel=1e-4)
    spread = {one.space: one for one in report.seeds}
    assert list(spread) == [report.extractor.name, *SMALL] and spread["mae-l"].seeds == [0, 1]
    values = [result.spaces["mae-l"].value for result in samples]
    assert spread["mae-l"].minimum == min(values) and spread["mae-l"].mean == pytest.approx(statistics.mean(values))
    assert spread["mae-l"].deviation == pytest.approx(statistics.stdev(values))
    page = (tmp_path / "out/report.html").read_text()
    for words in ("FDr3", "the published FDr6 has six spaces", "Over 2 seeds", "1 step, guidance 1, seed 1"):
        assert words in page
    # Another seed samples nothing that was sampled, and a resumed run measures nothing again.
    shutil.rmtree(tmp_path / "out/images")
    (tmp_path / "out/manifest.json").unlink()
    before = (tmp_path / "out/report.json").read_text()
    assert svgpipe(*arguments).code == 0 and (tmp_path / "out/report.json").read_text() == before
    gone = [*eval_args(finished, tmp_path / "gone", "--reference", finished.root / "shards")]
    refused = svgpipe(*gone, "--set", f"evaluation.spaces.clip-l={tmp_path / 'clip.pth'}")
    assert refused.code == 1 and "clip.pth: expected a weight file, found none" in refused.err
    hub = svgpipe(*gone, "--set", "evaluation.spaces.mae-l=hub")
    assert hub.code == 1 and "--set evaluation.spaces.mae-l=FILE" in hub.err
    assert not (tmp_path / "gone/images").exists()


def test_statistics_alone_have_no_other_spaces(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(feature_spaces.SPACES, "mae-l", SMALL["mae-l"])
    name = Report.read(finished.root / "evaluation").extractor.name
    np.savez(tmp_path / "stats.npz", mu=np.zeros(1280), sigma=np.eye(1280), extractor=name)
    more = ("--set", "evaluation.spaces.mae-l=random", "--set", "evaluation.bootstrap=0")
    done = svgpipe(*eval_args(finished, tmp_path / "out", "--reference", tmp_path / "stats.npz", *more))
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert any("distances in other spaces: the reference is statistics" in why for why in report["not_measured"])
