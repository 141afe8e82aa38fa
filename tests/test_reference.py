"""References: shard sets, image folders, and statistics in an .npz."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.evaluation import Report
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.evaluate.reference import open_reference, require_decodable, was_decoded
from svgpipe.stages.runtime.progress import Silent

from .conftest import Finished, Outcome

DECODED = {"headers": [], "whole": ["--decode"]}
ONE = ["--steps", "2", "--guidance", "1.0"]


def eval_args(finished: Finished, reference: Path, out: Path, *more: object) -> list[object]:
    """A setting that the finished sweep has sampled already."""
    return [
        "sample-and-eval",
        *("--diffusion", finished.root / "diffusion"),
        *("--autoencoder", finished.root / "autoencoder"),
        *("--reference", reference),
        *("--out", out),
        *("--pool", finished.root),
        *("--recipe", finished.recipe_file),
        *ONE,
        *more,
    ]


def test_statistics_of_the_same_images_give_the_same_distance(
    finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    kept = [load_file(file)["pooled"] for file in (finished.root / "features").glob("*.safetensors")]
    shape = (len(finished.shards.usable("train")), 1280)  # other tests leave features of other extractors there
    (pooled,) = (found.double().numpy() for found in kept if found.shape == shape)
    name = Report.read(finished.root / "evaluation").extractor.name
    moments = {"mu": pooled.mean(0), "sigma": np.cov(pooled, rowvar=False), "mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(tmp_path / "stats.npz", extractor=name, **moments)
    out = tmp_path / "out"
    done = svgpipe(*eval_args(finished, tmp_path / "stats.npz", out))
    assert done.code == 0, done.err
    expected = {r.name: r for r in Report.read(finished.root / "evaluation").results}
    report = Report.read(out)
    assert [r.role for r in report.results] == ["samples", "decoded-noise"]
    for found in report.results:
        one, other = found.frechet_distance, expected[found.name].frechet_distance
        assert one.value == pytest.approx(other.value, rel=1e-6)
        assert one.low == pytest.approx(other.low, rel=1e-4)
        assert found.kernel_distance is None and found.precision is None
    assert report.reference.kind == "statistics" and any("statistics" in why for why in report.not_measured)
    page = (out / "report.html").read_text()
    assert "the statistics in" in page and "Not measured: kernel distance" in page
    assert svgpipe("verify", out, "--deep").code == 0


def test_a_folder_of_images_is_a_reference(
    finished: Finished, photographs: Path, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = svgpipe(*eval_args(finished, photographs, tmp_path / "out"))
    assert done.code == 0, done.err
    report = Report.read(tmp_path / "out")
    assert report.reference.num_images == 36 and report.reference.kind == "folder"
    roles = {r.role: r for r in report.results}
    assert set(roles) == {"samples", "reconstructions", "decoded-noise"}
    assert roles["samples"].class_accuracy is not None  # its class folders are the model's classes
    assert (tmp_path / "out" / "report.html").read_text().count("<h2") >= 5


def test_a_folder_is_known_by_its_content(photographs: Path, tmp_path: Path) -> None:
    found = open_reference(str(photographs))
    assert found.class_names == ["astronaut", "cat", "coffee"] and len(found.images) == 36
    assert {ref.label for ref in found.images} == {0, 1, 2}
    assert found.images[0].read()[:2] in (b"\xff\xd8", b"\x89P")
    copy = tmp_path / "elsewhere"
    shutil.copytree(photographs, copy)
    assert open_reference(str(copy)).ref.fingerprint == found.ref.fingerprint
    first = sorted((copy / "cat").iterdir())[0]
    shutil.copy(first, copy / "loose.png")
    loose = open_reference(str(copy))
    assert loose.class_names is None and loose.ref.fingerprint != found.ref.fingerprint
    whole = first.read_bytes()
    for content in (whole[: len(whole) // 2], b"no image"):
        first.write_bytes(content)
        damaged = open_reference(str(copy))
        with pytest.raises(ArtifactError, match=f"{first.name}: cannot be measured"):
            require_decodable(damaged.images, Journal(tmp_path), Silent())


def test_reference_folder_images_that_are_not_drawn_may_be_damaged(
    finished: Finished, photographs: Path, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    """The page does not show them either."""
    folder = tmp_path / "photographs"
    shutil.copytree(photographs, folder)
    second = sorted(path for path in folder.rglob("*") if path.is_file())[1]
    second.write_bytes(second.read_bytes()[:100])
    out = tmp_path / "out"
    done = svgpipe(*eval_args(finished, folder, out, "--set", "evaluation.reference_images=12"))
    assert done.code == 0, done.err
    assert Report.read(out).reference.num_images == 12 and "Real images" in (out / "report.html").read_text()


def test_reference_images_are_checked_before_sampling(
    finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    """As in existing tars that were indexed by their headers: one image is truncated."""
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for i, ref in enumerate(finished.shards.usable("train")[:4]):
            image = ref.read()[: -200 if i == 2 else None]
            for name, content in ((f"{i}{Path(ref.path).suffix}", image), (f"{i}.cls", b"0")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    indexed = [
        svgpipe("index", tmp_path / "set.tar", "--out", tmp_path / name, *more) for name, more in DECODED.items()
    ]
    assert all(found.code == 0 for found in indexed) and "4 usable" in indexed[0].out and "3 usable" in indexed[1].out
    out, pool = tmp_path / "out", ["--pool", tmp_path / "pool"]
    refused = svgpipe(*eval_args(finished, tmp_path / "headers", out, *pool))
    assert refused.code == 1 and "set.tar: 2: cannot be measured" in refused.err and "--decode" in refused.err
    assert not (tmp_path / "pool").exists()
    assert was_decoded(ShardSet.open(tmp_path / "whole")) and was_decoded(finished.shards)


def test_invalid_references_are_refused(finished: Finished, svgpipe: Callable[..., Outcome], tmp_path: Path) -> None:
    def refused(reference: Path, *more: object) -> Outcome:
        return svgpipe(*eval_args(finished, reference, tmp_path / "out", *more))

    nothing = svgpipe(*eval_args(finished, "", tmp_path / "out"))  # type: ignore[arg-type]
    assert nothing.code == 2 and "found an empty text" in nothing.err
    above = refused(finished.root)
    assert above.code == 1 and "found a folder with svgpipe's artifacts" in above.err
    (tmp_path / "empty").mkdir()
    assert "found 0" in refused(tmp_path / "empty").err
    gone = refused(tmp_path / "gone.npz")
    assert gone.code == 1 and "no such file" in gone.err
    np.savez(tmp_path / "half.npz", mu=np.zeros(4), arr_0=np.zeros(1))
    assert "arrays mu and sigma, found mu" in refused(tmp_path / "half.npz").err
    np.savez(tmp_path / "odd.npz", mu=np.zeros(4), sigma=np.zeros((4, 3)))
    assert "(4,) and (4, 3)" in refused(tmp_path / "odd.npz").err
    (tmp_path / "text.npz").write_text("nothing of the kind")
    assert "not a readable .npz" in refused(tmp_path / "text.npz").err
    (tmp_path / "nothing.npz").write_bytes(b"")
    assert "not a readable .npz" in refused(tmp_path / "nothing.npz").err
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(4))
    assert "not a readable .npz" in refused(tmp_path / "single.npz").err
    np.savez(tmp_path / "pickled.npz", mu=np.array([{}], object), sigma=np.zeros((1, 1)))
    assert "not a readable .npz" in refused(tmp_path / "pickled.npz").err
    np.savez(tmp_path / "nan.npz", mu=np.full(4, np.nan), sigma=np.eye(4))
    assert "expected finite numbers" in refused(tmp_path / "nan.npz").err
    np.savez(tmp_path / "skew.npz", mu=np.zeros(4), sigma=np.triu(np.ones((4, 4))))
    assert "not symmetric" in refused(tmp_path / "skew.npz").err
    np.savez(tmp_path / "below.npz", mu=np.zeros(4), sigma=-np.eye(4))
    assert "with the eigenvalue -1" in refused(tmp_path / "below.npz").err
    np.savez(tmp_path / "complex.npz", mu=np.zeros(4, complex), sigma=np.eye(4))
    assert "expected real numbers" in refused(tmp_path / "complex.npz").err
    np.savez(tmp_path / "two.npz", mu=np.zeros(4), sigma=np.eye(4), extractor=["a", "b"])
    assert "not a readable .npz" in refused(tmp_path / "two.npz").err
    name = Report.read(finished.root / "evaluation").extractor.name
    np.savez(tmp_path / "four.npz", mu=np.zeros(4), sigma=np.eye(4), extractor=name)
    other = refused(tmp_path / "four.npz")
    assert other.code == 2 and "4 dimensions" in other.err and "gives 1280" in other.err
    np.savez(tmp_path / "adm.npz", mu=np.zeros(1280), sigma=np.eye(1280))  # as wide as this extractor's by chance
    other = refused(tmp_path / "adm.npz")
    assert other.code == 2 and "of inception-v3-compat" in other.err and name in other.err


def test_a_reference_folder_is_hashed_once(photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the images that are measured are read."""
    folder = tmp_path / "folder"
    shutil.copytree(photographs, folder)
    read: list[str] = []
    real = Path.read_bytes

    def recorded(path: Path) -> bytes:
        read.extend([path.name] if folder in path.parents else [])
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", recorded)
    first = open_reference(str(folder), count=12, pool=tmp_path)
    assert len(read) == len(first.images) == 12
    read.clear()
    again = open_reference(str(folder), count=12, pool=tmp_path)
    assert read == [] and again.ref.fingerprint == first.ref.fingerprint
    changed = Path(str(first.images[3].tar))
    changed.write_bytes(real(changed) + b"more")
    other = open_reference(str(folder), count=12, pool=tmp_path)
    assert read == [changed.name] and other.ref.fingerprint != first.ref.fingerprint
    (kept,) = (tmp_path / "features/reference-hashes").iterdir()
    kept.write_text("{")
    read.clear()
    assert open_reference(str(folder), count=12, pool=tmp_path).ref.fingerprint == other.ref.fingerprint
    assert len(read) == 12
