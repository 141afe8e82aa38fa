"""Label maps beside images, and `svgpipe probe --maps`: real photographs in scenes of known geometry."""

from __future__ import annotations

import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from sklearn.metrics import accuracy_score, jaccard_score

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.dense_section import DenseProbeSection, MapsSection
from svgpipe.manifests.label_maps import UNLABELLED, LabelMaps
from svgpipe.manifests.schedule_section import ScheduleSection
from svgpipe.manifests.shards import ShardSet
from svgpipe.models.dense_heads import depth_errors, depth_loss, depth_of_bins, overlaps
from svgpipe.pipeline.cli import main
from svgpipe.stages.analyze.dense_fit import DenseHead, MappedRows
from svgpipe.stages.analyze.dense_probe import _accuracy, _mean_iou
from svgpipe.stages.images.decode import centre_crop, to_array
from svgpipe.stages.label_maps.tar_maps import RejectedMapError, _depth, _mask, centre_labels

from .browser import chromium, require_good_page
from .commands import run_and_kill
from .conftest import Finished, Outcome, tree_bytes

PHOTOGRAPHS = Path(skimage.__file__).parent / "data"

RECIPE = """
maps:
  {size: 16, classes: [cat, rocket], first_class: 1, unlabelled: [9], depth_unit: 0.001, max_depth: 8.0, unit_rows: 8}
dense_probe: {steps: 150, batch_size: 8, learning_rate: 0.01, schedule: {kind: cosine, warmup_steps: 10}, bins: 32}
extract: {unit_rows: 16}
"""


def scene(number: int) -> dict[str, bytes]:
    """A floor of one photograph that recedes to the horizon, and a disc of another one that stands on it."""
    rng = np.random.default_rng(number)
    height, width = int(rng.integers(40, 70)), int(rng.integers(40, 70))
    cat, rocket = (np.asarray(Image.open(PHOTOGRAPHS / name).convert("RGB")) for name in ("chelsea.png", "rocket.jpg"))
    y, x = np.mgrid[:height, :width]
    depth = 1.0 + rng.uniform(0.5, 6) * (1 - y / height)  # metres
    u, v = (x - width / 2) * depth * 1.5 + cat.shape[1] / 2, depth * 25 + rng.uniform(0, 80)
    image = cat[v.astype(int) % cat.shape[0], u.astype(int) % cat.shape[1]]
    radius, cy, cx = rng.uniform(0.2, 0.4) * height, rng.uniform(0.3, 0.7) * height, rng.uniform(0.3, 0.7) * width
    inside = (y - cy) ** 2 + (x - cx) ** 2 < radius**2
    image = np.where(inside[..., None], rocket[200 + y, 200 + x], image)
    mask = np.where(inside, 2, 1).astype(np.uint8)
    mask[0] = 9  # without a label
    depth = np.where(inside, 1.0, depth)
    depth[-1] = np.nan
    return {
        "jpg": encoded(image, "JPEG"),
        "seg.png": encoded(mask, "PNG"),
        "depth.npy": npy((1000 * depth).astype(np.float32)),
    }


