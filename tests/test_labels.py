"""Labels of existing tars: a text stays a text, and nothing is renumbered silently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from svgpipe.manifests.errors import UsageError
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.shard.labels import (
    LabelError,
    RawLabel,
    classes_of,
    empty_classes,
    label_of_json,
    label_of_text,
    order_warning,
)

from .conftest import Outcome
from .test_foreign_shards import image, write


def in_json(value: object) -> RawLabel | None:
    return label_of_json(json.dumps({"label": value}).encode(), "label")


def in_text(text: str) -> RawLabel:
    return label_of_text(text.encode())


def numbers(labels: list[RawLabel], names: list[str] | None = None) -> list[int]:
    classes = classes_of(labels, names)
    return [classes.index(label) for label in labels]


def test_a_json_text_is_a_name_also_if_it_is_digits() -> None:
    labels = [RawLabel("name", text) for text in ("1", "2", "3")]
    assert [in_json(text) for text in ("1", " 2\n", "3")] == labels
    assert numbers(labels, ["1", "2", "3"]) == [0, 1, 2]
    assert classes_of([RawLabel("name", "01"), RawLabel("name", "1")], None).names == ["01", "1"]
    with pytest.raises(LabelError, match="unknown label: 1"):
        numbers(labels, ["zero", "one", "two", "three"])


def test_numbers_are_positions() -> None:
    assert in_json(3.0) == in_json(3) == RawLabel("number", 3)
    assert numbers([in_text("1"), in_text("0")], ["zero", "one"]) == [1, 0]
    assert numbers([RawLabel("number", 1), in_text("0")]) == [1, 0]
    assert numbers([in_text("00"), in_text("01")]) == [0, 1]
    assert numbers([in_text("0"), in_text("1")], ["0", "1"]) == [0, 1]  # both meanings agree
    assert numbers([in_text("3")], ["1", "2", "3"]) == [2]  # no class has this number, so it is a name


@pytest.mark.parametrize("label", [in_text("1"), RawLabel("number", 1)])
def test_a_label_with_two_meanings_is_refused(label: RawLabel) -> None:
    with pytest.raises(UsageError, match=r"label 1 has two meanings: line 1 .* class number 1 \('2'\)"):
        classes_of([label], ["1", "2", "3"])


def test_two_texts_of_one_number_are_refused() -> None:
    with pytest.raises(UsageError, match="labels '01' and '1' are the same number"):
        classes_of([in_text("01"), in_text("1"), in_text("0")], None)


@pytest.mark.parametrize(
    ("label", "words"), [(5, "4 of these numbers have no image (1, 2, 3, 4)"), (9_999_999, "9999998 of these numbers")]
)
def test_numbers_without_an_image_are_refused(label: int, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        classes_of([RawLabel("number", 0), RawLabel("number", label)], None)
    assert words in str(refused.value) and f"`seq 0 {label} > FILE`" in str(refused.value)
    assert numbers([RawLabel("number", 5)], [str(i) for i in range(6)]) == [5]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"label": 3.5}', "expected a text or a whole number in 'label' of KEY.json, found 3.5"),
        (b'{"label": true}', "found True"),
        (b'{"label": ""}', "found ''"),
        (b'{"label": [1]}', "found [1]"),
        (b'{"label": NaN}', "found nan"),
        (b"{label: 1}", "not valid JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b'{"label": -1}', "label -1 is out of range"),
        (b'{"label": 10000001}', "label 10000001 is out of range"),
    ],
)
def test_reasons_say_what_a_label_is(content: bytes, words: str) -> None:
    with pytest.raises(LabelError) as found:
        label_of_json(content, "label")
    assert words in str(found.value)
    assert label_of_json(b'{"other": 1}', "label") is None
    with pytest.raises(LabelError, match=r"KEY\.cls is empty"):
        label_of_text(b" \n")


def test_byte_order_marks_and_white_space_are_stripped(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    names = ["tench", "goldfish", "crane"]
    (tmp_path / "names").write_bytes("\ufefftench\r\n goldfish\t\ncrane\n".encode())
    labels = ["\ufefftench\r\n".encode(), b" goldfish ", '\ufeff{"label": " crane\\n"}'.encode()]
    members = [(f"{i}.png", image("PNG", i)) for i in range(3)]
    members += [(f"{i}.{'json' if i == 2 else 'cls'}", label) for i, label in enumerate(labels)]
    write(tmp_path / "a.tar", members)
    found = svgpipe("index", tmp_path / "a.tar", "--out", tmp_path / "out", "--class-names", tmp_path / "names")
    assert found.code == 0, found.err
    shards = ShardSet.open(tmp_path / "out")
    assert shards.manifest.class_names == names and shards.rows.label.tolist() == [0, 1, 2]


def test_tars_with_captions_alone_are_one_class(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """As img2dataset writes them."""
    caption = json.dumps({"caption": "a cat", "url": "https://example.org/a.jpg", "key": "0", "status": "success"})
    members = [
        (f"00000000{i}.{extension}", content)
        for i in range(3)
        for extension, content in (("jpg", image("JPEG", i)), ("txt", b"a cat"), ("json", caption.encode()))
    ]
    write(tmp_path / "00000.tar", members)
    refused = svgpipe("index", tmp_path / "00000.tar", "--out", tmp_path / "labelled")
    assert refused.code == 1
    found = svgpipe("index", tmp_path / "00000.tar", "--out", tmp_path / "out", "--unlabelled")
    assert "3 images of 1 classes in 1 tars; 3 inputs = 3 usable + 0 rejected" in found.out
    assert ShardSet.open(tmp_path / "out").manifest.class_names == ["all"]
    both = svgpipe("index", tmp_path / "00000.tar", "--out", tmp_path / "x", "--unlabelled", "--label-field", "a")
    assert both.code == 2


def test_the_label_field_that_is_asked_for_wins(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    members = []
    for i, name in enumerate(["cat", "dog", None]):
        content = json.dumps({} if name is None else {"kind": name})
        members += [(f"{i}.png", image("PNG", i)), (f"{i}.cls", b"7"), (f"{i}.json", content.encode())]
    write(tmp_path / "a.tar", members)
    found = svgpipe("index", tmp_path / "a.tar", "--out", tmp_path / "out", "--label-field", "kind")
    assert found.code == 0, found.err
    shards = ShardSet.open(tmp_path / "out")
    assert shards.manifest.class_names == ["cat", "dog"] and shards.rows.label.tolist() == [0, 1, -1]
    assert "expected the field 'kind' in KEY.json" in (tmp_path / "out" / "rejected.jsonl").read_text()


def test_classes_without_images_are_named(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    for name, labels in (("train", (0, 5)), ("heldout", (3,))):
        members = [(f"{i}.png", image("PNG", i)) for i in labels]
        write(tmp_path / f"{name}.tar", [*members, *((f"{i}.cls", str(i).encode()) for i in labels)])
    command = ("index", tmp_path / "train.tar", "--heldout", tmp_path / "heldout.tar", "--out", tmp_path / "out")
    refused = svgpipe(*command)
    assert refused.code == 2 and "3 of these numbers have no image (1, 2, 4)" in refused.err
    (tmp_path / "names").write_text("\n".join("abcdef"))
    found = svgpipe(*command, "--class-names", tmp_path / "names")
    assert found.code == 0, found.err
    warning = "4 of 6 classes have no training images: 1 (b), 2 (c), 3 (d), 4 (e)"
    assert warning in found.err
    assert "4 of 6: 1 (b), 2 (c), 3 (d), 4 (e)" in svgpipe("inspect", tmp_path / "out").out
    assert empty_classes(["a", "b"], [1, 1]) is None


def test_numbers_in_the_order_of_texts_get_a_warning(tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    names = sorted(str(i) for i in range(12))
    warning = order_warning(names)
    assert warning is not None and "class 2 is '10', not 2" in warning
    assert order_warning(["0", "1", "2"]) is None and order_warning(["10", "9", "a"]) is None
    for name in ("9", "10"):
        (tmp_path / "source" / name).mkdir(parents=True)
        (tmp_path / "source" / name / "x.png").write_bytes(image("PNG", int(name)))
    found = svgpipe("shard", tmp_path / "source", "--out", tmp_path / "shards", "--workers", 1)
    assert found.code == 0 and "class 0 is '10', not 9" in found.err
