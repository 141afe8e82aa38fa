"""`svgpipe evaluate-checkpoints`: distances over a training, finished or not."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svgpipe.manifests.checkpoint_curve import CheckpointCurve, CheckpointPoint, epochs_to
from svgpipe.manifests.estimate import Estimate
from svgpipe.manifests.evaluation import Report

from .commands import run_and_kill
from .conftest import Finished, Outcome, tree_bytes


def arguments(finished: Finished, run: Path, out: Path, *more: object) -> list[object]:
    return [
        *("evaluate-checkpoints", run),
        *("--cache", finished.root / "cache", "--autoencoder", finished.root / "autoencoder"),
        *("--reference", finished.root / "shards", "--pool", finished.root, "--out", out),
        *("--recipe", finished.recipe_file, "--steps", "1", *more),
    ]


@pytest.fixture(scope="module")
def training(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished training, which kept its checkpoints; the last is that of the finished model."""
    return Path(shutil.copytree(finished.root / "diffusion", tmp_path_factory.mktemp("run") / "diffusion"))


def read(out: Path) -> CheckpointCurve:
    return CheckpointCurve.model_validate(json.loads((out / "checkpoints.json").read_text()))


def test_every_checkpoint_is_measured_as_an_evaluation_measures_it(
    finished: Finished, training: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "curve"
    done = svgpipe(*arguments(finished, training, out, "--to", "1e9,1e-9"))
    assert done.code == 0, done.err
    curve = read(out)
    listed = json.loads((training / "checkpoints/latest.json").read_text())["checkpoints"]
    steps = [entry["step"] for entry in listed]
    assert len(steps) > 1 and [point.step for point in curve.points] == steps
    rows, batch = len(finished.cache.training_rows), finished.recipe.diffusion.batch_size
    assert [point.epochs for point in curve.points] == pytest.approx([step * batch / rows for step in steps])
    expected = {r.name: r.frechet_distance for r in Report.read(finished.root / "evaluation").results}
    assert curve.points[-1].frechet_distance == expected["steps-001_guidance-1"]
    assert curve.points[0].frechet_distance != expected["steps-001_guidance-1"]
    assert curve.heldout == expected["heldout"]
    assert [one.step for one in curve.reached] == [steps[0], None]
    assert "epochs to 1e-09: not reached" in done.out and "epochs to 1e+09: at most" in done.out
    assert not list((out / "work").iterdir())  # nothing of the samples is left but some pictures
    for step in steps:
        with Image.open(out / f"samples/step-{step:08d}.png") as strip:
            assert strip.size == (3 * 32, 32)
    page = (out / "checkpoints.html").read_text()
    assert page.count("<figure") == len(steps) and "The paper's points are not drawn" in page
    # A second run measures new checkpoints only.
    before = tree_bytes(out, "journal/*.json")
    (out / f"journal/unit-{steps[0]:06d}.json").unlink()
    again = svgpipe(*arguments(finished, training, out))
    assert again.code == 0 and tree_bytes(out, "journal/*.json") == before
    assert f"checkpoint of step {steps[0]}" in again.err + again.out
    assert f"checkpoint of step {steps[-1]}" not in again.err + again.out


def test_a_training_that_is_not_finished_has_a_curve(
    finished: Finished, training: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """And a killed measurement goes on to the same curve."""
    run = Path(shutil.copytree(training, tmp_path / "run"))
    (run / "manifest.json").unlink()
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert svgpipe(*arguments(finished, run, whole)).code == 0

    def begun() -> bool:
        return len(list((killed / "work").glob("*/images/*/*.tar"))) > 0 if (killed / "work").exists() else False

    run_and_kill([str(a) for a in arguments(finished, run, killed)], begun)
    assert not (killed / "checkpoints.json").exists()
    assert svgpipe(*arguments(finished, run, killed)).code == 0
    assert read(killed) == read(whole)


def test_what_does_not_belong_is_refused(
    finished: Finished, training: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    cache, none = (svgpipe(*arguments(finished, run, tmp_path / "out")) for run in (finished.root / "cache", tmp_path))
    assert cache.code == 1 and "expected a diffusion model (diffusion), found 'feature-cache'" in cache.err
    assert none.code == 1 and "expected a diffusion model with checkpoints, found none" in none.err
    other = Path(shutil.copytree(training, tmp_path / "other"))
    (other / "manifest.json").unlink()
    plan = json.loads((other / "plan.json").read_text())
    plan["inputs"]["cache"] = "f" * 64
    (other / "plan.json").write_text(json.dumps(plan))
    refused = svgpipe(*arguments(finished, other, tmp_path / "out"))
    assert refused.code == 1 and "was trained on the cache ffffffffffff" in refused.err
    for more, said in (
        (("--to", "-3"), "--to: expected numbers above 0"),
        (("--ema", "0.7"), "weights"),
        (("--set", "evaluation.extractor.kind=inception"), "--set evaluation.extractor.weights=FILE"),
    ):
        wrong = svgpipe(*arguments(finished, training, tmp_path / "out", *more))
        assert wrong.code in (1, 2) and said in wrong.err and "Traceback" not in wrong.err
    assert not (tmp_path / "out").exists()


def test_epochs_to_a_distance_lie_between_two_checkpoints() -> None:
    def point(step: int, value: float) -> CheckpointPoint:
        return CheckpointPoint(
            step=step, epochs=step / 10, weights="", frechet_distance=Estimate(value=value, num_images=2)
        )

    points = [point(100, 80.0), point(200, 20.0), point(300, 25.0), point(400, 5.0)]
    reached = epochs_to(points, 40.0)
    assert reached.step == 200 and reached.epochs == pytest.approx(15)  # half-way from 80 to 20 in the logarithm
    exact = epochs_to(points, 20.0)
    assert exact.step == 200 and exact.epochs == pytest.approx(20)
    assert epochs_to(points, 90.0).epochs == 10 and epochs_to(points, 4.0).step is None
    share = math.log(25 / 10) / math.log(25 / 5)
    assert epochs_to(points, 10.0).epochs == pytest.approx(30 + 10 * share)
    assert np.isfinite(epochs_to([point(1, 3.0), point(2, 0.0)], 1.0).epochs or math.nan)
