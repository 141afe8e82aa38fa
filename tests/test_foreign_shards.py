"""`svgpipe index`: every image member of existing tars is accounted for."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.shard.from_tars import split_name, unsafe

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
    """Two tars with every oddity: 6 usable images and 10 unusable ones."""
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
            ("4.seg.png", image("PNG", 9)),  # not an image of this set: another extension
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
}


def test_every_image_member_is_accounted_for(foreign: Path, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    out = tmp_path / "set"
    found = svgpipe("index", f"{foreign}/train-{{0..1}}.tar", "--out", out, "--class-names", foreign / "names")
    assert found.code == 0, found.err
    assert "16 inputs = 7 usable + 9 rejected" in found.out
    assert "train-1.tar: truncated or damaged after" in found.err
    shards = ShardSet.open(out)
    refs = shards.refs(range(len(shards)))
    assert len(refs) == len(shards) == 16
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
    assert len(rejected) == 9
    assert all({"tar", "offset", "reason"} <= set(reject) for reject in rejected)
    assert svgpipe("verify", out, "--deep").code == 0
    assert "2 to 3" in svgpipe("inspect", out).out  # images per class: rejects have no label, or do not count
    deep = svgpipe("index", f"{foreign}/train-{{0..1}}.tar", "--out", tmp_path / "deep", "--decode")
    assert "16 inputs = 7 usable + 9 rejected" in deep.out  # 9.jpg is out, label 7 is a class where none are named


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
    assert "9 × rejected when indexed" in refused.err
    found = svgpipe("extract", *options, "--max-rejects", 0.7)
    assert found.code == 0, found.err
    assert "16 samples = 6 valid + 10 rejected" in found.out
    cache = FeatureCache(tmp_path / "cache")
    shards = ShardSet.open(tmp_path / "set")
    rejected = [json.loads(line) for line in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 10
    assert any(reject["reason"].startswith("undecodable") and reject["key"] == "9" for reject in rejected)
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
        "whole": (3, []),
        "damaged": (1, [(second.offset, "no readable header")]),
        "joined": (3, [(size, "data after the tar's end marker")]),
        "endless": (3, []),
        "cut": (1, [(second.offset, "no readable header")]),
    }
    for name, (usable, lost) in expected.items():
        found = svgpipe("index", tmp_path / f"{name}.tar", "--out", tmp_path / name)
        assert found.code == 0, found.err
        assert f"{usable + len(lost)} inputs = {usable} usable + {len(lost)} rejected" in found.out
        rejects = [json.loads(line) for line in (tmp_path / name / "rejected.jsonl").read_text().splitlines()]
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
    ("name", "words"), [("", "found a folder. Give its tars"), ("*.tar", "'*' is not expanded here")]
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
