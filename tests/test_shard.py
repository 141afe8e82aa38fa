"""Sharding: every input is accounted for, bytes are reproducible, and plain webdataset reads them."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from svgpipe.manifests import shards as shards_module
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.shards import ShardSet
from svgpipe.pipeline.cli import main
from svgpipe.stages.images.decode import RejectedImageError, decode_image, to_array
from svgpipe.stages.images.folder import visible_files, visible_folders

from .commands import run_and_kill
from .conftest import Finished, Outcome, tree_bytes, write_crops

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)


def save(path: Path, image: Image.Image, **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Every kind of image that a folder may hold, good and bad."""
    root = tmp_path / "zoo"
    rgb = Image.fromarray(PIXELS)
    good = root / "good"
    save(good / "rgb.jpg", rgb)
    save(good / "rgb.JPEG", rgb)
    save(good / "rgb.png", rgb)
    save(good / "rgb.webp", rgb)
    save(good / "grey.png", rgb.convert("L"))
    save(good / "palette.png", rgb.convert("P"))
    save(good / "rgba.png", rgb.convert("RGBA"))
    save(good / "cmyk.jpg", rgb.convert("CMYK"))
    save(good / "nested" / "sixteen.png", Image.fromarray((np.arange(24 * 32).reshape(24, 32) * 85).astype(np.uint16)))
    exif = Image.Exif()
    exif[0x0112] = 6
    save(good / "rotated.jpg", rgb, exif=exif)
    bad = root / "bad"
    save(bad / "one-good.png", rgb)
    (bad / "empty.jpg").write_bytes(b"")
    (bad / "text.png").write_text("not an image")
    whole = (good / "rgb.jpg").read_bytes()
    (bad / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    save(bad / "animated.webp", rgb, save_all=True, append_images=[rgb.convert("L").convert("RGB")])
    (bad / "notes.txt").write_text("labels by hand")
    (bad / "bomb.png").write_bytes(_huge_png(60_000, 60_000))
    (bad / "gone.jpg").symlink_to(bad / "nowhere.jpg")
    save(bad / "thread.png", Image.new("RGB", (1, 2000)))
    save(good / "phone.jpg", rgb, format="MPO", save_all=True, append_images=[rgb])
    (root / "loose.jpg").write_bytes(whole)
    (bad / ".DS_Store").write_bytes(b"x")
    return root


def _huge_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_holdout_counts_images_alone(tmp_path: Path, photographs: Path) -> None:
    """Captions beside the images are rejected, and are not held out in place of images."""
    shutil.copytree(photographs, tmp_path / "source")
    for image in sorted((tmp_path / "source").rglob("*.*")):
        image.with_suffix(".txt").write_text("a caption")
    assert main(["shard", str(tmp_path / "source"), "--out", str(tmp_path / "out"), "--holdout", "0.1"]) == 0
    rows = ShardSet.open(tmp_path / "out").rows
    assert np.bincount(rows.label[rows.heldout]).tolist() == [1, 1, 1]


def test_a_file_that_could_not_be_read_is_noticed_when_it_can(
    tmp_path: Path, photographs: Path, svgpipe: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same size and time. Permissions are no test here, because the suite may run as root."""
    unreadable = next(iter(sorted(photographs.rglob("*.png")))).name
    real = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == unreadable:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    command = ("shard", photographs, "--out", tmp_path / "out", "--workers", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        assert "3 rejected" in svgpipe(*command).out
        assert svgpipe(*command).code == 0  # still unreadable
    refused = svgpipe(*command)
    assert refused.code == 1 and "3 of 36 source files were changed" in refused.err


def test_every_input_is_stored_or_rejected_with_a_reason(
    zoo: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    found = svgpipe("shard", zoo, "--out", tmp_path / "out", "--workers", 1)
    assert found.code == 0, found.err
    assert "21 inputs = 12 usable + 9 rejected" in found.out
    shards = ShardSet.open(tmp_path / "out")
    assert (shards.manifest.num_inputs, shards.manifest.num_images, shards.manifest.num_rejected) == (21, 12, 9)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {r["path"]: r["reason"] for r in rejects}
    assert reasons["bad/empty.jpg"] == "empty file (0 bytes)"
    assert "not a JPEG" in reasons["bad/text.png"]
    assert reasons["bad/truncated.jpg"] == "undecodable: Truncated File Read"
    assert reasons["bad/animated.webp"] == "animated: 2 frames"
    assert "extension .txt" in reasons["bad/notes.txt"]
    assert "too large: " in reasons["bad/bomb.png"]
    assert "unreadable" in reasons["bad/gone.jpg"]
    assert "too thin: 1x2000" in reasons["bad/thread.png"]
    assert reasons["loose.jpg"] == "not in a class folder"
    refs = shards.refs(range(len(shards)))
    assert {ref.path for ref in refs} == {
        "bad/one-good.png",
        *(f"good/{n}" for n in ("rgb.jpg", "rgb.JPEG", "rgb.png", "rgb.webp", "grey.png", "palette.png")),
        *(f"good/{n}" for n in ("rgba.png", "cmyk.jpg", "nested/sixteen.png", "rotated.jpg", "phone.jpg")),
    }
    assert {ref.path: ref.label for ref in refs}["good/rgb.png"] == 1


def test_decoded_images_are_upright_rgb(zoo: Path) -> None:
    def pixels(name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return to_array(decode_image((zoo / "good" / name).read_bytes()))

    np.testing.assert_array_equal(pixels("rgb.png"), PIXELS)
    assert pixels("rotated.jpg").shape == (32, 24, 3)
    sixteen = pixels("nested/sixteen.png")
    assert sixteen.min() == 0
    assert sixteen.max() > 250
    assert len(np.unique(sixteen)) > 200  # clipped at 255 it would have one or two values
    for name in ("grey.png", "palette.png", "cmyk.jpg", "rgba.png"):
        assert pixels(name).shape == (24, 32, 3)


@pytest.mark.parametrize("orientation", range(10))
def test_exif_orientations_equal_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(buffer)).convert("RGB")
    np.testing.assert_array_equal(to_array(decode_image(buffer.getvalue())), to_array(expected))


@settings(max_examples=300, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP"]), data=st.data())
def test_damaged_bytes_give_an_image_or_a_reject(kind: str, data: st.DataObject) -> None:
    """Especially in the metadata, where Pillow's parsers raise many kinds of errors."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x011A] = 6, "a photograph", 72.0
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, exif=exif)
    content = bytearray(buffer.getvalue())
    for place in data.draw(st.lists(st.integers(0, min(200, len(content) - 1)), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        image = decode_image(bytes(content), max_pixels=1_000_000)
    except RejectedImageError as error:
        assert str(error)
    else:
        assert image.mode == "RGB"


def test_transparency_is_composed_over_white(tmp_path: Path) -> None:
    hidden = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    save(tmp_path / "hidden.png", hidden)
    assert (to_array(decode_image((tmp_path / "hidden.png").read_bytes())) == 255).all()


def test_bytes_do_not_depend_on_workers(photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    options = ["--set", "shard.images_per_shard=7", "--holdout", 0.2]
    for workers in (1, 2):
        assert svgpipe("shard", photographs, "--out", tmp_path / str(workers), "--workers", workers, *options).code == 0
    one, two = (tree_bytes(tmp_path / n, "**/*.tar", "**/*.parquet", "rejected.jsonl") for n in "12")
    assert one == two
    assert len([name for name in one if name.endswith(".tar")]) == 6


def test_plain_webdataset_reads_the_tars(finished: Finished, photographs: Path, tmp_path: Path) -> None:
    shards = finished.shards
    rows = shards.rows
    read = []
    for tar in shards.tars():
        for sample in wds.WebDataset(str(tar), shardshuffle=False, empty_check=False):
            extension = next(e for e in ("jpg", "png") if e in sample)
            read.append((sample["__key__"], int(sample["cls"]), sample[extension], json.loads(sample["json"])["path"]))
    assert [r[0] for r in read] == [ref.key for ref in shards.refs(range(len(rows)))]
    assert [r[1] for r in read] == rows.label.tolist()
    for i, (_, _, data, path) in enumerate(read):
        assert data == shards.read_image(i) == (photographs / path).read_bytes()


def test_the_split_is_per_class_and_by_whole_tars(finished: Finished) -> None:
    shards = finished.shards
    assert np.bincount(shards.rows.label[shards.rows.heldout]).tolist() == [2, 2, 2]
    for i, shard in enumerate(shards.shards):
        assert set(shards.rows.heldout[shards.rows.shard == i]) == {shard.split == "heldout"}
    # Other programs that read shards/*.tar do not train on held-out images.
    assert sorted(shards.directory.glob("*.tar")) == shards.tars("train")
    held = ShardSet.open(str(shards.tars("heldout")[0]))
    assert held.rows.heldout.all() and held.directory == shards.directory


def test_crop_stores_square_pngs(photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    assert svgpipe("shard", photographs, "--out", tmp_path / "out", "--workers", 1, "--set", "shard.crop=24").code == 0
    shards = ShardSet.open(tmp_path / "out")
    with Image.open(io.BytesIO(shards.read_image(0))) as image:
        assert (image.size, image.format) == ((24, 24), "PNG")


def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    source = write_crops(tmp_path / "source", per_class=80)
    options = ["--set", "shard.images_per_shard=10", "--workers", "1"]
    out, records = tmp_path / "killed", tmp_path / "killed" / "journal"
    run_and_kill(["shard", source, "--out", out, *options], lambda: len(list(records.glob("*.json"))) >= 3)
    done = len(list(records.glob("*.json")))
    assert 3 <= done < 24
    assert not (out / "manifest.json").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in sorted(out.glob("*.tar"))[1 : done - 1]}
    (out / "shard-000000.tar").unlink()  # its record says that it is there
    resumed = svgpipe("shard", source, "--out", out, *options)
    assert resumed.code == 0, resumed.err
    assert f"({done - 1} done before)" in resumed.err
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    assert svgpipe("shard", source, "--out", tmp_path / "whole", *options).code == 0
    patterns = ("**/*.tar", "**/*.parquet", "rejected.jsonl", "plan.json")
    assert tree_bytes(out, *patterns) == tree_bytes(tmp_path / "whole", *patterns)
    assert not list(out.glob("*.partial"))
    assert ShardSet.open(out).manifest.fingerprint == ShardSet.open(tmp_path / "whole").manifest.fingerprint


def test_a_killed_worker_is_one_message_and_the_same_command_resumes(
    tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    source, out = write_crops(tmp_path / "source", per_class=120), tmp_path / "out"
    command = ["shard", source, "--out", out, "--set", "shard.images_per_shard=10", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", "from svgpipe.pipeline.cli import entry; entry()", *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while len(list((out / "journal").glob("*.json"))) < 2:
        assert process.returncode is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [c for c in children if "spawn_main" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(int(workers[0]), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "a worker process was killed" in err
    assert "Traceback" not in err
    assert svgpipe(*command).code == 0
    assert svgpipe("shard", source, "--out", tmp_path / "whole", *command[4:]).code == 0
    assert tree_bytes(out, "**/*.tar", "**/*.parquet") == tree_bytes(tmp_path / "whole", "*.tar", "*.parquet")


def test_a_full_disk_keeps_what_is_finished(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """A real full disk: a file system of half a megabyte in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        source = write_crops(tmp_path / "source", per_class=60)
        command = ["shard", source, "--out", disk / "out", "--workers", 1, "--set", "shard.images_per_shard=6"]
        found = svgpipe(*command)
        assert found.code == 1
        assert "no space left on the device" in found.err
        done = {p.name: p.stat().st_mtime_ns for p in (disk / "out").glob("*.tar")}
        assert done
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert svgpipe(*command).code == 0
        kept = {p.name: p.stat().st_mtime_ns for p in (disk / "out").glob("*.tar")}
        assert sum(kept[name] == done[name] for name in done) >= len(done) - 1
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_the_output_may_not_lie_in_the_source(photographs: Path, svgpipe: Callable[..., Outcome]) -> None:
    found = svgpipe("shard", photographs, "--out", photographs / "shards")
    assert found.code == 2
    assert "outside the source" in found.err


def test_a_finished_set_is_left_alone_and_another_source_is_refused(
    photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out"
    assert svgpipe("shard", photographs, "--out", out, "--workers", 1).code == 0
    before = (out / "shard-000000.tar").stat().st_mtime_ns
    assert svgpipe("shard", photographs, "--out", out, "--workers", 1).code == 0
    assert (out / "shard-000000.tar").stat().st_mtime_ns == before
    other = write_crops(tmp_path / "other", per_class=3)
    refused = svgpipe("shard", other, "--out", out)
    assert refused.code == 1
    assert "inputs.source" in refused.err
    refused = svgpipe("shard", photographs, "--out", out, "--set", "shard.seed=5")
    assert refused.code == 1
    assert "config.seed: 0 there, 5 here" in refused.err


@pytest.mark.parametrize(
    ("layout", "code", "words"),
    [
        ([], 2, ["found nothing"]),
        (["empty/"], 2, ["expected class folders"]),
        (["a/x.png", "b/"], 2, ["images of class 'b'", "found none"]),
        (["a/x.png", "b/notes.txt"], 2, ["images of class 'b'", "found 1 other files"]),
        (["a/broken.png", "b/broken.png"], 1, ["all 2 files were rejected", "not a JPEG"]),
        (["train/a/x.png", "val/a/x.png"], 2, ["found a split that holds folders. Give ", "source/train"]),
    ],
)
def test_sources_that_cannot_be_sharded(
    tmp_path: Path, svgpipe: Callable[..., Outcome], layout: list[str], code: int, words: list[str]
) -> None:
    source = tmp_path / "source"
    for name in layout:
        path = source / name if layout != ["empty/"] else source
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        elif "broken" in name or name.endswith(".txt"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("broken")
        else:
            save(path, Image.fromarray(PIXELS))
    found = svgpipe("shard", source, "--out", tmp_path / "out", "--workers", 1)
    assert found.code == code
    for word in words:
        assert word in found.err


def test_damaged_shard_sets_are_refused(photographs: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    out = tmp_path / "out"
    assert svgpipe("shard", photographs, "--out", out, "--workers", 1, "--set", "shard.images_per_shard=9").code == 0
    assert len(ShardSet.open(f"{out}/shard-{{000000..000002}}.tar").rows) == 27
    with pytest.raises(ArtifactError, match="not a shard of"):
        ShardSet.open(f"{out}/shard-{{000000..000009}}.tar")
    tar = out / "shard-000001.tar"
    whole = tar.read_bytes()
    shards = ShardSet.open(out)
    flipped = bytearray(whole)
    flipped[shards.refs([10])[0].offset + 5] ^= 1
    tar.write_bytes(flipped)
    with pytest.raises(ArtifactError, match="altered or truncated"):
        ShardSet.open(out).read_image(10)
    tar.write_bytes(whole[:-1000])
    with pytest.raises(ArtifactError, match=f"expected a tar of {len(whole)} bytes"):
        ShardSet.open(out)
    tar.unlink()
    with pytest.raises(ArtifactError, match="found none"):
        ShardSet.open(out)
    (out / "shard-000000.parquet").write_bytes(b"PAR1")
    tar.write_bytes(whole)
    with pytest.raises(ArtifactError, match="not a readable parquet"):
        _ = ShardSet.open(out).rows


def test_tars_are_plain_ustar_without_times(finished: Finished) -> None:
    shards = finished.shards
    with tarfile.open(str(shards.tars()[0])) as tar:
        assert {(m.mtime, m.uid, m.uname) for m in tar.getmembers()} == {(0, 0, "")}


def test_threads_share_an_opened_set(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    """Like the readers of an extraction in one process, on more tars than indexes are cached."""
    monkeypatch.setattr(shards_module, "INDEXES_KEPT", 1)
    shards = finished.shards
    rows = np.random.default_rng(0).integers(0, len(shards), 600).tolist()
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda row: shards.refs([row])[0].key, rows))
    finally:
        sys.setswitchinterval(before)
    assert found == [ref.key for ref in finished.shards.refs(rows)]


def test_a_class_without_a_usable_image_is_named(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    source = tmp_path / "source"
    save(source / "a" / "x.png", Image.fromarray(PIXELS))
    (source / "b").mkdir()
    (source / "b" / "broken.png").write_text("broken")
    found = svgpipe("shard", source, "--out", tmp_path / "out", "--workers", 1)
    assert found.code == 0 and "1 of 2 classes have no training images: 1 (b)" in found.err
    assert ShardSet.open(tmp_path / "out").manifest.class_names == ["a", "b"]


def swap(one: Path, other: Path) -> None:
    """Swap two files and give both the size of the longer one. JPEG decoders ignore what follows the end marker."""
    first, second = one.read_bytes(), other.read_bytes()
    size = max(len(first), len(second))
    one.write_bytes(second.ljust(size, b"\0"))
    other.write_bytes(first.ljust(size, b"\0"))


def test_swapped_files_of_one_size_are_noticed(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """With their old modification times too: restored by tools such as tar and rsync. Touched files are the same."""
    source = write_crops(tmp_path / "source", per_class=4)
    one, other = source / "cat" / "00.jpg", source / "coffee" / "00.jpg"
    swap(one, other)
    swap(one, other)  # now of one size
    command = ["shard", source, "--out", tmp_path / "out", "--workers", 1]
    assert svgpipe(*command).code == 0
    times = {path: path.stat().st_mtime_ns for path in (one, other)}
    for path in source.rglob("*"):
        os.utime(path, ns=(7, 7))
    assert svgpipe(*command).code == 0
    recorded = (tmp_path / "out" / "sources.parquet").read_bytes()
    swap(one, other)
    for path, time_ns in times.items():
        os.utime(path, ns=(time_ns, time_ns))
    refused = svgpipe(*command)
    assert refused.code == 1 and "2 of 12 source files were changed after they were sharded, as" in refused.err
    assert str(one) in refused.err and (tmp_path / "out" / "sources.parquet").read_bytes() == recorded


def test_a_file_that_changed_during_an_interrupted_run_is_sharded_again(
    tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    source, out = write_crops(tmp_path / "source", per_class=4), tmp_path / "out"
    one, other = source / "cat" / "00.jpg", source / "coffee" / "00.jpg"
    swap(one, other)
    command = ["shard", source, "--workers", 1, "--set", "shard.images_per_shard=4", "--out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("svgpipe.stages.shard.from_images.publish_shards", None)  # all tars are written, none published
        with pytest.raises(TypeError):
            svgpipe(*command, out)
    swap(one, other)
    found = svgpipe(*command, out)
    assert found.code == 0, found.err
    assert "was changed after it was sharded; its tar is written again" in found.err
    assert svgpipe(*command, tmp_path / "anew").code == 0
    assert tree_bytes(out, "**/*.tar", "**/*.parquet") == tree_bytes(tmp_path / "anew", "*.tar", "*.parquet")


def test_folders_are_listed_with_links_and_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "a" / ".ipynb_checkpoints").mkdir(parents=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("a/1.jpg", "a/._1.jpg", "a/.ipynb_checkpoints/1.jpg", "elsewhere/2.jpg"):
        (tmp_path / name).write_bytes(b"")
    source = tmp_path / "source"
    source.mkdir()
    (source / "linked").symlink_to(elsewhere)
    (source / "a").symlink_to(tmp_path / "a")
    (source / "a" / "around").symlink_to(source)  # leads back to the folder that holds it
    (source / "gone.jpg").symlink_to(tmp_path / "nowhere")
    found = sorted(os.path.relpath(entry.path, source) for entry in visible_files(source))
    assert found == ["a/1.jpg", "gone.jpg", "linked/2.jpg"]
    assert visible_folders(source) == ["a", "linked"]


def test_large_metadata_is_no_reason_to_reject_pixels() -> None:
    """Pillow limits texts and colour profiles of PNG files to 1 MB."""
    picture = Image.fromarray(PIXELS)
    text = PngImagePlugin.PngInfo()
    text.add_text("prompt", "a" * 3_000_000, zip=True)
    for options in ({"pnginfo": text}, {"icc_profile": bytes(3_000_000)}):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG", **options)
        np.testing.assert_array_equal(to_array(decode_image(buffer.getvalue())), PIXELS)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpeg_pixels_equal_pillow(mode: str, subsampling: int, progressive: bool) -> None:
    picture = Image.fromarray(PIXELS).convert(mode)
    for quality in (50, 75, 90, 98):
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=quality, subsampling=subsampling, progressive=progressive)
        expected = np.asarray(Image.open(buffer).convert("RGB"))
        np.testing.assert_array_equal(to_array(decode_image(buffer.getvalue())), expected)


def test_classes_that_look_alike_are_refused(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    for number, pair in enumerate((("café", "cafe\u0301"), (os.fsdecode(b"\xff"), os.fsdecode(b"\xfe")))):
        for name in pair:
            save(tmp_path / str(number) / name / "x.png", Image.fromarray(PIXELS))
        refused = svgpipe("shard", tmp_path / str(number), "--out", tmp_path / "out")
        assert refused.code == 2 and "found two that look alike" in refused.err