def encoded(pixels: NDArray[np.uint8], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return buffer.getvalue()


def npy(values: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def claims(side: int) -> bytes:
    """A header of side x side numbers, without the numbers."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f8", "fortran_order": False, "shape": (side, side)})
    return buffer.getvalue()


def grey_png(image: Image.Image, bits: int) -> bytes:
    """A PNG of one row of grey numbers with few bits, which Pillow cannot write."""
    numbers, packed = np.asarray(image)[0], 0
    for number in numbers:
        packed = packed << bits | int(number)
    row = (packed << -len(numbers) * bits % 8).to_bytes(-(-len(numbers) * bits // 8), "big")

    def block(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", len(numbers), 1, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + block(b"IHDR", header) + block(b"IDAT", zlib.compress(b"\0" + row)) + block(b"IEND", b"")
    )


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, content in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


BAD = {
    "seg.png of 37": ("seg.png", encoded(np.full((40, 40), 37, np.uint8), "PNG"), "unknown class 37: expected 1 to 2"),
    "seg.png without a class": ("seg.png", encoded(np.zeros((40, 40), np.uint8), "PNG"), "no pixel of the centre crop"),
    "depth.npy in metres": (
        "depth.npy",
        npy(np.full((40, 40), 0.5)),
        "is between 0.001 and 8 m with maps.depth_unit 0.001",
    ),
    "depth.npy that is a zip": ("depth.npy", b"PK" + bytes(60), "not a readable .npy file"),
    "seg.png in colour": ("seg.png", encoded(np.zeros((40, 40, 3), np.uint8), "PNG"), "found RGB"),
    "seg.png cut": ("seg.png", encoded(np.ones((40, 40), np.uint8), "PNG")[:40], "not a PNG image"),
    "seg.png of another shape": ("seg.png", encoded(np.ones((1, 2), np.uint8), "PNG"), "its shape 2x1 is not that"),
    "depth.npy of three axes": ("depth.npy", npy(np.ones((40, 40, 1))), "array of numbers (H,W)"),
    "depth.npy that is a text": ("depth.npy", b"1 2 3", "not a readable .npy file"),
    "depth.npy that claims 8 TB": ("depth.npy", claims(1_000_000), "not a readable .npy file"),
    "depth.npy of objects": ("depth.npy", npy(np.asarray([[None]])), "not a readable .npy file"),
}


class Scenes:
    """Tars with label maps, their shard set, cache and label maps."""

    def __init__(self, root: Path) -> None:
        self.root, self.recipe = root, root / "recipe.yaml"
        self.shards, self.cache, self.maps = root / "shards", root / "cache", root / "maps"

    def maps_args(self, out: Path, *more: object) -> list[object]:
        return ["extract-maps", "--shards", self.shards, "--recipe", self.recipe, "--out", out, *more]

    def probe_args(self, *more: object) -> list[object]:
        return ["probe", self.cache, "--maps", self.maps, "--recipe", self.recipe, *more]


@pytest.fixture(scope="module")
def scenes(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Scenes:
    made = Scenes(tmp_path_factory.mktemp("scenes"))
    made.recipe.write_text(RECIPE)
    plain = {"jpg": encoded(np.full((40, 40, 3), 90, np.uint8), "JPEG")}
    bad = {f"bad{i}": {**plain, extension: content} for i, (extension, content, _) in enumerate(BAD.values())}
    write_tar(made.root / "train-0.tar", {f"a{i}": scene(i) for i in range(40)})
    write_tar(made.root / "train-1.tar", {**bad, **{f"b{i}": scene(40 + i) for i in range(20)}})
    write_tar(made.root / "heldout.tar", {f"c{i}": scene(100 + i) for i in range(24)})
    tars = (f"{made.root}/train-{{0..1}}.tar", "--heldout", made.root / "heldout.tar", "--unlabelled")
    inputs = ("--shards", made.shards, "--autoencoder", finished.root / "autoencoder", "--recipe", made.recipe)
    for arguments in (
        ("index", *tars, "--out", made.shards),
        ("extract", *inputs, "--out", made.cache),
        made.maps_args(made.maps),
    ):
        assert main(list(map(str, arguments))) == 0
    return made


def test_every_usable_map_is_counted(scenes: Scenes, svgpipe: Callable[..., Outcome]) -> None:
    """Label maps are no images: the index neither lists nor rejects them."""
    shards = ShardSet.open(scenes.shards).manifest
    assert (shards.num_inputs, shards.num_images, shards.num_rejected) == (95, 95, 0)
    again = svgpipe(*scenes.maps_args(scenes.maps))
    assert again.code == 0 and "95 rows of 16x16 labels: 84 masks, 84 depth maps, 11 rejected maps" in again.out


def test_label_maps_lie_on_the_crop_of_their_image(scenes: Scenes) -> None:
    """Row by row: the maps of the store against the scene's own geometry, on the centre crop of the image."""
    maps = LabelMaps(scenes.maps)
    cases = {3: scene(3), 30: scene(30), 53: scene(42), 73: scene(102)}
    for (row, members), mask, depth in zip(
        cases.items(), maps.read("segmentation", [*cases]), maps.read("depth", [*cases]), strict=True
    ):
        crop = to_array(centre_crop(Image.open(io.BytesIO(members["seg.png"])).convert("RGB"), 160))[..., 0]
        expected = crop[5::10, 5::10]
        clear = np.isin(expected, (1, 2))
        assert clear.mean() > 0.9
        found = np.where(mask == UNLABELLED, 9, mask + 1)
        assert (found[clear] == expected[clear]).mean() > 0.97, row
        assert (mask[0] == UNLABELLED).all() == (crop[0] == 9).all()
        metres = np.load(io.BytesIO(members["depth.npy"])) / 1000
        assert np.nanmin(depth) >= np.nanmin(metres) - 1e-6 and np.nanmax(depth) <= np.nanmax(metres) + 1e-6
        assert (np.nan_to_num(depth[mask == 1], nan=1.0) == 1.0).all()  # the disc stands at one metre


@given(height=st.integers(1, 90), width=st.integers(1, 90), size=st.integers(1, 40))
def test_centre_labels_are_those_at_the_centres_of_cells(height: int, width: int, size: int) -> None:
    labels = np.arange(height * width).reshape(height, width)
    found, side = centre_labels(labels, size), min(height, width)
    assert found.shape == (size, size)
    for i in (0, size // 2, size - 1):
        centre = (i + 0.5) * side / size
        assert found[i, 0] // width == (height - side) // 2 + int(centre)
        assert found[0, i] % width == (width - side) // 2 + int(centre)
    if side == size:  # nothing is resampled
        top, left = (height - side) // 2, (width - side) // 2
        assert np.array_equal(found, labels[top : top + side, left : left + side])


def test_numbers_of_masks_and_units_of_depths() -> None:
    config = MapsSection(classes=("a", "b"), first_class=1, depth_unit=0.5, min_depth=0.5, max_depth=2)
    numbers = np.asarray([[0, 1], [2, 255]])
    for kind in (np.uint8, np.uint16):
        found = _mask(encoded(numbers.astype(kind), "PNG"), config)
        assert found.tolist() == [[UNLABELLED, 0], [1, UNLABELLED]]
    palette = Image.fromarray(numbers.astype(np.uint8)).convert("P")
    palette.putpalette([7, 8, 9] * 256)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert _mask(buffer.getvalue(), config).tolist() == [[UNLABELLED, 0], [1, UNLABELLED]]
    for bits in (1, 2, 4):  # as programs that shrink PNGs store few classes
        few = Image.fromarray(np.asarray([[0, 1]], np.uint8))
        assert _mask(grey_png(few, bits), config).tolist() == [[UNLABELLED, 0]], bits
    metres = _depth(npy(np.asarray([[1, 4, 5], [0, np.inf, np.nan]])), config)
    np.testing.assert_array_equal(metres, np.asarray([[0.5, 2, np.nan], [np.nan, np.nan, np.nan]], np.float32))
    assert np.array_equal(_depth(npy(np.asarray([[3]], np.uint16)), config), [[1.5]])
    with pytest.raises(RejectedMapError, match="unknown class 3: expected 1 to 2"):
        _mask(encoded(np.full((2, 2), 3, np.uint8), "PNG"), config)


def test_measures_equal_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    true, predicted = rng.integers(-1, 4, (5, 8, 8)), rng.integers(0, 4, (5, 8, 8))
    true[true == 2] = 1  # class 2 is only predicted, class 4 does not occur at all
    found = overlaps(torch.from_numpy(predicted), torch.from_numpy(true), 5)
    sums = found.sum(0)
    known = true >= 0
    expected = jaccard_score(true[known], predicted[known], average=None, labels=range(4))
    np.testing.assert_allclose((sums[0] / sums[1])[:4], expected)
    assert _mean_iou(sums) == pytest.approx(expected[[0, 1, 3]].mean())  # class 2 is in no map
    assert _accuracy(sums) == pytest.approx(accuracy_score(true[known], predicted[known]))
    depth, guess = torch.rand(3, 4, 4) + 0.5, torch.rand(3, 4, 4) + 0.5
    depth[0, 0, 0], depth[2] = float("nan"), float("nan")
    errors = depth_errors(guess, depth)
    rest = depth[0].isfinite()
    a, b = guess[0][rest], depth[0][rest]
    torch.testing.assert_close(errors[0, 0], (a - b).square().mean().sqrt())
    torch.testing.assert_close(errors[0, 1], ((a - b).abs() / b).mean())
    assert errors[0, 2] == pytest.approx(float((((a / b) < 1.25) & ((b / a) < 1.25)).float().mean()))
    assert errors[2].isnan().all()


def test_depth_is_a_mean_of_bins_and_its_loss_knows_no_scale() -> None:
    one_bin = torch.full((1, 5, 2, 2), -3.0)
    torch.testing.assert_close(depth_of_bins(one_bin, 1.0, 5.0), torch.full((1, 1, 2, 2), 3.0))
    one_bin[:, 4] = 1e6
    torch.testing.assert_close(depth_of_bins(one_bin, 1.0, 5.0), torch.full((1, 1, 2, 2), 5.0), rtol=1e-4, atol=0)
    true = torch.rand(2, 6, 6) + 1
    true[0, 0] = float("nan")
    known = true.isfinite()
    g = ((2 * true + 1e-3).log() - (true + 1e-3).log())[known]
    torch.testing.assert_close(depth_loss(2 * true, true), (g.var() + 0.15 * g.mean() ** 2).sqrt())
    assert depth_loss(true.nan_to_num(1.0), true) < 1e-5
    assert float(depth_loss(torch.ones(1, 2, 2), torch.full((1, 2, 2), float("nan")))) == 0


@pytest.mark.parametrize("head", ["linear", "fpn"])
def test_heads_predict_masks_and_depths_of_new_images(
    scenes: Scenes, tmp_path: Path, svgpipe: Callable[..., Outcome], head: str
) -> None:
    page = tmp_path / "page.html"
    found = svgpipe(*scenes.probe_args("--json", "--html", page, "--set", f"dense_probe.head={head}"))
    assert found.code == 0, found.err
    masks, depths = json.loads(found.out)["probes"]
    assert (masks["task"], depths["task"]) == ("segmentation", "depth")
    assert masks["training_images"] == depths["training_images"] == 60 and masks["test_images"] == 24
    for probe in (masks, depths):
        assert [scores["group"] for scores in probe["groups"]] == ["backbone", "residual", "both"]
        assert [scores["channels"] for scores in probe["groups"]] == [112, 4, 116]
    # Vision features tell the photographs and the distances apart; a constant prediction does not.
    assert masks["groups"][0]["mean_iou"]["low"] > masks["constant"]["mean_iou"]["high"] + 0.15
    assert masks["groups"][0]["accuracy"]["low"] > masks["constant"]["accuracy"]["high"]
    assert depths["groups"][0]["rmse"]["high"] < 0.8 * depths["constant"]["rmse"]["low"]
    assert depths["groups"][0]["relative_error"]["high"] < depths["constant"]["relative_error"]["low"]
    assert set(masks["class_iou"]) == {"cat", "rocket"} and depths["class_iou"] == {}
    assert sum(masks["class_iou"].values()) / 2 == pytest.approx(masks["groups"][2]["mean_iou"]["value"])
    html = page.read_text()
    assert html.count("<img") == 2 * 6 * 3 and "46.51" in html and "most frequent class" in html


def test_the_page_opens_in_a_browser(scenes: Scenes, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    chromium()
    page = tmp_path / "page.html"
    assert svgpipe(*scenes.probe_args("--rows", 8, "--set", "dense_probe.steps=2", "--html", page)).code == 0
    require_good_page(page, tmp_path)


def test_a_probe_is_repeatable_and_shows_a_table(scenes: Scenes, svgpipe: Callable[..., Outcome]) -> None:
    short = scenes.probe_args("--rows", 12, "--set", "dense_probe.steps=3", "--set", "dense_probe.bootstrap=0")
    one, other = svgpipe(*short, "--json"), svgpipe(*short, "--json")
    assert one.code == 0 and one.out == other.out
    assert json.loads(one.out)["probes"][0]["training_images"] == 12 - 1  # a row of these has no usable mask
    shown = svgpipe(*short)
    assert "mean IoU, %" in shown.out and "A.Rel" in shown.out and "paper, ADE20K: raw DINOv3" in shown.out


def test_mirrored_images_have_mirrored_maps(scenes: Scenes) -> None:
    cache = FeatureCache(scenes.cache)
    data = MappedRows(cache, LabelMaps(scenes.maps), "segmentation", np.asarray([3, 5, 9]))
    plain, mirrored = data.labels([2, 0, 2], [False] * 3), data.labels([2, 0, 2], [True, False, True])
    assert torch.equal(mirrored[0], plain[0].flip(-1)) and torch.equal(mirrored[1], plain[1])
    assert not torch.equal(mirrored[0], plain[0]) and torch.equal(plain[0], plain[2])
    found = data.features([2, 0], [True, False])
    np.testing.assert_array_equal(found[0].permute(1, 2, 0), cache.read([9], view="flip")[0])
    np.testing.assert_array_equal(found[1].permute(1, 2, 0), cache.read([3])[0])


def test_a_step_has_the_size_of_its_learning_rate(scenes: Scenes) -> None:
    """A step of AdamW from zero moments changes a weight by the learning rate: here a thousandth, in the warm-up."""
    data = MappedRows(FeatureCache(scenes.cache), LabelMaps(scenes.maps), "segmentation", np.arange(8))
    schedule = ScheduleSection(warmup_steps=1000)
    config = DenseProbeSection(steps=1, batch_size=4, learning_rate=1.0, weight_decay=0.0, schedule=schedule)
    head = DenseHead(data, slice(0, 116), config, torch.device("cpu"))
    before, done = [p.detach().clone() for p in head.head.parameters()], list[int]()
    head.fit(lambda: done.append(1))
    changes = [float((p.detach() - old).abs().max()) for p, old in zip(head.head.parameters(), before, strict=True)]
    assert changes == pytest.approx([1e-3] * 2, rel=1e-2) and done == [1]


def test_maps_that_cannot_be_used_are_rejected_with_their_reason(
    scenes: Scenes, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    lines = [json.loads(line) for line in (scenes.maps / "rejected.jsonl").read_text().splitlines()]
    for line, (extension, _, reason) in zip(lines, BAD.values(), strict=True):
        assert line["reason"].startswith(f"KEY.{extension}: ") and reason in line["reason"]
    assert [line["row"] for line in lines] == list(range(40, 51))
    has, masks = (np.asarray(zarr.open_array(scenes.maps / name)[...]) for name in ("has_depth", "segmentation"))
    assert np.flatnonzero(~has).tolist() == list(range(40, 51)) and (masks[40:51] == UNLABELLED).all()
    shown = svgpipe("inspect", scenes.maps)
    assert shown.code == 0 and "cat, rocket" in shown.out and "rejected maps" in shown.out
    nothing = svgpipe("extract-maps", "--shards", scenes.shards, "--recipe", "demo", "--out", tmp_path / "none")
    assert nothing.code == 2 and "maps.classes" in nothing.err and "maps.depth_unit" in nothing.err


def test_a_killed_extraction_of_maps_resumes(scenes: Scenes, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    out = tmp_path / "maps"
    run_and_kill(scenes.maps_args(out, "--workers", 1), lambda: len(list(out.glob("journal/unit-*.json"))) >= 2)
    assert not (out / "manifest.json").exists()
    refused = svgpipe("probe", scenes.cache, "--maps", out)
    assert refused.code == 1 and "not finished" in refused.err
    cut = next(iter(sorted(out.glob("segmentation/c/*/0/0"))))
    cut.write_bytes(cut.read_bytes()[:100])
    other = svgpipe(*scenes.maps_args(out, "--set", "maps.size=8"))
    assert other.code == 1 and "size: 16 there, 8 here" in other.err
    done = svgpipe(*scenes.maps_args(out))
    assert done.code == 0, done.err
    patterns = ("segmentation/**/*", "depth/**/*", "has_*/**/*", "rejected.jsonl", "zarr.json", "journal/*")
    assert tree_bytes(out, *patterns) == tree_bytes(scenes.maps, *patterns)
    assert svgpipe("verify", out, "--deep").code == 0
    damaged = out / "depth/c/1/0/0"
    content = damaged.read_bytes()
    damaged.write_bytes(content[:50] + b"\0\0\0\0" + content[54:])
    found = svgpipe("verify", out, "--deep")
    assert found.code == 1 and str(damaged) in found.out
    probed = svgpipe("probe", scenes.cache, "--maps", out, "--set", "dense_probe.steps=1")
    assert probed.code == 1 and "svgpipe verify --deep" in probed.err and "Traceback" not in probed.err
    damaged.unlink()
    lost = svgpipe("probe", scenes.cache, "--maps", out, "--set", "dense_probe.steps=1")
    assert lost.code == 1 and f"{damaged}: expected a shard of label maps, found none" in lost.err
    (out / "manifest.json").unlink()
    assert svgpipe(*scenes.maps_args(out)).code == 0 and damaged.read_bytes() == content
    shutil.rmtree(out / "has_depth/c")
    assert "does not name the images that have a map" in svgpipe("verify", out).out


def test_what_does_not_belong_together_is_refused(
    scenes: Scenes, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    other = svgpipe("probe", finished.root / "cache", "--maps", scenes.maps)
    assert other.code == 1 and "expected maps of the shard set of" in other.err
    alone = svgpipe("probe", scenes.cache, "--validation-maps", scenes.maps)
    assert alone.code == 2 and "expected also --maps" in alone.err
    one = svgpipe("probe", scenes.cache, "--maps", scenes.maps, "--validation", finished.root / "cache")
    assert one.code == 2 and "--validation-maps together" in one.err
    missing = svgpipe("probe", scenes.cache, "--maps", tmp_path)
    assert missing.code == 1 and "store of label maps" in missing.err
    ignored = svgpipe("probe", scenes.cache, "--set", "dense_probe.steps=3")
    assert ignored.code == 2 and "expected also --maps" in ignored.err
    wild = ("--set", "dense_probe.learning_rate=1e30", "--set", "dense_probe.steps=3")
    diverged = svgpipe("probe", scenes.cache, "--maps", scenes.maps, *wild)
    assert diverged.code == 1 and "lower dense_probe.learning_rate" in diverged.err
    unknown = svgpipe("probe", scenes.cache, "--maps", scenes.maps, "--set", "dense_probe.head=mlp")
    assert unknown.code == 2 and "linear" in unknown.err
    without = svgpipe(
        "extract-maps", "--shards", finished.root / "shards", "--recipe", scenes.recipe, "--out", tmp_path / "maps"
    )
    assert without.code == 1 and "expected KEY.seg.png or KEY.depth.npy beside the images" in without.err


def test_another_cache_is_tested_on_its_own_maps(
    scenes: Scenes, finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    write_tar(tmp_path / "new.tar", {f"d{i}": scene(300 + i) for i in range(6)})
    shards, cache, maps = (tmp_path / name for name in ("shards", "cache", "maps"))
    assert svgpipe("index", tmp_path / "new.tar", "--unlabelled", "--out", shards).code == 0
    autoencoder = ("--autoencoder", finished.root / "autoencoder", "--recipe", scenes.recipe)
    assert svgpipe("extract", "--shards", shards, *autoencoder, "--out", cache).code == 0
    asked = ("extract-maps", "--shards", shards, "--recipe", scenes.recipe, "--out")
    assert svgpipe(*asked, maps).code == 0
    short = ("--set", "dense_probe.steps=2", "--set", "dense_probe.use_flips=false", "--json")
    found = svgpipe(*scenes.probe_args("--validation", cache, "--validation-maps", maps, *short))
    assert found.code == 0, found.err
    probe = json.loads(found.out)["probes"][0]
    assert (probe["training_images"], probe["test_images"]) == (60, 6) and probe["tested_on"] == str(cache)
    assert svgpipe(*asked, tmp_path / "finer", "--set", "maps.size=32").code == 0
    refused = svgpipe(*scenes.probe_args("--validation", cache, "--validation-maps", tmp_path / "finer", *short))
    assert refused.code == 1 and "maps.size: 16 there, 32 here" in refused.err
    assert svgpipe(*asked, tmp_path / "masks", "--set", "maps.depth_unit=null").code == 0
    masks = svgpipe(*scenes.probe_args("--validation", cache, "--validation-maps", tmp_path / "masks", *short))
    assert [probe["task"] for probe in json.loads(masks.out)["probes"]] == ["segmentation"]
