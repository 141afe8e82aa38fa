"""Sampling and evaluation: results are traceable and repeatable."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from PIL import Image

from svgpipe.manifests import feature_store
from svgpipe.manifests.autoencoder_section import BackboneSection
from svgpipe.manifests.checkpoint import save_tensors
from svgpipe.manifests.errors import ArtifactError, MismatchError, UsageError
from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation import EvaluationManifest, Report
from svgpipe.manifests.evaluation_section import ExtractorSection, SDESection
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import file_sha256, write_atomic
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.model_manifests import STATISTICS_FILE, AutoencoderManifest
from svgpipe.manifests.reconstruction import ReconstructionReport
from svgpipe.manifests.shards import shard_name
from svgpipe.models.sampler import time_grid
from svgpipe.pipeline import cluster, overview
from svgpipe.pipeline import report as report_page
from svgpipe.pipeline.page import picture
from svgpipe.stages.evaluate import extracted_features, features
from svgpipe.stages.evaluate import sample_latents as latents_stage
from svgpipe.stages.evaluate.cpu_tasks import LatentsUnit
from svgpipe.stages.evaluate.decode_latents import decoded_images
from svgpipe.stages.evaluate.extracted_features import extracted
from svgpipe.stages.evaluate.features import Extractor, load_extractor
from svgpipe.stages.evaluate.reference import RealSets, open_reference, shard_reference
from svgpipe.stages.images.decode import RGBArray, decode_image, to_array
from svgpipe.stages.images.image_set import ImageSet
from svgpipe.stages.networks.autoencoder import latent_decoder
from svgpipe.stages.networks.backbone import build_backbone, state_digest
from svgpipe.stages.networks.diffusion import open_diffusion
from svgpipe.stages.networks.downloads import Download
from svgpipe.stages.networks.guided_model import GuidedModel
from svgpipe.stages.networks.sampling import SamplerSettings, initial_noise, keep_as_computed, labels_of, sample_latents

from .commands import run_and_kill
from .conftest import Finished, Outcome, tree_bytes

PAIRS = 2 * 6  # pictures of samples and of the images nearest to them
SETTINGS = ["steps-001_guidance-1", "steps-002_guidance-1", "steps-001_guidance-1.5", "steps-002_guidance-1.5"]


def eval_args(finished: Finished, out: Path, *more: object) -> list[object]:
    return [
        "sample-and-eval",
        *("--diffusion", finished.root / "diffusion"),
        *("--autoencoder", finished.root / "autoencoder"),
        *("--reference", finished.root / "shards"),
        *("--out", out),
        *("--recipe", finished.recipe_file),
        *more,
    ]


def latents_of(evaluation: Path, setting: str) -> Path:
    return evaluation / EvaluationManifest.read(evaluation).latents[setting].path


def sweep_bytes(evaluation: Path) -> dict[str, bytes]:
    """Images, report and latents of one evaluation. Other evaluations may have put their latents into the same pool."""
    found = tree_bytes(evaluation, "images/**/*", "report.json")
    for setting in EvaluationManifest.read(evaluation).settings:
        latents = tree_bytes(latents_of(evaluation, setting), "features/c/**/*")
        found |= {f"{setting}/{name}": content for name, content in latents.items()}
    return found


def test_noise_and_labels_depend_on_seed_and_index_only() -> None:
    together = initial_noise(5, range(7), 4, 3)
    torch.testing.assert_close(initial_noise(5, [3], 4, 3)[0], together[3], rtol=0, atol=0)
    assert not torch.equal(initial_noise(6, [3], 4, 3)[0], together[3])
    assert not torch.equal(together[0], together[1])
    assert labels_of(range(7), range(3)).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert abs(initial_noise(0, range(50), 16, 16).std().item() - 1) < 0.02


def test_latents_do_not_depend_on_the_batch(finished: Finished) -> None:
    model = open_diffusion(finished.root / "diffusion").load()
    settings = SamplerSettings(3, 2.0, "heun", "constant", 0.15, 0, "float32", "ema")
    together = sample_latents(model, range(5), settings, torch.device("cpu"))
    alone = torch.cat([sample_latents(model, [i], settings, torch.device("cpu")) for i in range(5)])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-4)


def test_latents_are_stored_in_the_cache_format(finished: Finished) -> None:
    latents = EvaluationManifest.read(finished.root / "evaluation").latents
    assert list(latents) == SETTINGS
    model = open_diffusion(finished.root / "diffusion").load()
    for name in SETTINGS:
        store = FeatureStore.open(latents_of(finished.root / "evaluation", name))
        assert store.array("label").tolist() == [0, 1, 2, 0, 1, 2, 0, 1]  # whole outer shards of four
        sampler = SamplerSettings(**store.group.attrs["sampler"])  # type: ignore[arg-type]
        assert sampler.name == name
        expected = sample_latents(model, range(6), sampler, torch.device("cpu")).reshape(6, 4, 4, 116)
        np.testing.assert_allclose(store.read(range(6)), expected.numpy(), rtol=2e-3, atol=2e-3)


def test_decoded_images_are_webdataset_tars_of_those_latents(finished: Finished) -> None:
    out = finished.root / "evaluation"
    store = FeatureStore.open(latents_of(out, SETTINGS[1]))
    decode = latent_decoder(finished.root / "autoencoder")
    expected = decode(finished.cache.denormalize(store.read(range(6))))
    tars = sorted((out / "images" / SETTINGS[1]).glob("*.tar"))
    assert len(tars) == 2
    samples = [s for tar in tars for s in wds.WebDataset(str(tar), shardshuffle=False, empty_check=False)]
    assert [int(s["cls"]) for s in samples] == [0, 1, 2, 0, 1, 2]
    found = np.stack([to_array(decode_image(s["png"])) for s in samples])
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


def test_samples_are_written_as_npz_and_png(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Exports of a finished evaluation; nothing is computed again."""
    out = tmp_path / "evaluation"
    shutil.copytree(finished.root / "evaluation", out)
    left = [out / "npz" / ".a.npz.0.partial", out / "png" / SETTINGS[0] / ".0.png.0.partial"]
    for partial in left:
        partial.parent.mkdir(parents=True)
        partial.write_bytes(b"of a killed export")
        os.utime(partial, (time.time() - 7200, time.time() - 7200))
    found = svgpipe(*eval_args(finished, out, "--npz", "--png"))
    assert not any(partial.exists() for partial in left)
    assert found.code == 0, found.err
    assert f"images: {out / 'npz' / SETTINGS[0]}.npz" in found.out
    for name in SETTINGS:
        images = decoded_images(out, name)
        with np.load(out / "npz" / f"{name}.npz") as arrays:
            assert arrays["arr_0"].dtype == np.uint8
            np.testing.assert_array_equal(arrays["arr_0"], np.stack([images.pixels(i) for i in range(6)]))
            assert arrays["arr_1"].tolist() == [0, 1, 2, 0, 1, 2]
        files = sorted((out / "png" / name).iterdir())
        assert [file.read_bytes() for file in files] == [ref.read() for ref in images.refs]
    written = (out / "npz" / f"{SETTINGS[0]}.npz").stat().st_mtime_ns
    assert svgpipe(*eval_args(finished, out, "--npz")).code == 0
    assert (out / "npz" / f"{SETTINGS[0]}.npz").stat().st_mtime_ns == written
    cut, empty = out / "npz" / f"{SETTINGS[1]}.npz", out / "png" / SETTINGS[1] / "00000000.png"
    whole = [cut.read_bytes(), empty.read_bytes()]
    cut.write_bytes(whole[0][:-100])
    empty.write_bytes(b"")
    assert svgpipe(*eval_args(finished, out, "--npz", "--png")).code == 0
    assert [cut.read_bytes()[:1000], empty.read_bytes()] == [whole[0][:1000], whole[1]]
    assert cut.stat().st_size == len(whole[0])


