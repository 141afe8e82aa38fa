"""`svgpipe index`: every image member of existing tars is accounted for."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.images.tar_names import split_name
from svgpipe.stages.shard.tar_members import unsafe

from .conftest import Finished, Outcome


def image(kind: str, shade: int, size: tuple[int, int] = (48, 40)) -> bytes:
    rng = np.random.default_rng(shade)
    pixels = rng.integers(0, 255, (*size[::-1], 3)).astype(np.uint8) // 2 + shade // 2
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few hundred kilobytes whose header declares 400 megapixels."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tars with every oddity: 6 usable images and 11 unusable ones."""
    folder = tmp_path_factory.mktemp("foreign")
    write(
        folder / "train-0.tar",
        [
            ("set/a/1.jpg", image("JPEG", 1)),
            ("set/a/2.jpeg", image("JPEG", 2)),  # interleaved: labels of both come after both
            ("set/a/1.cls", b"0"),
            ("set/a/2.cls", b" 1\n"),
            ("set/b/3.JPEG", image("JPEG", 3)),
            ("set/b/3.json", json.dumps({"label": 2, "url": "x"}).encode()),
            ("4.mask.png", image("PNG", 9)),  # not the image of key 4: another extension
            ("4.seg.png", image("PNG", 9)),  # a label map
            ("4.cls", b"2"),
            ("4.png", image("PNG", 4)),
            ("set/a/1.png", image("PNG", 5)),  # a second image under the key of the first
            ("../../etc/6.jpg", image("JPEG", 6)),
            ("/7.jpg", image("JPEG", 7)),
            ("8.jpg", b""),
            ("8.cls", b"0"),
            ("9.jpg", image("JPEG", 9)[:-500]),
            ("9.cls", b"0"),
            ("10.png", bomb()),
            ("10.cls", b"0"),
            ("11.jpg", b"not an image at all"),
            ("11.cls", b"0"),
            ("12.jpg", image("JPEG", 12)),
            ("13.jpg", image("JPEG", 13)),
            ("13.cls", b"7"),  # one class more than the names that are given
            ("readme.txt", b"hello"),
        ],
    )
    cut = write(
        folder / "train-1.tar",
        [
            ("1.webp", image("WEBP", 21)),
            ("1.cls", b"1"),
            ("2.jpg", image("JPEG", 22)),
            ("2.cls", b"0"),
            ("3.jpg", image("JPEG", 23, (400, 300))),
            ("3.cls", b"0"),
        ],
    )
    cut.write_bytes(cut.read_bytes()[: 512 * 14 + 9000])
    (folder / "names").write_text("zero\none\ntwo\n")
    return folder


REASONS = {
    "duplicate key": 1,
    "unsafe name": 2,
    "empty file (0 bytes)": 1,
    "too large": 1,
    "not a JPEG, PNG or WebP image": 1,
    "no label": 1,
    "unknown label": 1,
    "truncated": 1,
    "'mask.png' is not an image's extension (names are split at their first dot)": 1,
}