def test_a_report_that_was_altered_is_not_shown(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """The message says what to do, and that restores it."""
    out, pool = tmp_path / "evaluation", ["--pool", finished.root]
    shutil.copytree(finished.root / "evaluation", out)
    before = (out / "report.json").read_text()
    (out / "report.json").write_text(before.replace('"value": ', '"value": 1', 1))
    refused = svgpipe(*eval_args(finished, out, *pool))
    assert refused.code == 1 and f"Delete {out / 'manifest.json'} and run the same command" in refused.err
    shutil.rmtree(out / "images" / SETTINGS[0])
    (out / "manifest.json").unlink()
    assert svgpipe(*eval_args(finished, out, *pool)).code == 0
    assert (out / "report.json").read_text() == before and svgpipe("verify", out, "--deep").code == 0


def test_journal_records_of_another_form_are_missing_units(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    for folder in ("evaluation", "latents"):
        shutil.copytree(finished.root / folder, tmp_path / folder)
    out = tmp_path / "evaluation"
    for record in (
        out / f"journal/decode/{SETTINGS[0]}-000000.json",
        latents_of(out, SETTINGS[0]) / "journal/unit-000000.json",
    ):
        for content in (
            "{}",
            '{"sha256": "a", "num_bytes": 1, "rows": 0}',
            '{"set": 1, "shard": null, "rows": "x"}',
            "[]",
            "no JSON",
        ):
            record.write_text(content)
            found = svgpipe("verify", out)
            assert found.code == 1 and "journal" in found.out, content
    (out / "manifest.json").unlink()
    (out / "plan.json").write_text("{}")
    for command in (eval_args(finished, out), ["inspect", out], ["status", tmp_path]):
        refused = svgpipe(*command)
        assert refused.code == 1 and "plan.json: expected kind, config and inputs" in refused.err


def test_the_report_traces_every_number(finished: Finished) -> None:
    out = finished.root / "evaluation"
    report = Report.read(out)
    assert "not FID" in report.metric
    assert "tf_efficientnet_lite0" in report.metric
    samples = [r for r in report.results if r.role == "samples"]
    assert [r.name for r in samples] == SETTINGS
    assert all(r.num_images == 6 and r.frechet_distance.value > 0 for r in samples)
    for key in ("steps", "guidance", "solver", "guidance_mode", "time_shift", "seed", "precision", "weights"):
        assert all(key in r.sampler.model_dump() for r in samples if r.sampler)
    roles = {r.role: r for r in report.results}
    assert set(roles) == {"samples", "heldout", "reconstructions", "decoded-noise"}
    assert roles["heldout"].frechet_distance.value < roles["decoded-noise"].frechet_distance.value
    assert roles["reconstructions"].psnr is not None
    for r in report.results:
        assert r.frechet_distance.low is not None
        assert r.frechet_distance.high is not None
        assert r.frechet_distance.low <= r.frechet_distance.value <= r.frechet_distance.high
        assert r.precision is not None
        assert r.recall is not None
        assert (r.precision.num_images, r.recall.num_images) == (r.num_images, 30)
    assert any("Inception Score" in text for text in report.not_measured)
    assert report.reference.num_images == 30
    manifest = EvaluationManifest.read(out)
    assert set(manifest.inputs) == {"diffusion", "autoencoder", "reference"}
    assert report.inputs == {name: ref.fingerprint for name, ref in manifest.inputs.items()}
    assert report.diffusion.weights_sha256 == open_diffusion(finished.root / "diffusion").weights_sha256("ema-0.9")
    assert (report.diffusion.steps, report.num_samples) == (12, 6)
    assert {"svgpipe", "torch", "timm", "torch-fidelity"} < set(report.software)


def test_the_report_names_the_images_that_samples_are_nearest_to(finished: Finished) -> None:
    """Found again from the features of both sets; without 100 held-out images, no sample is called a near-copy."""
    out = finished.root / "evaluation"
    report = Report.read(out)
    sets = RealSets.of(shard_reference(finished.shards), finished.recipe.evaluation, report.image_size)
    encoder = AutoencoderManifest.read(finished.root / "autoencoder")
    section = finished.recipe.evaluation.extractor
    extractor = features.extractor_for(section, encoder, finished.root / "autoencoder")
    real, samples = (
        extracted(finished.root, images, extractor, 4)["pooled"]
        for images in (ImageSet(sets.reference, report.image_size), decoded_images(out, SETTINGS[0]))
    )
    measured = next(r for r in report.results if r.name == SETTINGS[0])
    assert measured.nearest is not None and measured.nearest.near_copies is None
    distances, rows = torch.cdist(samples, real).min(1)
    order = distances.argsort().tolist()
    found = measured.nearest.closest
    assert [pair.image for pair in found] == order
    assert [pair.name for pair in found] == [sets.reference[int(rows[i])].name for i in order]
    assert re.fullmatch(r"shard-\d+\.tar: \d{8}", found[0].name)
    assert [pair.distance for pair in found] == pytest.approx(distances[order].tolist(), rel=1e-3)
    assert any("share of near-copies: it needs 100 held-out images" in reason for reason in report.not_measured)


def test_every_field_of_the_report_is_documented_beside_it(finished: Finished) -> None:
    schema = json.loads((finished.root / "evaluation" / "report.schema.json").read_text())
    report = json.loads((finished.root / "evaluation" / "report.json").read_text())
    assert set(schema["properties"]) == set(report)
    assert set(schema["$defs"]["Measured"]["properties"]) == set(report["results"][0])
    for found in (schema, ReconstructionReport.model_json_schema()):
        for record in (found, *found["$defs"].values()):
            assert not [name for name, field in record["properties"].items() if not field.get("description")]


def test_the_page_is_self_contained_and_shows_everything(finished: Finished) -> None:
    page = (finished.root / "evaluation" / "report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)
    assert "<script" not in page
    assert page.count("<figure ") == 6 + 6 + 2 * 6 + 6 + PAIRS
    assert len(page) < 10_000_000
    # Every picture is a link to itself, which enlarges it without a script; closing leads back to its grid.
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(re.findall(r'href="#([^"]+)"', page)) <= set(ids)
    assert all(re.findall(r'alt="([^"]*)"', page))
    headings = ("Real images", "Reconstructions", "Samples, ", "Steps side by side, guidance 1.5")
    for words in (
        *headings,
        "What the paper reports",
        "decoded noise (ceiling)",
        "held-out real",
        "Copies of reference images",
    ):
        assert words in page
    for artifact in ("shards", "autoencoder", "cache", "diffusion"):
        manifest = json.loads((finished.root / artifact / "manifest.json").read_text())
        assert manifest["fingerprint"][:12] in page
    assert page.count('aria-label="Distance against steps"') == 1
    for curve in ("autoencoder: held-out psnr", "autoencoder: l1", "diffusion: loss", "diffusion: held-out loss"):
        assert f">{curve}</text>" in page
    # The result comes before the numbers.
    order = ['class="overview"', 'aria-label="Distance against steps"', "Distances to the reference", "<table>"]
    assert [page.index(part) for part in order] == sorted(page.index(part) for part in order)


def test_the_overview_has_a_row_per_set_and_a_column_per_class(finished: Finished) -> None:
    evaluation, classes, rows = finished.root / "evaluation", 3, ["real", "reconstructed", "1 step", "2 steps"]
    with Image.open(evaluation / "report-overview.webp") as picture:
        shown = np.asarray(picture.convert("RGB"))
    step = overview.TILE + overview.GAP
    assert shown.shape[:2] == (len(rows) * step - overview.GAP, overview.LABEL_WIDTH + classes * step)
    report = Report.read(evaluation)
    best = min((r for r in report.results if r.sampler), key=lambda r: r.frechet_distance.value)
    found = overview.overview_rows(
        evaluation,
        report,
        best,
        RealSets.of(shard_reference(finished.shards), finished.recipe.evaluation, report.image_size),
    )
    assert [row.label for row in found] == rows and all(len(row.images) == classes for row in found)
    real, reconstructed = (np.stack(row.images) / 255 for row in found[:2])
    errors = np.square(real[:, None] - reconstructed).mean((2, 3, 4))
    assert errors.argmin(1).tolist() == list(range(classes))  # each is below its original
    for number, row in enumerate(found):
        for column, pixels in enumerate(row.images):
            left = overview.LABEL_WIDTH + column * step
            tile = shown[number * step : number * step + overview.TILE, left : left + overview.TILE]
            assert np.abs(tile.mean((0, 1)) - pixels.mean((0, 1))).max() < 6


def test_a_page_of_a_large_sweep_stays_small(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer rows per setting; no picture is larger than a thumbnail."""
    out = tmp_path / "evaluation"
    shutil.copytree(finished.root / "evaluation", out)
    monkeypatch.setattr(report_page, "SIDE_BY_SIDE", 8)
    places = (finished.root / "autoencoder", finished.root / "diffusion", open_reference(str(finished.root / "shards")))
    page = report_page.render_report(out, *places).read_text()
    assert page.count("<figure ") == 6 + 6 + 2 * (2 * 2) + 6 + PAIRS
    large = picture(np.zeros((300, 600, 3), np.uint8), "")
    with Image.open(io.BytesIO(base64.b64decode(large.data.partition(",")[2]))) as image:
        assert image.size == (256, 128)


def test_a_report_of_another_layout_is_named_and_its_evaluation_inspected(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "evaluation"
    shutil.copytree(finished.root / "evaluation", out)
    report = json.loads((out / "report.json").read_text())
    (out / "report.json").write_text(json.dumps({**report, "schema_version": 3}))
    with pytest.raises(ArtifactError, match=r"of layout 4, found 3\. .* run the command again"):
        Report.read(out)
    shown = json.loads(svgpipe("inspect", out, "--json").out)
    assert "of layout 4, found 3" in json.dumps(shown) and shown["kind"] == "evaluation"


def test_few_samples_of_many_classes_are_shown(finished: Finished, tmp_path: Path) -> None:
    """The sampled classes need not be evenly spread."""
    report = Report.read(finished.root / "evaluation")
    samples = [r for r in report.results if r.role == "samples"][:2]
    names = [*report.class_names, *(f"class {i}" for i in range(97))]
    found = report_page._side_by_side(finished.root / "evaluation", names, "title", "steps", samples, 10)
    assert len(found.pictures) == 2 * 3 and found.note.endswith("columns: steps 1, 2")


def page_of(finished: Finished, out: Path, monkeypatch: pytest.MonkeyPatch, chosen: list[str]) -> str:
    """Return the page of the finished evaluation with only some of its settings."""
    shutil.copytree(finished.root / "evaluation", out)
    report = Report.read(out)
    kept = [r for r in report.results if r.role != "samples" or r.name in chosen]
    monkeypatch.setattr(Report, "read", lambda _: report.model_copy(update={"results": kept}))
    places = (finished.root / "autoencoder", finished.root / "diffusion", open_reference(str(finished.root / "shards")))
    return report_page.render_report(out, *places).read_text()


def test_the_report_compares_guidance_if_steps_do_not_vary(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of(finished, tmp_path / "out", monkeypatch, [SETTINGS[1], SETTINGS[3]])
    assert "Guidance side by side, 2 steps" in page and "columns: guidance 1, 1.5" in page
    assert page.count("<figure ") == 6 + 6 + 2 * 3 + 6 + PAIRS


def test_a_single_setting_is_shown_once(finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of(finished, tmp_path / "out", monkeypatch, SETTINGS[:1])
    assert "side by side" not in page and page.count("<figure ") == 6 + 6 + 6 + PAIRS
    assert "Lowest distance: <strong>1 step</strong>." in page


def test_the_page_shows_zero_steps_of_an_untrained_autoencoder(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untrained = AutoencoderManifest.read(finished.root / "autoencoder").model_copy(update={"steps": 0})
    monkeypatch.setattr(AutoencoderManifest, "read", lambda _: untrained)
    assert "Autoencoder: 0 steps" in page_of(finished, tmp_path / "out", monkeypatch, SETTINGS)


def test_the_chart_runs_from_few_steps_to_many(finished: Finished) -> None:
    samples = [r for r in Report.read(finished.root / "evaluation").results if r.role == "samples"][:2]
    assert report_page._distance_chart(samples[::-1], {}) == report_page._distance_chart(samples, {})


@pytest.mark.parametrize(("ceiling", "logarithmic"), [(40.0, False), (400.0, True)])
def test_the_chart_is_logarithmic_if_the_ceiling_is_far_above(ceiling: float, logarithmic: bool) -> None:
    series = {"guidance 1": [Estimate(value=value, num_images=9) for value in (12.26, 6.57)]}
    zero = {"guidance 1": [Estimate(value=value, num_images=9) for value in (0.0, 9.0)]}
    assert report_page._far_apart(series, {"decoded noise": ceiling, "held-out real": 1.7}) == logarithmic
    assert not report_page._far_apart(zero, {"decoded noise": ceiling})


def test_with_one_number_of_steps_the_chart_shows_guidance(finished: Finished) -> None:
    samples = [r for r in Report.read(finished.root / "evaluation").results if r.role == "samples"][::2]
    found = report_page._distance_chart(samples[::-1], {})
    assert found is not None and found.xs == [1.0, 1.5]
    assert list(found.series) == ["1 step"]
    assert report_page._distance_chart(samples[:1], {}) is None


def test_the_page_cites_the_papers_figures_as_such(finished: Finished) -> None:
    page = (finished.root / "evaluation" / "report.html").read_text()
    table = page[page.index("What the paper reports") :]
    words = " ".join(re.sub(r"<[^>]+>", " ", table[: table.index("</table>")]).split())
    assert "These are the paper's numbers" in words
    for row in (
        "5 steps without 12.26 69.38 74.46",
        "5 steps with 9.03 29.48 35.94",
        "10 steps without 9.39 32.81 –",
        "10 steps with 6.49 10.26 –",
        "25 steps, 80 epochs without 6.57 22.58 7.29",
        "25 steps, 80 epochs with 3.54 6.06 4.13",
        "500 epochs without 3.94",
        "500 epochs with 2.10",
        "1400 epochs without 3.36",
        "1400 epochs with 1.92",
    ):
        assert row in words
    report = json.loads((finished.root / "evaluation" / "report.json").read_text())
    figures = [row[model] for row in report["paper"] for model in ("svg", "sd_vae", "va_vae")]
    assert [f"{f:.2f}" for f in figures if f is not None] == re.findall(r"\b\d+\.\d\d\b", words)


def test_the_page_names_the_sampler_beside_the_numbers(finished: Finished) -> None:
    page = (finished.root / "evaluation" / "report.html").read_text()
    between = page[page.index("Distances to the reference") : page.index("What the paper reports")]
    words = " ".join(re.sub(r"<[^>]+>", " ", between).split())
    for setting in ("solver euler", "time shift 0.15", "seed 0", "precision float32", "guidance mode constant"):
        assert setting in words
    assert "weights ema" in words and "labels equal" in words


def test_a_report_names_its_preset_and_the_deviations(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    changes = ["evaluation.num_samples=6", "evaluation.guidance=[1.0]"]
    sets = [part for change in changes for part in ("--set", change)]
    done = svgpipe(*eval_args(finished, tmp_path / "out", "--preset", "sit-sde", "--steps", 2, *sets))
    assert done.code == 0, done.err
    report = Report.read(tmp_path / "out")
    assert (report.preset, report.deviations) == (
        "sit-sde",
        [
            "steps: [2] instead of [250]",
            "guidance: [1.0] instead of [1.5]",
            "num_samples: 6 instead of 50000",
        ],
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<strong>Preset sit-sde</strong>, with deviations: steps: [2] instead of [250]; " in page
    sampler = next(result.sampler for result in report.results if result.sampler is not None)
    assert (sampler.solver, sampler.guidance_channels, sampler.labels) == ("sde", 3, "drawn")


def test_a_finished_evaluation_is_found_with_another_batch_size(
    finished: Finished, svgpipe: Callable[..., Outcome]
) -> None:
    """Results do not depend on it, so after an out-of-memory error it may be smaller."""
    before = (finished.root / "evaluation" / "report.json").read_bytes()
    found = svgpipe(*eval_args(finished, finished.root / "evaluation", "--set", "evaluation.batch_size=1"))
    assert found.code == 0, found.err
    assert (finished.root / "evaluation" / "report.json").read_bytes() == before
    other = svgpipe(*eval_args(finished, finished.root / "evaluation", "--set", "evaluation.unit_rows=3"))
    assert other.code == 1 and "unit_rows" in other.err


def drawn_by_a_worker(finished: Finished, *, guided: bool = False, **changes: object) -> np.ndarray:
    """Return the first unit of the last setting, sampled in this process."""
    config = finished.recipe.evaluation.model_copy(update=changes)
    model = open_diffusion(finished.root / "diffusion")
    sampler = GuidedModel(model, model if guided else None)
    settings = sampler.settings(config)
    spec = FeatureStore.open(latents_of(finished.root / "evaluation", SETTINGS[-1])).spec
    specs = [spec] * len(settings)
    worker = latents_stage._SampleUnit(
        torch.device("cpu"), sampler=sampler, settings=settings, config=config, specs=specs
    )
    return worker(LatentsUnit(len(settings) - 1, 0)).latents.astype(np.float32)


def test_bfloat16_weights_equal_autocast(finished: Finished) -> None:
    model = open_diffusion(finished.root / "diffusion").load()
    settings = SamplerSettings(2, 1.5, "euler", "constant", 0.15, 0, "bfloat16", "ema")
    expected = sample_latents(model, range(4), settings, torch.device("cpu"))
    keep_as_computed(model, "bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    torch.testing.assert_close(sample_latents(model, range(4), settings, torch.device("cpu")), expected, rtol=0, atol=0)
    alone = torch.cat([sample_latents(model, [i], settings, torch.device("cpu")) for i in range(4)])
    torch.testing.assert_close(alone, expected, rtol=0, atol=2e-2 * float(expected.abs().max()))
    exact = drawn_by_a_worker(finished, precision="float32")
    difference = np.abs(drawn_by_a_worker(finished, precision="bfloat16") - exact).max()
    assert 0 < difference < 0.05 * np.abs(exact).max()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-3), ("bfloat16", 0.05)])
def test_compiled_models_draw_the_same(finished: Finished, precision: str, tolerance: float) -> None:
    for guided in (False, True):
        eager = drawn_by_a_worker(finished, guided=guided, precision=precision)
        found = drawn_by_a_worker(finished, guided=guided, precision=precision, compile=True)
        np.testing.assert_allclose(found, eager, atol=tolerance * np.abs(eager).max())


def test_another_unit_and_batch_size_gives_the_same_metrics(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """With fewer samples this would fail: of six samples, one 8-bit level of one pixel is some parts in a thousand."""
    base = ["--set", "evaluation.num_samples=48", "--steps", "2"]
    other = ["--set", "evaluation.batch_size=7", "--set", "evaluation.unit_rows=10"]
    for name, more in (("one", []), ("two", other)):
        found = svgpipe(*eval_args(finished, tmp_path / name / "out", *base, *more))
        assert found.code == 0, found.err
    one, two = (Report.read(tmp_path / name / "out") for name in ("one", "two"))
    for a, b in zip(one.results, two.results, strict=True):
        assert a.name == b.name
        assert b.frechet_distance.value == pytest.approx(a.frechet_distance.value, rel=1e-3)
        assert a.kernel_distance is not None and b.kernel_distance is not None
        assert b.kernel_distance.value == pytest.approx(a.kernel_distance.value, rel=1e-3)
    noises = [decoded_images(tmp_path / name / "out", "decoded-noise") for name in ("one", "two")]
    for i in range(48):  # the same noise, so the same pixels but for the decoder's rounding
        first, second = (images.pixels(i).astype(int) for images in noises)
        assert np.abs(first - second).max() <= 1
    for setting in ("steps-002_guidance-1", "steps-002_guidance-1.5"):
        latents, others = (FeatureStore.open(latents_of(tmp_path / n / "out", setting)) for n in ("one", "two"))
        np.testing.assert_array_equal(latents.array("label")[:48], others.array("label")[:48])
        np.testing.assert_allclose(latents.read(range(48)), others.read(range(48)), atol=5e-3)


def test_a_finished_evaluation_does_not_start_ray(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def started(address: str | None = None) -> None:
        raise AssertionError(f"Ray was started at {address}")

    monkeypatch.setattr(cluster, "connected", started)
    shutil.copytree(finished.root / "evaluation", tmp_path / "evaluation")
    done = svgpipe(*eval_args(finished, tmp_path / "evaluation", "--workers", 2))
    assert done.code == 0, done.err
    with pytest.raises(AssertionError, match="Ray was started"):
        svgpipe(*eval_args(finished, tmp_path / "new", "--workers", 2))


def test_an_interrupted_sweep_resumes(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """State after a kill: some units recorded, a shard lost, one shard and one tar missing, nothing published."""
    out, pool = tmp_path / "evaluation", tmp_path / "latents"
    shutil.copytree(finished.root / "evaluation", out)
    shutil.copytree(finished.root / "latents", pool)
    for name in ("manifest.json", "report.json", "report.html"):
        (out / name).unlink()
    first, second = (latents_of(finished.root / "evaluation", name).name for name in SETTINGS[:2])
    (pool / first / "journal" / "unit-000001.json").write_text("{}")
    (pool / second / "features" / "c" / "1" / "0" / "0" / "0" / "0").unlink()
    cut = pool / latents_of(finished.root / "evaluation", SETTINGS[2]).name / "features/c/0/0/0/0/0"
    cut.write_bytes(cut.read_bytes()[:1000])
    (out / "journal" / "decode" / f"{SETTINGS[1]}-000001.json").write_text("{}")
    (out / "images" / SETTINGS[0] / shard_name(0)).unlink()
    altered = out / "images" / SETTINGS[1] / shard_name(0)
    altered.write_bytes((content := altered.read_bytes())[:600] + bytes(100) + content[700:])
    index = (out / "images" / SETTINGS[2] / shard_name(0)).with_suffix(".parquet")
    index.write_bytes(index.read_bytes()[::-1])
    kept = (pool / first / "journal" / "unit-000000.json").stat().st_mtime_ns
    found = svgpipe(*eval_args(finished, out))
    assert found.code == 0, found.err
    assert (
        "(20 done before)" in found.err and "(8 done before)" in found.err
    )  # all but three units of four latents, and four tars
    assert (pool / first / "journal" / "unit-000000.json").stat().st_mtime_ns == kept
    assert sweep_bytes(out) == sweep_bytes(finished.root / "evaluation")


@pytest.mark.parametrize("held", [0, 6])
def test_a_kill_while_zarr_metadata_is_written_loses_nothing(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    """For any last file that was written, of a new store and of a growing one."""
    model = open_diffusion(finished.root / "diffusion")
    setting = SamplerSettings(2, 1.0, "euler", "constant", 0.15, 0, "float32", "ema", "drawn")
    expected = setting.labels_of(range(12), 3).tolist()
    written, kills = 0, 0
    for last in range(100):
        path = tmp_path / str(last)
        path.mkdir()
        if held:
            latents_stage._prepare(path, model, setting, held, 2)
        with monkeypatch.context() as patch:
            written = 0

            def write(target: Path, content: bytes, last: int = last) -> None:
                nonlocal written
                if written == last:
                    raise KeyboardInterrupt
                written += 1
                write_atomic(target, content)

            patch.setattr(feature_store, "write_atomic", write)
            patch.setattr(feature_store, "write_json", lambda target, value: write(target, json.dumps(value).encode()))
            try:
                latents_stage._prepare(path, model, setting, 12, 2)
            except KeyboardInterrupt:
                kills += 1
        store = latents_stage._prepare(path, model, setting, 12, 2)
        assert store.spec.num_samples == 12
        assert store.array("label").tolist() == expected and store.array("valid").all()
        assert store.group.attrs["sampler"]["steps"] == setting.steps  # type: ignore[index,call-overload]
        if written < last:
            break
    assert kills >= 8


@pytest.mark.parametrize("phase", ["latents", "evaluation/journal/decode", "evaluation/journal/compare"])
def test_a_killed_sweep_ends_in_the_same_report(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], phase: str
) -> None:
    arguments = eval_args(finished, tmp_path / "evaluation")
    run_and_kill(arguments, lambda: len(list((tmp_path / phase).rglob("*-00*.json"))) >= 2)
    assert not (tmp_path / "evaluation" / "manifest.json").exists()
    found = svgpipe(*arguments)
    assert found.code == 0, found.err
    assert sweep_bytes(tmp_path / "evaluation") == sweep_bytes(finished.root / "evaluation")


def test_sweeps_that_agree_share_their_latents(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """A second sweep with the same settings samples nothing; a larger one samples only the rest."""
    shutil.copytree(finished.root / "latents", tmp_path / "latents")
    more = ["--steps", "2", "--guidance", "1.0", "--set", "evaluation.reference_images=20"]
    same = svgpipe(*eval_args(finished, tmp_path / "same", *more))
    assert same.code == 0, same.err
    assert "sample: 8 latents (8 done before)" in same.err
    larger = svgpipe(*eval_args(finished, tmp_path / "larger", *more, "--set", "evaluation.num_samples=11"))
    assert larger.code == 0, larger.err
    assert "sample: 12 latents (8 done before)" in larger.err
    units = ["--set", "evaluation.num_samples=11", "--set", "evaluation.unit_rows=5"]
    cut_otherwise = svgpipe(*eval_args(finished, tmp_path / "units", *more, *units))
    assert cut_otherwise.code == 0, cut_otherwise.err
    assert "sample: 12 latents (12 done before)" in cut_otherwise.err
    ones, others = (decoded_images(tmp_path / name, SETTINGS[1]) for name in ("larger", "units"))
    for i in range(11):  # units of another size make other batches, and other rounding
        assert np.abs(others.pixels(i).astype(int) - ones.pixels(i).astype(int)).max() <= 1
    assert svgpipe("verify", tmp_path / "units", "--deep").code == 0
    grown = FeatureStore.open(latents_of(tmp_path / "larger", SETTINGS[1]))
    old = FeatureStore.open(latents_of(finished.root / "evaluation", SETTINGS[1]))
    assert grown.path == tmp_path / "larger" / ".." / "latents" / old.path.name
    assert grown.spec.num_samples == 12
    np.testing.assert_array_equal(grown.read(range(8)), old.read(range(8)))
    assert svgpipe("verify", tmp_path / "same", "--deep").code == 0
    shutil.copytree(tmp_path / "same", tmp_path / "elsewhere" / "same")  # without its latents, which it does without
    assert svgpipe("verify", tmp_path / "elsewhere" / "same", "--deep").code == 0
    grown.unit_file(0).write_bytes(b"altered")
    assert "bytes, found 7" in svgpipe("verify", tmp_path / "same", "--deep").out


def test_stochastic_samples_depend_on_seed_and_index_alone(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    model, cpu = open_diffusion(finished.root / "diffusion").load(), torch.device("cpu")
    settings = SamplerSettings(3, 2.0, "sde", "interval-0.2-1.0", 0.5, 0, "float32", "ema")
    whole = sample_latents(model, range(6), settings, cpu)
    torch.testing.assert_close(sample_latents(model, [4, 1], settings, cpu), whole[[4, 1]], atol=1e-5, rtol=0)
    other = sample_latents(model, range(6), replace(settings, seed=1), cpu)
    assert (other - whole).abs().max() > 0.1
    euler = sample_latents(model, range(6), replace(settings, solver="euler"), cpu)
    assert (euler - whole).abs().max() > 0.1
    sde = ("--set", "evaluation.solver=sde")
    refused = svgpipe(*eval_args(finished, tmp_path / "none", *sde))
    assert refused.code == 2 and "needs at least 2 steps, found 1" in refused.err
    out = tmp_path / "sde"
    assert svgpipe(*eval_args(finished, out, *sde, "--steps", "2,3")).code == 0
    assert {r.sampler.solver for r in Report.read(out).results if r.sampler} == {"sde"}
    changed = ("--set", "evaluation.sde={diffusion: decreasing, last_step: euler}")
    assert svgpipe(*eval_args(finished, tmp_path / "set", *sde, *changed, "--steps", "2")).code == 0
    (sampler,) = {r.sampler for r in Report.read(tmp_path / "set").results if r.sampler and r.sampler.guidance == 1}
    assert sampler.sde == SDESection(diffusion="decreasing", last_step="euler", last_step_size=0.04)
    refused = svgpipe(*eval_args(finished, tmp_path / "none", *changed))
    assert refused.code == 2 and "sde holds settings of solver sde, found solver euler" in refused.err


def test_guidance_of_some_channels(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """In one step, the first channels are those of full guidance, and the others those of none."""
    model = open_diffusion(finished.root / "diffusion")
    config = finished.recipe.evaluation.model_copy(update={"steps": [1], "guidance": [4.0], "weights": "raw"})

    def drawn(**changes: object) -> tuple[SamplerSettings, np.ndarray]:
        (setting,) = GuidedModel(model).settings(config.model_copy(update=changes))
        return setting, sample_latents(model.load("raw"), range(2), setting, torch.device("cpu")).numpy()

    (whole, guided), (some, mixed) = drawn(), drawn(guidance_channels=3)
    _, plain = drawn(guidance=[1.0])
    np.testing.assert_allclose(mixed[..., :3], guided[..., :3], atol=1e-6)
    np.testing.assert_allclose(mixed[..., 3:], plain[..., 3:], atol=1e-6)
    assert np.abs(guided[..., :3] - plain[..., :3]).max() > 1e-4 < np.abs(guided[..., 3:] - plain[..., 3:]).max()
    assert "guidance_channels" not in whole.identity and some.identity["guidance_channels"] == 3
    for value, mode, told in (
        (1000, "constant", "at most the model's 116"),
        (3, "cfg_star-1-2", "cfg_star guides all"),
    ):
        more = ("--set", f"evaluation.guidance_channels={value}", "--set", f"evaluation.guidance_mode={mode}")
        refused = svgpipe(*eval_args(finished, tmp_path / "out", *more))
        assert refused.code == 2 and told in refused.err
    out = tmp_path / "channels"
    assert svgpipe(*eval_args(finished, out, "--set", "evaluation.guidance_channels=3")).code == 0
    assert all(r.sampler.guidance_channels == 3 for r in Report.read(out).results if r.sampler)


def test_without_guidance_mode_and_guide_are_ignored(finished: Finished) -> None:
    """Such sweeps share latents. Not cfg_star, which changes the first steps at any guidance."""
    model = open_diffusion(finished.root / "diffusion")
    config = finished.recipe.evaluation.model_copy(update={"steps": [2], "guidance": [1.0, 1.5]})
    plain = GuidedModel(model)

    def drawn(mode: str, sampler: GuidedModel = plain) -> list[tuple[str, np.ndarray]]:
        settings = sampler.settings(config.model_copy(update={"guidance_mode": mode}))
        guides = [] if sampler.guide is None else [sampler.guide.load("raw")]
        return [
            (
                latents_stage._key(sampler, setting, config),
                sample_latents(model.load(), range(2), setting, torch.device("cpu"), *guides).numpy(),
            )
            for setting in settings
        ]

    (key, latents), (guided_key, guided) = drawn("constant")
    others = [drawn(mode) for mode in ("interval-0.2-0.9", "linear", "late", "early-0.5")]
    others.append(drawn("constant", GuidedModel(model, model)))
    for (same_key, same), (other_key, other) in others:
        assert same_key == key and np.array_equal(same, latents)
        assert other_key != guided_key and not np.array_equal(other, guided)
    (star_key, star), _ = drawn("cfg_star-1-0")
    assert star_key != key and not np.array_equal(star, latents)


def test_guidance_that_acts_at_no_step_is_reported(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Two steps at a shift of 0.15 are at t = 0 and 0.13."""
    more = ["--steps", "2", "--guidance", "1.0,1.5", "--set", "evaluation.guidance_mode=interval-0.2-0.9"]
    found = svgpipe(*eval_args(finished, tmp_path / "out", *more, "--pool", finished.root))
    assert found.code == 0, found.err
    report = Report.read(tmp_path / "out")
    assert report.results[0].frechet_distance == report.results[1].frechet_distance
    assert any("guidance 1.5 with 2 steps: interval-0.2-0.9 acts at none" in reason for reason in report.not_measured)
    settings = SamplerSettings(2, 1.5, "heun", "interval-0.2-1.0", 0.15, 0, "float32", "ema")
    assert settings.acts and not replace(settings, solver="euler").acts  # the second evaluation is at t = 1


def test_damaged_latents_of_the_right_size_are_named(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    shutil.copytree(finished.root / "latents", tmp_path / "latents")
    file = tmp_path / "latents" / latents_of(finished.root / "evaluation", SETTINGS[1]).name / "features/c/0/0/0/0/0"
    file.write_bytes(bytes(400) + file.read_bytes()[400:])
    arguments = eval_args(finished, tmp_path / "out", "--steps", "2", "--guidance", "1.0")
    refused = svgpipe(*arguments)
    assert refused.code == 1 and f"Delete {file}" in refused.err and "checksum" in refused.err
    file.unlink()
    assert svgpipe(*arguments).code == 0


def test_autoguidance_by_a_checkpoint(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """v_weak + 2 (v - v_weak), computed by hand, with drawn labels and a multistep solver."""
    guide = finished.root / "diffusion" / "checkpoints" / "step-00000008"
    more = ["--steps", "3", "--guidance", "2.0", "--guide", guide, "--set", "evaluation.labels=drawn"]
    found = svgpipe(*eval_args(finished, tmp_path / "out", *more, "--set", "evaluation.solver=multistep"))
    assert found.code == 0, found.err
    manifest, report = EvaluationManifest.read(tmp_path / "out"), Report.read(tmp_path / "out")
    assert manifest.inputs["guide"].config["step"] == 8
    sampler = report.results[0].sampler
    assert sampler is not None
    assert sampler.guide is not None and sampler.guide.startswith("ema-0.9 of step 8, ")
    store = FeatureStore.open(latents_of(tmp_path / "out", manifest.settings[0]))
    labels = torch.from_numpy(store.array("label")[:6]).long()
    assert torch.equal(labels, SamplerSettings(**sampler.model_dump()).labels_of(range(6), 3))
    good, weak = (open_diffusion(place).load() for place in (finished.root / "diffusion", guide))
    z, before = initial_noise(0, range(6), 16, 116), None
    grid = time_grid(3, sampler.time_shift)
    for t, dt in zip(grid, grid.diff(), strict=False):
        with torch.no_grad():
            v_weak = weak(z, t.expand(6), labels)
            v = v_weak + 2 * (good(z, t.expand(6), labels) - v_weak)
        ahead = 0.0 if before is None else min(float(dt / (2 * before[1])), 1.0)
        z = z + dt * (v if before is None else v + ahead * (v - before[0]))
        before = v, dt
    np.testing.assert_allclose(store.read(range(6)), z.reshape(6, 4, 4, 116).numpy(), rtol=5e-3, atol=5e-3)


def test_a_guide_that_does_not_belong_is_refused(finished: Finished, tmp_path: Path) -> None:
    model = open_diffusion(finished.root / "diffusion")
    GuidedModel(model, model).require_match()
    with pytest.raises(MismatchError, match="another shape, objective or other classes"):
        GuidedModel(model, replace(model, class_names=model.class_names[::-1])).require_match()
    other = replace(model, directory=tmp_path, content={**model.content})
    mean, std = model.statistics()
    statistics = {"channel_mean": torch.from_numpy(mean) + 1, "channel_std": torch.from_numpy(std)}
    other.content[STATISTICS_FILE] = save_tensors(tmp_path / STATISTICS_FILE, statistics)
    with pytest.raises(MismatchError, match="another cache"):
        GuidedModel(model, other).require_match()
    config = finished.recipe.evaluation.model_copy(update={"guidance_mode": "cfg_star-1-2"})
    with pytest.raises(UsageError, match="neither a guide nor an auxiliary head"):
        GuidedModel(model, model).settings(config)


def test_labels_are_equal_per_class_or_drawn() -> None:
    drawn = SamplerSettings(1, 1.0, "euler", "constant", 1.0, 7, "float32", "ema", labels="drawn")
    labels = drawn.labels_of(range(600), 3)
    assert drawn.labels_of([5, 2], 3).tolist() == labels[[5, 2]].tolist()
    counts = torch.bincount(labels).tolist()
    assert counts != [200, 200, 200]
    assert all(150 < count < 250 for count in counts)
    assert torch.bincount(labels_of(range(600), range(3))).tolist() == [200, 200, 200]


def test_a_decoder_that_does_not_belong_is_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    other = tmp_path / "autoencoder"
    options = ["--shards", finished.root / "shards", "--out", other, "--recipe", finished.recipe_file]
    change = ["--set", "autoencoder.steps=1", "--set", "autoencoder.learning_rate=2e-3"]
    assert svgpipe("train-autoencoder", *options, *change).code == 0
    arguments = eval_args(finished, tmp_path / "out")
    arguments[4] = other
    found = svgpipe(*arguments)
    assert found.code == 1
    mine, theirs = (
        json.loads((p / "manifest.json").read_text())["fingerprint"][:12]
        for p in (finished.root / "autoencoder", other)
    )
    for word in (mine, theirs, "config.steps: 6 there, 1 here", "config.learning_rate"):
        assert word in found.err
    assert not (tmp_path / "out").exists()


def test_distances_are_called_fid_with_the_published_inception_weights(
    finished: Finished,
    inception_file: Path,
    tmp_path: Path,
    svgpipe: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(inception_file, tmp_path / "inception.pth")
    state = torch.load(inception_file)
    section = ExtractorSection(kind="inception", weights=str(tmp_path / "inception.pth"))
    own = build_backbone(finished.recipe.autoencoder.backbone, 32)
    other = "Fréchet distance with the Inception weights inception.pth (not FID)"
    assert load_extractor(section, own).metric == other
    published = Download("https://x.org/inception.pth", file_sha256(tmp_path / "inception.pth")[:8])
    monkeypatch.setattr(features, "INCEPTION_WEIGHTS", published)
    change = ["--set", "evaluation.extractor.kind=inception", "--steps", "1", "--guidance", "1.0"]
    change += ["--pool", str(finished.root)]
    weights = ["--set", f"evaluation.extractor.weights={tmp_path / 'inception.pth'}"]
    found = svgpipe(*eval_args(finished, tmp_path / "out", *change, *weights))
    assert found.code == 0, found.err
    report = Report.read(tmp_path / "out")
    assert report.metric == "FID"
    scores = [r.inception_score for r in report.results]
    assert all(score is not None and 1 - 1e-6 < score.value < 2 for score in scores)
    assert report.extractor.weights == state_digest(state)  # of the tensors, not of the file
    assert report.inputs["extractor"] == file_sha256(tmp_path / "inception.pth")
    assert report.extractor.library.startswith("torch-fidelity 0.")
    torch.save({**state, "more": torch.zeros(1)}, tmp_path / "inception.pth")
    replaced = svgpipe(*eval_args(finished, tmp_path / "out", *change, *weights))
    assert replaced.code == 1 and "extractor" in replaced.err  # finished, but measured with other weights
    (tmp_path / "inception.pth").write_bytes(b"cut short")
    found = svgpipe(*eval_args(finished, tmp_path / "again", *change, *weights))
    assert found.code == 1
    assert "inception.pth: not a readable weight file" in found.err


@pytest.mark.parametrize(("name", "dimensions"), [("vit_tiny_patch16_224", 192), ("resnet10t", 512)])
def test_any_timm_model_is_an_extractor(finished: Finished, name: str, dimensions: int) -> None:
    own = build_backbone(finished.recipe.autoencoder.backbone, 32)
    extractor = load_extractor(ExtractorSection(kind="timm", name=name, weights="random"), own)
    images = decoded_images(finished.root / "evaluation", "reconstructions")
    found = extractor.features(images.all_pixels(), 4)
    assert set(found) == {"pooled"} and found["pooled"].shape == (6, dimensions) == (6, extractor.dimensions)
    assert extractor.metric == f"Fréchet distance in {name} space (not FID)"
    assert extractor.description.kind == "timm" and len(extractor.description.weights) == 64


def test_a_timm_extractor_sees_images_of_the_wanted_size(finished: Finished) -> None:
    """Size 96 gives the features of the model on images that were resized to 96."""
    section = ExtractorSection(kind="timm", name="resnet10t", weights="random", input_size=96)
    extractor = load_extractor(section, None)
    images = decoded_images(finished.root / "evaluation", "reconstructions")
    found = extractor.features(images.all_pixels(), 6)["pooled"]
    backbone = build_backbone(BackboneSection(name="resnet10t", weights="random", input_size=96, feature_level=-1), 96)
    pixels = torch.from_numpy(images.all_pixels()).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        expected = backbone(pixels).mean((2, 3))
    assert torch.allclose(found, expected, atol=1e-4) and extractor.description.input_size == 96
    assert extractor.metric == "Fréchet distance in resnet10t space at 96 pixels (not FID)"
    own = load_extractor(section.model_copy(update={"input_size": 176}), None)
    assert own.space == "resnet10t"


def test_features_are_not_shared_between_input_sizes(finished: Finished, tmp_path: Path) -> None:
    """At another input size, the same weights give other features."""
    images = decoded_images(finished.root / "evaluation", "reconstructions")
    section = finished.recipe.autoencoder.backbone
    kept = {}
    for size in (64, 96):
        backbone = build_backbone(section.model_copy(update={"input_size": size}), 32)
        extractor = load_extractor(ExtractorSection(kind="backbone"), backbone)
        kept[size] = extracted(tmp_path / "features", images, extractor, 4)["pooled"]
        torch.testing.assert_close(kept[size], extractor.features(images.all_pixels(), 4)["pooled"])
    assert not torch.allclose(kept[64], kept[96], rtol=0.1)


def test_features_are_found_by_content_not_by_name(finished: Finished, tmp_path: Path) -> None:
    """Other images or weights under the same name are measured; the same ones under another path are not."""
    images = decoded_images(finished.root / "evaluation", "reconstructions")
    fewer = ImageSet(images.refs[:4], images.size)
    section = ExtractorSection(kind="timm", name="resnet10t", weights="random")
    own = build_backbone(finished.recipe.autoencoder.backbone, 32)
    extractor, other = (load_extractor(section, own) for _ in range(2))
    for parameter in other.module.parameters():
        parameter.data.mul_(1.5)
    description = other.description.model_copy(update={"weights": state_digest(other.module.state_dict())})
    other = replace(other, description=description)
    kept = extracted(tmp_path, images, extractor, 4)["pooled"]
    assert extracted(tmp_path, fewer, extractor, 4)["pooled"].shape == (4, 512)
    assert not torch.allclose(extracted(tmp_path, images, other, 4)["pooled"], kept, rtol=0.1)
    assert len(list(tmp_path.glob("features/*.safetensors"))) == 3
    shutil.copytree(finished.root / "evaluation", tmp_path / "moved")
    moved = decoded_images(tmp_path / "moved", "reconstructions")
    broken = replace(extractor, module=torch.nn.Identity())  # cannot measure anything
    torch.testing.assert_close(extracted(tmp_path, moved, broken, 4)["pooled"], kept, rtol=0, atol=0)


@pytest.mark.parametrize("damage", ["altered", "cut", "no record"])
def test_altered_features_are_computed_again(finished: Finished, tmp_path: Path, damage: str) -> None:
    images = decoded_images(finished.root / "evaluation", "reconstructions")
    extractor = load_extractor(
        ExtractorSection(kind="backbone"), build_backbone(finished.recipe.autoencoder.backbone, 32)
    )
    kept = extracted(tmp_path, images, extractor, 4)["pooled"].clone()  # the file is mapped into memory
    (file,) = tmp_path.glob("features/*.safetensors")
    whole = file.read_bytes()
    if damage == "no record":
        file.with_suffix(".json").write_text("{}")
    file.write_bytes(whole[:100] if damage == "cut" else whole[:-4000] + bytes(4000))
    torch.testing.assert_close(extracted(tmp_path, images, extractor, 4)["pooled"], kept)
    assert file.read_bytes() == whole


def test_altered_figures_are_computed_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.kept(0, "key", lambda: {"psnr": [23.5]}) == {"psnr": [23.5]}
    assert journal.kept(0, "key", lambda: {"psnr": [0.0]}) == {"psnr": [23.5]}
    (record,) = journal.directory.glob("*.json")
    record.write_text(record.read_text().replace("23.5", "29.5"))
    assert journal.kept(0, "key", lambda: {"psnr": [24.0]}) == {"psnr": [24.0]}


def test_features_of_a_large_set_are_stored_in_parts(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = decoded_images(finished.root / "evaluation", "reconstructions")
    backbone = build_backbone(finished.recipe.autoencoder.backbone, 32)
    extractor = load_extractor(ExtractorSection(kind="backbone"), backbone)
    expected = extractor.features(images.all_pixels(), 2)["pooled"]
    monkeypatch.setattr(extracted_features, "PART", 2)
    looked: list[int] = []

    def until_killed(self: Extractor, part: RGBArray, batch_size: int) -> dict[str, torch.Tensor]:
        looked.append(len(part))
        if len(looked) == 3:
            raise KeyboardInterrupt
        return original(self, part, batch_size)

    original = Extractor.features
    monkeypatch.setattr(Extractor, "features", until_killed)
    with pytest.raises(KeyboardInterrupt):
        extracted(tmp_path, images, extractor, 2)
    found = extracted(tmp_path, images, extractor, 2)["pooled"]
    assert looked in (
        [2] * 4,
        [2] * 5,
    )  # three parts, and once more the third, and the second if it was not written yet
    torch.testing.assert_close(found, expected)
    assert sorted(path.suffix for path in tmp_path.rglob("*") if path.is_file()) == [".json", ".safetensors"]


def test_partial_features_of_killed_evaluations_are_removed(finished: Finished, tmp_path: Path) -> None:
    """Files that another evaluation may be writing are kept."""
    images = decoded_images(finished.root / "evaluation", "reconstructions")
    extractor = load_extractor(
        ExtractorSection(kind="backbone"), build_backbone(finished.recipe.autoencoder.backbone, 32)
    )
    (tmp_path / "features").mkdir()
    left, fresh = (tmp_path / "features" / f".{name}.safetensors.0.partial" for name in ("left", "fresh"))
    for partial in (left, fresh):
        partial.write_bytes(b"half")
    two_days_ago = time.time() - 2 * 24 * 3600
    os.utime(left, (two_days_ago, two_days_ago))
    extracted(tmp_path, images, extractor, 4)
    assert not left.exists() and fresh.exists()


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ("evaluation.extractor.kind=inception", 1, ["Inception weights", "weights=FILE", "kind=backbone", "https://"]),
        ("evaluation.guidance_mode=interval", 2, ["guidance_mode", "interval-LO-HI", "'interval'"]),
        ("evaluation.steps=[]", 2, ["at least one value"]),
        ("evaluation.extractor={kind: timm, name: resnetty}", 2, ["extractor.name", "timm model name", "resnetty"]),
        ("evaluation.extractor={kind: timm, name: resnet18.nonsense}", 2, ["extractor.name", "resnet18.nonsense"]),
        ("evaluation.bootstrap=1", 2, ["bootstrap", "at least 20"]),
        ("evaluation.extractor={kind: timm}", 2, ["extractor", "kind timm"]),
        ("evaluation.extractor={kind: backbone, input_size: 96}", 2, ["extractor", "input_size belongs to kind timm"]),
        (
            "evaluation.extractor={kind: timm, name: swin_tiny_patch4_window7_224, weights: random, input_size: 128}",
            2,
            ["extractor.input_size: swin_tiny_patch4_window7_224 does not take images of 128 pixels", "own, 224"],
        ),
        (
            "evaluation.extractor={kind: timm, name: resnet10t, weights: gone.pth}",
            1,
            ["gone.pth: expected a weight file"],
        ),
    ],
)
def test_models_that_cannot_be_evaluated_are_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome], change: str, code: int, words: list[str]
) -> None:
    found = svgpipe(*eval_args(finished, tmp_path / "out", "--set", change))
    assert found.code == code
    for word in words:
        assert word in found.err


def test_unreadable_reference_images_are_named(finished: Finished, tmp_path: Path) -> None:
    ref = finished.shards.usable("train")[0]
    (tmp_path / "cut.jpg").write_bytes(cut := ref.read()[:200])
    damaged = replace(ref, tar=tmp_path / "cut.jpg", offset=0, size=len(cut), sha256=sha256(cut).hexdigest())
    with pytest.raises(ArtifactError, match=f"cut.jpg: {ref.key}: cannot be evaluated"):
        ImageSet([damaged], 32).pixels(0)