def test_every_image_member_is_accounted_for(foreign: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    out = tmp_path / "set"
    found = svgpipe("index", f"{foreign}/train-{{0..1}}.tar", "--out", out, "--class-names", foreign / "names")
    assert found.code == 0, found.err
    assert "17 inputs = 7 usable + 10 rejected" in found.out
    assert "train-1.tar: truncated or damaged (" in found.err and "images before that are kept" in found.err
    shards = ShardSet.open(out)
    refs = shards.refs(range(len(shards)))
    assert len(refs) == len(shards) == 17
    usable = {ref.path: ref.label for ref in refs if ref.reject is None}
    assert usable == {
        "set/a/1.jpg": 0,
        "set/a/2.jpeg": 1,
        "set/b/3.JPEG": 2,
        "4.png": 2,
        "9.jpg": 0,  # its header is whole; only decoding tells, see below
        "1.webp": 1,
        "2.jpg": 0,
    }
    counts: dict[str, int] = {}
    for ref in refs:
        if ref.reject is not None:
            kind = ref.reject.partition(":")[0]
            counts[kind] = counts.get(kind, 0) + 1
    assert counts == REASONS
    for row, ref in enumerate(refs):
        if ref.reject is None:
            assert shards.read_image(row) == ref.read()
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 10
    assert all({"tar", "offset", "reason"} <= set(reject) for reject in rejected)
    assert svgpipe("verify", out, "--deep").code == 0
    assert "2 to 3" in svgpipe("inspect", out).out  # images per class: rejects have no label, or do not count
    deep = svgpipe(
        "index",
        *sorted(foreign.glob("*.tar")),
        "--out",
        tmp_path / "deep",
        "--decode",
        "--class-names",
        foreign / "names",
    )
    assert "17 inputs = 6 usable + 11 rejected" in deep.out  # 9.jpg is out


def test_indexed_tars_are_extracted_like_sharded_ones(
    finished: Finished, foreign: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    pattern = f"{foreign}/train-{{0..1}}.tar"
    options = ["--autoencoder", finished.root / "autoencoder", "--recipe", finished.recipe_file]
    refused = svgpipe("extract", "--shards", pattern, *options, "--out", tmp_path / "cache")
    assert refused.code == 1
    assert "svgpipe index" in refused.err
    assert svgpipe("index", pattern, "--out", tmp_path / "set", "--class-names", foreign / "names").code == 0
    options += ["--shards", tmp_path / "set", "--out", tmp_path / "cache"]
    refused = svgpipe("extract", *options)
    assert refused.code == 1
    assert "10 × rejected when indexed" in refused.err
    found = svgpipe("extract", *options, "--max-rejects", 0.7)
    assert found.code == 0, found.err
    assert "17 samples = 6 valid + 11 rejected" in found.out
    cache = FeatureCache(tmp_path / "cache")
    shards = ShardSet.open(tmp_path / "set")
    rejected = [json.loads(line) for line in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 11
    assert any(reject["reason"].startswith("damaged") and reject["key"] == "9" for reject in rejected)
    for reject in rejected:
        ref = shards.refs([reject["row"]])[0]
        assert (str(ref.tar), ref.offset) == (reject["tar"], reject["offset"])
        assert not cache.valid[reject["row"]]
        assert not cache.read([reject["row"]]).any()
    assert all(cache.read([row]).any() for row in np.flatnonzero(cache.valid))
    assert svgpipe("verify", tmp_path / "cache", "--deep").code == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (gzip.compress(b"x" * 2000, mtime=0), "is compressed with gzip"),
        (b"BZh91AY" + b"x" * 1000, "is compressed with bzip2"),
        (b"#!/bin/sh\n" * 200, "expected a tar, found 2000 bytes of something else"),
    ],
)
def test_files_other_than_plain_tars_are_refused(
    tmp_path: Path, svgpipe: Callable[..., Outcome], content: bytes, words: str
) -> None:
    (tmp_path / "a.tar").write_bytes(content)
    found = svgpipe("index", tmp_path / "a.tar", "--out", tmp_path / "out")
    assert found.code == 2
    assert words in found.err
    assert not (tmp_path / "out").exists()


def test_unreadable_parts_of_a_tar_are_counted(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """tarfile silently ends at all of these."""
    members = [(f"{i}.png", image("PNG", i)) for i in range(3)]
    labels = [(f"{i}.cls", b"0") for i in range(3)]
    whole = write(tmp_path / "whole.tar", [*labels, *members])
    size = whole.stat().st_size
    with tarfile.open(whole) as tar:
        second = tar.getmember("1.png")
        end = (tar.getmember("2.png").offset_data + len(members[2][1]) + 511) // 512 * 512
    damaged = bytearray(whole.read_bytes())
    damaged[second.offset + 148] ^= 1  # a digit of the header's checksum
    (tmp_path / "damaged.tar").write_bytes(damaged)
    (tmp_path / "joined.tar").write_bytes(whole.read_bytes() * 2)
    (tmp_path / "endless.tar").write_bytes(whole.read_bytes()[:end])
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[: second.offset + 100])
    expected = {
        "whole": (3, [], 0),
        "damaged": (1, [(second.offset, "no readable header")], 2),  # two labels remain without their images
        "joined": (3, [(size, "data after the tar's end marker")], 0),
        "endless": (3, [], 0),
        "cut": (1, [(second.offset, "no readable header")], 2),
    }
    for name, (usable, lost, orphans) in expected.items():
        found = svgpipe("index", tmp_path / f"{name}.tar", "--out", tmp_path / name)
        assert found.code == 0, found.err
        rejected = len(lost) + orphans
        assert f"{usable + rejected} inputs = {usable} usable + {rejected} rejected" in found.out
        rejects = [json.loads(line) for line in (tmp_path / name / "rejected.jsonl").read_text().splitlines()]
        assert [r["path"] for r in rejects if r["reason"] == "label without an image"] == ["1.cls", "2.cls"][:orphans]
        rejects = rejects[orphans:]
        assert [reject["offset"] for reject in rejects] == [offset for offset, _ in lost]
        for reject, (_, reason) in zip(rejects, lost, strict=True):
            assert reason in reject["reason"]
            assert reason in found.err
        assert svgpipe("verify", tmp_path / name, "--deep").code == 0
    damaged[148] ^= 1
    (tmp_path / "first.tar").write_bytes(damaged)
    first = svgpipe("index", tmp_path / "first.tar", "--out", tmp_path / "first")
    assert first.code == 1
    assert "expected at least one usable image" in first.err


@pytest.mark.parametrize("label", ["--5", "9" * 5000, "99999999999", "٣", "[" * 100_000])
def test_an_absurd_label_is_a_reject(tmp_path: Path, svgpipe: Callable[..., Outcome], label: str) -> None:
    members = [("0.png", image("PNG", 0)), ("0.cls", b"0"), ("1.png", image("PNG", 1))]
    kind = "json" if label.startswith("[") else "cls"
    write(tmp_path / "a.tar", [*members, (f"1.{kind}", label.encode())])
    (tmp_path / "names").write_text("zero\none\n")
    found = svgpipe("index", tmp_path / "a.tar", "--out", tmp_path / "out", "--class-names", tmp_path / "names")
    assert found.code == 0, found.err
    assert "2 inputs = 1 usable + 1 rejected" in found.out


@pytest.mark.parametrize(
    ("name", "words"), [("", "found a folder. Give its tars"), ("*.tar", "no file matches. Inside quotes use braces")]
)
def test_patterns_without_a_tar_are_explained(
    tmp_path: Path, svgpipe: Callable[..., Outcome], name: str, words: str
) -> None:
    found = svgpipe("index", tmp_path / name, "--out", tmp_path / "out")
    assert found.code == 2
    assert words in found.err


def test_numbers_among_names_are_refused(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    members = [("0.png", image("PNG", 0)), ("0.cls", b"3"), ("1.png", image("PNG", 1)), ("1.cls", b"cat")]
    write(tmp_path / "a.tar", members)
    found = svgpipe("index", tmp_path / "a.tar", "--out", tmp_path / "out")
    assert found.code == 2
    assert "some labels are numbers, others are names (as 3 and 'cat')" in found.err


def test_labels_by_name_and_nested_fields(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    members = []
    for i, name in enumerate(["tench", "goldfish", "tench"]):
        members += [
            (f"{i}.png", image("PNG", i)),
            (f"{i}.json", json.dumps({"meta": {"class": name}}).encode()),
        ]
    write(tmp_path / "a.tar", members)
    found = svgpipe("index", tmp_path / "a.tar", "--out", tmp_path / "out", "--label-field", "meta.class")
    assert found.code == 0, found.err
    shards = ShardSet.open(tmp_path / "out")
    assert shards.manifest.class_names == ["goldfish", "tench"]
    assert shards.rows.label.tolist() == [1, 0, 1]
    none = svgpipe("index", tmp_path / "a.tar", "--out", tmp_path / "none")
    assert none.code == 1
    assert "expected at least one usable image" in none.err
    assert "no label" in none.err


def test_a_tar_of_the_held_out_split(finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """svgpipe's own tars, indexed as existing tars, give the rows of their own index."""
    tars = finished.shards.tars()
    pattern = str(tars[0]).replace("000000", "{000000..000003}")
    names = tmp_path / "names"
    names.write_text("\n".join(finished.shards.manifest.class_names))
    found = svgpipe(
        "index", pattern, "--out", tmp_path / "out", "--heldout", tars[-1], "--class-names", names, "--workers", 2
    )
    assert found.code == 0, found.err
    shards = ShardSet.open(tmp_path / "out")
    assert shards.manifest.num_heldout == finished.shards.manifest.num_heldout
    for name in ("label", "heldout", "shard"):
        np.testing.assert_array_equal(getattr(shards.rows, name), getattr(finished.shards.rows, name))
    ours, theirs = (s.refs(range(len(s))) for s in (finished.shards, shards))
    assert [(r.offset, r.size, r.sha256, r.key) for r in ours] == [(r.offset, r.size, r.sha256, r.key) for r in theirs]


@given(st.text(st.characters(blacklist_categories=["Cs"]), max_size=30))
def test_split_names_keep_their_parts_and_are_safe(name: str) -> None:
    key, extension = split_name(name)
    assert name.lower().startswith(key.lower())
    assert "." not in key.rpartition("/")[2]
    assert len(key) + len(extension) <= len(name.lower()) + len(name)
    if unsafe(name) is None:
        assert not name.startswith("/")
        assert ".." not in name.split("/")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"tench\ncrane\ngoldfish\ncrane\n", "lines 2 and 4 are both 'crane'"),
        ("café\n".encode("latin-1"), "in UTF-8"),
        (b"", "an empty file"),
        (b"tench\n\ngoldfish\n", "line 2"),
        (None, "found none"),
    ],
)
def test_invalid_class_names_are_refused(
    content: bytes | None, words: str, svgpipe: Callable[..., Outcome], tmp_path: Path
) -> None:
    """Duplicate names would give two classes one number."""
    if content is not None:
        (tmp_path / "names").write_bytes(content)
    found = svgpipe("index", tmp_path / "a.tar", "--out", tmp_path / "out", "--class-names", tmp_path / "names")
    assert found.code == 2 and words in found.err


def reasons(tar: Location, out: Path, svgpipe: Callable[..., Outcome], *more: object) -> dict[str, str]:
    """Index a tar. Return the reason of every rejected member by its name."""
    found = svgpipe("index", tar, "--out", out, *more)
    assert found.code == 0, found.err
    shards = ShardSet.open(out)
    refs = shards.refs(range(len(shards)))
    manifest = shards.manifest
    assert manifest.num_inputs == len(refs) == manifest.num_images + manifest.num_rejected
    return {ref.path: ref.reject for ref in refs if ref.reject is not None}


def test_every_member_that_looks_like_media_or_carries_a_label_is_counted(
    tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    good = image("JPEG", 1)
    members = [
        *(("0.jpg", good), ("0.cls", b"0")),
        *(("img1.v2.crop.jpg", good), ("img1.cls", b"0")),
        *((f"2.{kind}", b"x") for kind in ("gif", "tiff", "heic", "mp4", "wav")),
        ("3.cls", b"0"),
        ("4.json", b'{"label": 0}'),
        ("._0.jpg", b"\0\5\x16\7"),
        ("a\\5.jpg", good),
        ("meta.json", b'{"images": 7}'),  # neither an image nor a label
        ("readme.txt", b"hello"),
        *(("6.jpg", good), ("6.cls", b"0"), ("6.cls", b"1")),  # relabelled by appending
    ]
    write(tmp_path / "a.tar", members)
    assert reasons(tmp_path / "a.tar", tmp_path / "out", svgpipe) == {
        "img1.v2.crop.jpg": "'v2.crop.jpg' is not an image's extension (names are split at their first dot)",
        **{
            f"2.{kind}": f"{kind} is not a format that svgpipe reads (jpg, jpeg, webp, png)"
            for kind in ("gif", "tiff", "heic", "mp4", "wav")
        },
        "3.cls": "label without an image",
        "4.json": "label without an image",
        "._0.jpg": "hidden file: its name begins with a dot",
        "a\\5.jpg": "unsafe name: it contains a backslash",
        "6.jpg": "two labels: its label is stored twice in this tar, with different content",
    }


def test_of_several_images_of_a_key_the_photograph_is_used(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    mask = io.BytesIO()
    Image.new("L", (48, 40)).save(mask, "PNG")
    members = [
        *(("0.png", mask.getvalue()), ("0.jpg", image("JPEG", 0)), ("0.cls", b"0")),
        *(("1.png", b""), ("1.jpg", image("JPEG", 1)), ("1.cls", b"0")),
        *(("2.jpg", b""), ("2.png", image("PNG", 2)), ("2.cls", b"0")),
        *(("3.jpg", image("JPEG", 3)), ("3.jpg", image("JPEG", 4)), ("3.cls", b"0")),
    ]
    write(tmp_path / "a.tar", members)
    assert reasons(tmp_path / "a.tar", tmp_path / "out", svgpipe) == {
        "0.png": "duplicate key: 0.jpg is the image of this key",
        "1.png": "empty file (0 bytes)",
        "2.jpg": "empty file (0 bytes)",
        "3.jpg": "duplicate key: 3.jpg is the image of this key",
    }


def test_a_sparse_member_is_a_reject(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """Its stored bytes are not its content. Written by GNU tar."""
    with (tmp_path / "1.jpg").open("wb") as file:
        file.write(image("JPEG", 1))
        file.truncate(10_000_000)
    (tmp_path / "0.jpg").write_bytes(image("JPEG", 0))
    for i in range(2):
        (tmp_path / f"{i}.cls").write_text("0")
    names = [f"{i}.{kind}" for i in range(2) for kind in ("jpg", "cls")]
    subprocess.run(["tar", "--sparse", "-cf", "a.tar", *names], cwd=tmp_path, check=True)
    assert (tmp_path / "a.tar").stat().st_size < 1_000_000
    found = reasons(tmp_path / "a.tar", tmp_path / "out", svgpipe)
    assert found == {"1.jpg": "sparse member: its bytes are not stored in one piece"}


def test_empty_tars_are_zero_rows_and_a_note(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    write(tmp_path / "1.tar", [])
    (tmp_path / "2.tar").write_bytes(b"")
    write(tmp_path / "0.tar", [("0.png", image("PNG", 0)), ("0.cls", b"0")])
    write(tmp_path / "3.tar", [("1.png", image("PNG", 1)), ("1.cls", b"0")])
    found = svgpipe("index", f"{tmp_path}/{{0..3}}.tar", "--out", tmp_path / "out")
    assert found.code == 0, found.err
    assert "3 inputs = 2 usable + 1 rejected" in found.out
    assert "1.tar: holds no image and no label" in found.err
    assert "2.tar: offset 0: empty file (0 bytes)" in found.err
    shards = ShardSet.open(tmp_path / "out")
    assert [ref.key for ref in shards.refs([0, 1, 2])] == ["0", "lost-0", "1"]
    assert svgpipe("verify", tmp_path / "out", "--deep").code == 0
    alone = svgpipe("index", tmp_path / "1.tar", "--out", tmp_path / "alone")
    assert alone.code == 1 and "expected at least one usable image" in alone.err


def test_a_tar_that_was_relabelled_is_refused(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """The new tar has the same size. Touching a tar, without a change, is allowed."""
    tar = tmp_path / "a.tar"
    members = [(f"{i}.png", image("PNG", i)) for i in range(2)]
    write(tar, [*members, ("0.cls", b"0"), ("1.cls", b"1")])
    index = ("index", tar, "--out", tmp_path / "out")
    assert svgpipe(*index).code == 0
    os.utime(tar, ns=(1, 1))
    assert svgpipe(*index).code == 0
    write(tar, [*members, ("0.cls", b"1"), ("1.cls", b"0")])
    again = svgpipe(*index)
    assert again.code == 1 and "a.tar: was changed after it was indexed" in again.err
    damage = svgpipe("verify", tmp_path / "out")
    assert damage.code == 1 and "a.tar: was changed after it was indexed" in damage.out + damage.err
    extract = ("extract", "--autoencoder", finished.root / "autoencoder", "--recipe", finished.recipe_file)
    refused = svgpipe(*extract, "--shards", tmp_path / "out", "--out", tmp_path / "cache")
    assert refused.code == 1 and "Its labels may be others now" in refused.err


def test_a_tar_that_changed_during_an_interrupted_index_is_scanned_again(
    tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    tar, second = tmp_path / "a.tar", tmp_path / "b.tar"
    members = [(f"{i}.png", image("PNG", i)) for i in range(2)]
    for path in (tar, second):
        write(path, [*members, ("0.cls", b"0"), ("1.cls", b"cat")])
    index = ("index", tar, second, "--out", tmp_path / "out")
    assert svgpipe(*index).code == 2  # numbers and names
    write(tar, [*members, ("0.cls", b"1"), ("1.cls", b"cat")])
    (tmp_path / "names").write_text("dog\ncat\n")
    found = svgpipe(*index, "--class-names", tmp_path / "names")
    assert found.code == 0, found.err
    assert "a.tar: was changed after it was scanned" in found.err and "(1 done before)" in found.err
    assert ShardSet.open(tmp_path / "out").rows.label.tolist() == [1, 1, 0, 1]


def test_damaged_jpegs_are_rejected_or_kept(
    finished: Finished, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Pillow decodes both without an error: to an image whose lower half is grey."""
    folder = tmp_path / "source" / "cat"
    folder.mkdir(parents=True)
    for number, options in enumerate(({}, {"progressive": True}, {})):
        pixels = Image.fromarray(np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8))
        buffer = io.BytesIO()
        pixels.save(buffer, "JPEG", quality=90, **options)
        whole = buffer.getvalue()
        content = whole if number == 2 else whole[: len(whole) // 2] + b"\xff\xd9"
        Image.open(io.BytesIO(content)).load()
        (folder / f"{number}.jpg").write_bytes(content)
    command = ("shard", tmp_path / "source", "--workers", 1, "--out")
    assert "3 inputs = 1 usable + 2 rejected" in svgpipe(*command, tmp_path / "strict").out
    assert "damaged: Corrupt JPEG data" in (tmp_path / "strict" / "rejected.jsonl").read_text()
    kept = tmp_path / "kept"
    assert "3 inputs = 3 usable + 0 rejected" in svgpipe(*command, kept, "--keep-damaged").out
    shards = ShardSet.open(kept)
    damaged = {ref.path: ref.damaged for ref in shards.refs(range(3))}
    assert damaged == {"cat/0.jpg": True, "cat/1.jpg": True, "cat/2.jpg": False}
    indexed = tmp_path / "indexed"
    index = ("index", *shards.tars(), "--out")
    assert set(reasons(shards.tars()[0], tmp_path / "decoded", svgpipe, "--decode").values()) == {
        "damaged: Corrupt JPEG data: premature end of data segment"
    }
    assert svgpipe(*index, indexed, "--keep-damaged").code == 0
    assert "2 damaged" in svgpipe("inspect", indexed).out
    recipe = ("--autoencoder", finished.root / "autoencoder", "--recipe", finished.recipe_file)
    for source in (kept, indexed):
        found = svgpipe("extract", "--shards", source, "--out", source / "cache", *recipe)
        assert "3 samples = 3 valid + 0 rejected" in found.out, found.err


def test_notes_about_tars_without_an_end_and_about_leaked_images(
    tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    odd = "Screenshot\u202f1.png"  # a narrow space, as macOS writes it
    members = [(odd, image("PNG", 0)), (odd.replace("png", "cls"), b"0"), ("1.png", image("PNG", 1)), ("1.cls", b"0")]
    whole = write(tmp_path / "a.tar", members)
    with tarfile.open(whole) as tar:
        end = tar.getmember("1.png").offset
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:end])
    (tmp_path / "link.tar").symlink_to(whole)
    same = svgpipe("index", whole, "--heldout", tmp_path / "link.tar", "--out", tmp_path / "same")
    assert same.code == 2 and "named twice" in same.err
    found = svgpipe("index", whole, "--heldout", tmp_path / "cut.tar", "--out", tmp_path / "out")
    assert found.code == 0, found.err
    assert "cut.tar: has no end marker; it may be cut off between two members" in found.err
    assert "1 held-out images are also training images" in found.err and "3 usable + 0 rejected" in found.out
