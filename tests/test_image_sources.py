"""`svgpipe shard` from the forms in which images are published: the same images give the same features."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import scipy.io

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.shards import ShardSet
from svgpipe.pipeline.cli import main
from svgpipe.stages.shard.entries import Entry
from svgpipe.stages.shard.label_files import GROUND_TRUTH, META
from svgpipe.stages.shard.sources import list_source, read_entry

from .conftest import Finished, Outcome, write_crops

Files = dict[str, bytes]  # CLASS/NAME → content
CLASSES = ["astronaut", "cat", "coffee"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = write_crops(tmp_path_factory.mktemp("crops") / "images", per_class=4)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def as_class_tars(files: Files, path: Path) -> Path:
    """ILSVRC2012_img_train.tar: one tar per class inside, images without folders."""
    with tarfile.open(path, "w") as outer:
        for name in CLASSES:
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for file, content in files.items():
                    if file.startswith(f"{name}/"):
                        add(tar, file.partition("/")[2], content)
            add(outer, f"{name}.tar", inner.getvalue())
    return path


def as_tar(files: Files, path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for file, content in {**files, "photos.txt": b"a list", ".DS_Store": b"x"}.items():
            add(tar, f"photos/{file}", content)
    return path


def as_kaggle_zip(files: Files, path: Path) -> Path:
    """The zip of ImageNet at Kaggle: train in class folders, val and test flat."""
    with zipfile.ZipFile(path, "w") as archive:
        for file, content in files.items():
            archive.writestr(f"ILSVRC/Data/CLS-LOC/train/{file}", content)
        for i, content in enumerate(list(files.values())[:2]):
            archive.writestr(f"ILSVRC/Data/CLS-LOC/val/val_{i}.JPEG", content)
            archive.writestr(f"ILSVRC/Data/CLS-LOC/test/test_{i}.JPEG", content)
        archive.writestr("LOC_val_solution.csv", "ImageId,PredictionString")
    return path


def as_table(files: Files, names: list[str] | None = CLASSES) -> pa.Table:
    """As `datasets` writes it: a struct of bytes and path, and a label whose names lie in the schema's metadata."""
    labels = [CLASSES.index(file.partition("/")[0]) for file in files]
    images = [{"bytes": content, "path": file.partition("/")[2]} for file, content in files.items()]
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
    table = pa.table(
        {"image": pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())])), "label": labels}
    )
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def as_parquet(files: Files, path: Path) -> Path:
    """imagenet-1k as it is published: SPLIT-00000-of-0000N.parquet in data/."""
    (path / "data").mkdir(parents=True)
    table = as_table(files)
    for i in range(2):
        part = table.slice(i * 6, 6)
        parquet.write_table(part, path / "data" / f"train-{i:05d}-of-00002.parquet", row_group_size=4)
    parquet.write_table(table.slice(0, 3), path / "data" / "validation-00000-of-00001.parquet")
    parquet.write_table(table.slice(0, 1), path / "data" / "test-00000-of-00001.parquet")
    return path


def as_arrow(files: Files, path: Path) -> Path:
    """`save_to_disk`: arrow streams beside JSON files."""
    path.mkdir()
    table = as_table(files)
    with pa.OSFile(str(path / "data-00000-of-00001.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as out:
        out.write_table(table, max_chunksize=5)
    (path / "state.json").write_text("{}")
    return path


FORMS: dict[str, Callable[[Files, Path], Path]] = {
    "train.tar": as_class_tars,
    "photos.tar": as_tar,
    "imagenet.zip": as_kaggle_zip,
    "parquet": as_parquet,
    "arrow": as_arrow,
}


def stored(out: Path, split: str | None = None) -> dict[bytes, str]:
    """Return the class name of every stored image, by its content."""
    shards = ShardSet.open(out)
    rows = np.flatnonzero(shards.rows.heldout) if split == "heldout" else range(len(shards))
    return {ref.read(): shards.manifest.class_names[ref.label] for ref in shards.refs(rows)}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_images_and_labels(
    form: str, files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    source, out = FORMS[form](files, tmp_path / form), tmp_path / "out"
    found = svgpipe("shard", source, "--out", out, "--workers", 1, "--set", "shard.images_per_shard=5")
    assert found.code == 0, found.err
    assert stored(out) == {content: name.partition("/")[0] for name, content in files.items()}
    rejected = (out / "rejected.jsonl").read_text()
    assert rejected.count("\n") == (1 if form == "photos.tar" else 0)
    again = svgpipe("shard", source, "--out", out, "--workers", 1, "--set", "shard.images_per_shard=5")
    assert again.code == 0
    assert svgpipe("verify", out, "--deep").code == 0


@pytest.mark.parametrize("form", ["train.tar", "parquet"])
def test_archives_are_extracted_like_folders(
    form: str, finished: Finished, files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "folder"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    rows = []
    for number, source in enumerate((folder, FORMS[form](files, tmp_path / form))):
        shards, cache = tmp_path / f"shards{number}", tmp_path / f"cache{number}"
        assert svgpipe("shard", source, "--out", shards, "--workers", 2).code == 0
        options = ("--autoencoder", finished.root / "autoencoder", "--recipe", finished.recipe_file)
        found = svgpipe("extract", "--shards", shards, "--out", cache, *options)
        assert found.code == 0, found.err
        opened, held = FeatureCache(cache), ShardSet.open(shards)
        features = opened.denormalize(opened.read(range(len(opened))))
        rows.append({ref.read(): (features[i], ref.label) for i, ref in enumerate(held.refs(range(len(held))))})
    for content, (features, label) in rows[0].items():
        other, other_label = rows[1][content]
        np.testing.assert_allclose(other, features, atol=0.02)  # calibrated over other images of the set
        assert other_label == label


def test_official_held_out_images(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """From the same archive or folder, or another one; labels from Kaggle's file or from the class folders."""
    first = dict(list(files.items())[:2])
    expected = {content: name.partition("/")[0] for name, content in first.items()}
    archive = as_kaggle_zip(files, tmp_path / "imagenet.zip")
    (tmp_path / "LOC_val_solution.csv").write_text(
        "ImageId,PredictionString\nval_0,astronaut 85 1 499 272\nval_1,astronaut 0 0 9 9 cat 3 3 9 9\n"
    )
    (tmp_path / "val.txt").write_text("val_1.JPEG 0\nval_0.JPEG astronaut\n")
    (tmp_path / "ordered.txt").write_text("0\n0\n")
    for i, labels in enumerate(("LOC_val_solution.csv", "val.txt", "ordered.txt")):
        out = tmp_path / f"out{i}"
        official = ("--heldout", archive, "--heldout-labels", tmp_path / labels)
        found = svgpipe("shard", archive, "--out", out, "--workers", 1, *official)
        assert found.code == 0, found.err
        assert stored(out, "heldout") == expected and ShardSet.open(out).manifest.num_heldout == 2
        assert len(stored(out)) == 12
        assert sorted(path.name for path in out.glob("heldout/*.tar")) == ["shard-000001.tar"]
    tables = as_parquet(files, tmp_path / "parquet")
    found = svgpipe("shard", tables, "--heldout", tables, "--out", tmp_path / "tables", "--workers", 1)
    assert found.code == 0 and ShardSet.open(tmp_path / "tables").manifest.num_heldout == 3
    other = as_tar({**first, "dog/1.png": next(iter(files.values()))}, tmp_path / "val.tar")
    found = svgpipe("shard", tables, "--heldout", other, "--out", tmp_path / "tar", "--workers", 1)
    assert found.code == 0 and stored(tmp_path / "tar", "heldout") == expected
    assert "not a training class" in (tmp_path / "tar" / "rejected.jsonl").read_text()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--heldout", "flat.tar"], "images without a class. Give --heldout-labels FILE"),
        (["--heldout", "flat.tar", "--heldout-labels", "short.txt"], "a label for each of 12 images, found 1 lines"),
        (["--heldout", "flat.tar", "--heldout-labels", "devkit.txt"], "devkit begin at 1"),
        (["--heldout", "flat.tar", "--heldout-labels", "none.txt"], "none.txt: expected a text file of labels"),
        (["--heldout", "copy.tar", "--holdout", "0.2"], "expected either --holdout FRACTION"),
        (["--heldout", "none.tar"], "none.tar: expected a folder of class folders, a tar, a zip or tables"),
        (["--heldout", "short.txt"], "found another file"),
        (["--heldout", "a.tar.gz"], "is compressed, so its images cannot be read one by one"),
    ],
)
def test_held_out_images_that_cannot_be_used(
    files: Files,
    tmp_path: Path,
    svgpipe: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("photos.tar", "copy.tar"):
        as_tar(files, tmp_path / name)
    with tarfile.open("flat.tar", "w") as tar:
        for i, content in enumerate(files.values()):
            add(tar, f"{i:02d}.jpg", content)
    (tmp_path / "short.txt").write_text("0\n")
    (tmp_path / "devkit.txt").write_text("490\n" * 12)
    (tmp_path / "a.tar.gz").write_bytes(b"\x1f\x8b")
    found = svgpipe("shard", "photos.tar", "--out", "out", *more)
    assert found.code == 2 and words in found.err
    assert not (tmp_path / "out").exists()


def devkit(
    path: Path, numbers: list[int], synsets: dict[int, str], names: tuple[str, str] = (GROUND_TRUTH, META)
) -> None:
    """Write the parts of ILSVRC2012_devkit_t12.tar.gz that hold the labels of the validation images."""
    kinds = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(np.array(i), synset, "words", "gloss", np.array(0)) for i, synset in synsets.items()]
    rows.append((np.array(1001), "n00001740", "entity", "gloss", np.array(3)))  # not a class
    content = io.BytesIO()
    scipy.io.savemat(content, {"synsets": np.array(rows, kinds)[:, None]})
    with tarfile.open(path, "w:gz") as tar:
        add(tar, f"ILSVRC2012_devkit_t12/data/{names[0]}", "".join(f"{n}\n" for n in numbers).encode())
        add(tar, f"ILSVRC2012_devkit_t12/data/{names[1]}", content.getvalue())


def test_validation_images_with_the_development_kit(
    files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    synsets = dict(zip(("astronaut", "cat", "coffee"), ("n01440764", "n01443537", "n01484850"), strict=True))
    renamed = {f"{synsets[name.split('/')[0]]}/{name.split('/')[1]}": content for name, content in files.items()}
    as_tar(renamed, tmp_path / "train.tar")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for i, content in enumerate(files.values()):
            add(tar, f"ILSVRC2012_val_{i + 1:08d}.JPEG", content)
    numbers = {491: "n01440764", 1: "n01443537", 77: "n01484850"}  # another order than that of the names
    truth = [491, 1, 77, 77] * 3
    devkit(tmp_path / "devkit.tar.gz", truth, numbers)
    command = ["shard", tmp_path / "train.tar", "--heldout", tmp_path / "val.tar", "--heldout-labels"]
    found = svgpipe(*command, tmp_path / "devkit.tar.gz", "--out", tmp_path / "out")
    assert found.code == 0, found.err
    shards = ShardSet.open(tmp_path / "out")
    by_name = {ref.path.rpartition("/")[2]: ref.label for ref in shards.usable("heldout")}
    expected = [shards.manifest.class_names.index(numbers[number]) for number in truth]
    assert [by_name[name] for name in sorted(by_name)] == expected
    devkit(tmp_path / "other.tar.gz", truth, numbers, ("labels.txt", "meta.mat"))
    refused = svgpipe(*command, tmp_path / "other.tar.gz", "--out", tmp_path / "second")
    assert refused.code == 2 and "expected ILSVRC's development kit" in refused.err
    devkit(tmp_path / "unknown.tar.gz", [5, *truth[1:]], numbers)
    assert svgpipe(*command, tmp_path / "unknown.tar.gz", "--out", tmp_path / "third").code == 2


def test_images_without_labels_are_one_class(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, content in enumerate(files.values()):
        (flat / f"{i}.jpg").write_bytes(content)
    refused = svgpipe("shard", flat, "--out", tmp_path / "out")
    assert refused.code == 2 and "12 images lie in no class. To train without labels, add --unlabelled" in refused.err
    command = ("shard", flat, "--unlabelled", "--holdout", 0.25, "--workers", 1, "--out", tmp_path / "out")
    found = svgpipe(*command)
    assert found.code == 0 and "12 images of 1 classes" in found.out
    shards = ShardSet.open(tmp_path / "out")
    assert shards.manifest.class_names == ["all"] and shards.manifest.num_heldout == 3
    assert svgpipe(*command).code == 0
    nested = as_tar(files, tmp_path / "photos.tar")
    found = svgpipe("shard", nested, "--unlabelled", "--workers", 1, "--out", tmp_path / "nested")
    assert found.code == 0 and "12 images of 1 classes" in found.out


def test_rows_of_a_table_stay_together(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """A row group is read as a whole, so its images lie in one tar, or in two neighbours."""
    table = as_table(
        {f"{name}/{i}.jpg": content for i in range(8) for name, content in zip(CLASSES, files.values(), strict=False)}
    )
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=6)
    options = ("--workers", 1, "--set", "shard.images_per_shard=6")
    found = svgpipe("shard", tmp_path / "train.parquet", "--out", tmp_path / "out", *options)
    assert found.code == 0, found.err
    shards = ShardSet.open(tmp_path / "out")
    groups = [
        {ref.path.rpartition("-")[0] for ref in shards.refs(np.flatnonzero(shards.rows.shard == i))} for i in range(4)
    ]
    assert all(len(group) == 1 for group in groups) and len(set.union(*groups)) == 4


@pytest.mark.parametrize("form", ["train.tar", "imagenet.zip", "parquet"])
def test_a_replaced_image_in_an_archive_is_noticed(
    form: str, files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """Two images of one size and class are swapped, so that names, sizes and labels stay the same."""
    one, other = [name for name in files if name.startswith("cat/")][:2]
    size = max(len(files[one]), len(files[other]))
    before = {**files, **{name: files[name].ljust(size, b"\0") for name in (one, other)}}
    after = {**before, one: before[other], other: before[one]}
    place, fresh = tmp_path / form, tmp_path / "fresh"
    command = ("shard", FORMS[form](before, place), "--out", tmp_path / "out", "--workers", 1)
    assert svgpipe(*command).code == 0
    shutil.move(FORMS[form](after, tmp_path / f"new-{form}"), fresh)
    for path in [fresh, *fresh.rglob("*")]:
        os.utime(path, ns=(1, 1))
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    fresh.rename(place)
    refused = svgpipe(*command)
    assert refused.code == 1 and "2 of 12 source files were changed after they were sharded" in refused.err


def test_damaged_archives_are_one_message(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    archive = as_kaggle_zip(files, tmp_path / "imagenet.zip")
    content = archive.read_bytes()
    place = content.index(next(iter(files.values()))[:64])
    archive.write_bytes(content[: place + 20] + bytes(8) + content[place + 28 :])
    found = svgpipe("shard", archive, "--out", tmp_path / "out", "--workers", 1)
    assert found.code == 0 and "12 inputs = 11 usable + 1 rejected" in found.out
    assert "Bad CRC-32" in (tmp_path / "out" / "rejected.jsonl").read_text()
    for name in ("a.tar", "a.parquet", "a.arrow", "a.zip"):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 60)
        refused = svgpipe("shard", tmp_path / name, "--out", tmp_path / "none")
        assert refused.code == 2 and f"{name}: expected" in refused.err
    whole = as_tar(files, tmp_path / "cut.tar")
    with tarfile.open(whole) as tar:
        last = tar.getmembers()[-1].offset
    whole.write_bytes(whole.read_bytes()[:last])
    refused = svgpipe("shard", whole, "--out", tmp_path / "none")
    assert refused.code == 2 and "cut.tar: is truncated or damaged" in refused.err and "no end marker" in refused.err
    parquet.write_table(as_table(files).rename_columns(["image", "category"]), tmp_path / "labels.parquet")
    refused = svgpipe("shard", tmp_path / "labels.parquet", "--out", tmp_path / "none")
    assert refused.code == 2 and "expected a column of labels (label, labels," in refused.err
    parquet.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "text.parquet")
    refused = svgpipe("shard", tmp_path / "text.parquet", "--out", tmp_path / "none")
    assert refused.code == 2 and "expected one column of images" in refused.err and "text: string" in refused.err


def test_entries_are_read_in_any_order(files: Files, tmp_path: Path) -> None:
    for form, make in FORMS.items():
        entries: list[Entry] = [e for e in list_source(make(files, tmp_path / form), "train").entries if e.class_name]
        found = {read_entry(e.origin, e.name, e.place, e.size): e.class_name for e in reversed(entries)}
        assert found == {content: name.partition("/")[0] for name, content in files.items()}, form


def test_odd_members_of_archives_are_rejected_with_their_reason(
    files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    names = [name for name in files if name.startswith("cat/")]
    one, two = files[names[0]], files[names[1]]
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        add(tar, "./cat/1.jpg", one)
        add(tar, "./cat/2.jpg", one)
        add(tar, "./cat/2.jpg", two)  # replaces the first one when the tar is unpacked
        add(tar, "../cat/3.jpg", two)
        link = tarfile.TarInfo("./cat/4.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "1.jpg"
        tar.addfile(link)
    found = svgpipe("shard", tmp_path / "odd.tar", "--out", tmp_path / "odd", "--workers", 1)
    assert found.code == 0, found.err
    reasons = {}
    for line in (tmp_path / "odd" / "rejected.jsonl").read_text().splitlines():
        reject = json.loads(line)
        reasons[reject["path"].rpartition("/")[2]] = reject["reason"]
    assert reasons["4.jpg"] == "not a file: a link or a special file"
    assert reasons["3.jpg"].startswith("unsafe name")
    assert reasons["2.jpg#1"] == "duplicate name: a later file of the archive has it too"
    assert stored(tmp_path / "odd") == {one: "cat", two: "cat"}
    os.utime(tmp_path / "odd.tar", ns=(1, 1))
    again = svgpipe("shard", tmp_path / "odd.tar", "--out", tmp_path / "odd", "--workers", 1)
    assert again.code == 0, again.err  # touched, and unchanged

    whole = as_class_tars(files, tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    cut = svgpipe("shard", tmp_path / "cut.tar", "--out", tmp_path / "cut", "--workers", 1)
    assert cut.code == 2 and "cut.tar: " in cut.err and "damaged" in cut.err
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for i in range(3):
            add(tar, f"{i}.jpg", one)
    whole, end = buffer.getvalue(), (len(one) + 511) // 512 * 512 + 512
    for content in (b"not a tar" * 100, whole[:end], whole[: end + 100], whole * 2, bytes(10240), b""):
        with tarfile.open(tmp_path / "inner.tar", "w") as tar:
            add(tar, "cat.tar", content)
            add(tar, "dog/1.jpg", two)
        inner = svgpipe("shard", tmp_path / "inner.tar", "--out", tmp_path / "inner", "--workers", 1)
        assert inner.code == 2 and "its tar cat.tar is damaged or truncated" in inner.err, inner.err
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        for content in (one, two):
            archive.writestr("cat/1.jpg", content)
        archive.writestr("dog/1.jpg", one)
    found = svgpipe("shard", tmp_path / "two.zip", "--out", tmp_path / "two", "--workers", 1)
    assert found.code == 0 and stored(tmp_path / "two") == {two: "cat", one: "dog"}


def test_tables_of_other_label_orders_and_kinds(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """Each table has its own names; numbers without names keep their value; lists of labels are refused."""
    folder = tmp_path / "tables"
    folder.mkdir()
    first, second = dict(list(files.items())[:6]), dict(list(files.items())[6:])
    parquet.write_table(as_table(first), folder / "train-0.parquet")
    other = as_table(second)
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES[::-1], "_type": "ClassLabel"}}
    labels = pa.array([2 - label for label in other["label"].to_pylist()])
    other = other.set_column(1, "label", labels)
    other = other.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    parquet.write_table(other, folder / "train-1.parquet")
    found = svgpipe("shard", folder, "--out", tmp_path / "both", "--workers", 1)
    assert found.code == 0, found.err
    assert stored(tmp_path / "both") == {content: name.partition("/")[0] for name, content in files.items()}

    numbers = as_table(files).replace_schema_metadata(None)
    large = pa.array([2 + 8 * (label > 0) for label in numbers["label"].to_pylist()])
    parquet.write_table(numbers.set_column(1, "label", large), tmp_path / "numbers.parquet")
    found = svgpipe("shard", tmp_path / "numbers.parquet", "--out", tmp_path / "numbers", "--workers", 1)
    assert found.code == 0 and "9 of 11 classes have no training images: 0 (0), 1 (1), 3 (3)" in found.err
    shards = ShardSet.open(tmp_path / "numbers")
    assert set(shards.rows.label.tolist()) == {2, 10} and shards.manifest.class_names[10] == "10"
    lists = numbers.set_column(1, "label", pa.array([[0, 1]] * len(numbers)))
    parquet.write_table(lists, tmp_path / "lists.parquet")
    refused = svgpipe("shard", tmp_path / "lists.parquet", "--out", tmp_path / "lists")
    assert refused.code == 2 and "expected a number or a text as label, found [0, 1]" in refused.err
    parquet.write_table(as_table(files).slice(0, 0), tmp_path / "none.parquet")
    refused = svgpipe("shard", tmp_path / "none.parquet", "--out", tmp_path / "none")
    assert refused.code == 2 and "none.parquet: expected images, found none" in refused.err


def test_held_out_images_are_not_training_images(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    archive = as_tar(files, tmp_path / "photos.tar")
    same = svgpipe("shard", archive, "--heldout", archive, "--out", tmp_path / "same")
    assert same.code == 2 and "expected images that are kept out of training" in same.err
    copy = as_tar(dict(list(files.items())[:3]), tmp_path / "copy.tar")
    copied = svgpipe("shard", archive, "--heldout", copy, "--out", tmp_path / "copied", "--workers", 1)
    assert copied.code == 0 and "3 held-out images are also training images" in copied.err


def test_a_stray_table_in_an_image_folder_is_one_more_file(
    files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    folder = tmp_path / "folder"
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    parquet.write_table(as_table(files).slice(0, 2), folder / "train-0.parquet")
    found = svgpipe("shard", folder, "--out", tmp_path / "out", "--workers", 1)
    assert found.code == 0 and "13 inputs = 12 usable + 1 rejected" in found.out


def test_relabelled_tables_are_refused(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    """Their images are the same, and only the labels or the names of the classes changed."""
    table, place = as_table(files), tmp_path / "train.parquet"
    parquet.write_table(table, place)
    command = ("shard", place, "--out", tmp_path / "out", "--workers", 1)
    assert svgpipe(*command).code == 0
    labels = pa.array([(label + 1) % 3 for label in table["label"].to_pylist()])
    for other in (table.set_column(1, "label", labels), as_table(files, CLASSES[::-1])):
        parquet.write_table(other, place)
        refused = svgpipe(*command)
        assert refused.code == 1 and "inputs.source" in refused.err
    parquet.write_table(table, place)
    assert svgpipe(*command).code == 0


def test_labels_of_held_out_images_are_matched_by_path(
    files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    train = as_tar(files, tmp_path / "photos.tar")
    contents = list(files.values())
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for i, name in enumerate(("a/1.png", "b/1.png", "im.1.png", "im.png")):
            add(tar, name, contents[i])
        add(tar, "notes.txt", b"x")
    label_file = tmp_path / "labels.txt"

    def held(text: str) -> Outcome:
        label_file.write_text(text)
        number = len(list(tmp_path.glob("out*")))
        options = (
            "--heldout",
            tmp_path / "val.tar",
            "--heldout-labels",
            label_file,
            "--out",
            tmp_path / f"out{number}",
        )
        return svgpipe("shard", train, *options, "--workers", 1)

    found = held("a/1.png cat\nb/1.png coffee\nim.1 astronaut\n")
    assert found.code == 0, found.err
    assert stored(tmp_path / "out0", "heldout") == dict(zip(contents, ("cat", "coffee", "astronaut"), strict=False))
    rejected = (tmp_path / "out0" / "rejected.jsonl").read_text()
    assert "notes.txt" in rejected and "im.png" in rejected
    ambiguous = held("1.png cat\n")
    assert ambiguous.code == 2 and "1.png means 2 images, as a/1.png and b/1.png. Give paths" in ambiguous.err
    assert "expected lines that name images, found none" in held("img1 cat\n").err
    double = held("a/1.png cat\na/1.png coffee\n")
    assert double.code == 2 and "a/1.png has two labels: cat and coffee" in double.err


def test_class_names_of_several_words(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    contents = list(files.values())
    train = {"hot/1.jpg": contents[0], "hot dog/1.jpg": contents[1], "dog/1.jpg": contents[2]}
    as_tar(train, tmp_path / "train.tar")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for i in (3, 4):
            add(tar, f"{i}.png", contents[i])
    (tmp_path / "labels.txt").write_text("3.png hot dog\n4.png,dog\n")
    official = ("--heldout", tmp_path / "val.tar", "--heldout-labels", tmp_path / "labels.txt")
    found = svgpipe("shard", tmp_path / "train.tar", *official, "--out", tmp_path / "out", "--workers", 1)
    assert found.code == 0, found.err
    assert stored(tmp_path / "out", "heldout") == {contents[3]: "hot dog", contents[4]: "dog"}


def test_label_files_with_spaces_in_names(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    contents = list(files.values())
    train = {"1/1.jpg": contents[0], "cat/1.jpg": contents[1], "hot, dog/1.jpg": contents[2]}
    as_tar(train, tmp_path / "train.tar")
    with tarfile.open(tmp_path / "val.tar", "w") as tar:
        for number, name in enumerate(("IMG 1.png", "IMG.png", "b.png"), 3):
            add(tar, name, contents[number])
    expected = {contents[3]: "cat", contents[4]: "hot, dog", contents[5]: "1"}

    def held(name: str, lines: list[str]) -> Outcome:
        (tmp_path / "labels").write_text("\n".join(lines))
        official = ("--heldout", tmp_path / "val.tar", "--heldout-labels", tmp_path / "labels")
        return svgpipe("shard", tmp_path / "train.tar", *official, "--out", tmp_path / name, "--workers", 1)

    csv = ['"IMG 1.png","cat"', 'IMG.png,"hot, dog"', "b.png,1"]
    for name, lines in {
        "tabs": ["IMG 1.png\tcat", "IMG\thot, dog", "b\t1"],
        "csv": ["file,label", *csv],
        "spaces": ["IMG 1.png cat", "IMG.png hot, dog", "b.png 1"],
    }.items():
        found = held(name, lines)
        assert found.code == 0, found.err
        assert stored(tmp_path / name, "heldout") == expected
    refused = held("none", ["IMG 1 cat", "b 1"])
    assert refused.code == 2 and "may mean 'IMG' or 'IMG 1'. Put a tab" in refused.err


def test_caches_of_datasets_are_split_by_their_names(
    files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    written = as_arrow(files, tmp_path / "arrow") / "data-00000-of-00001.arrow"
    folder = tmp_path / "cached"
    folder.mkdir()
    for split in ("train", "test", "validation-00000-of-00001"):
        shutil.copy(written, folder / f"cifar10-{split}.arrow")
    found = svgpipe("shard", folder, "--out", tmp_path / "out", "--workers", 1)
    assert found.code == 0 and f"{len(files)} inputs" in found.out
    (folder / "cifar10-validation-00000-of-00001.arrow").unlink()
    refused = svgpipe("shard", folder, "--heldout", folder, "--out", tmp_path / "none")
    assert refused.code == 2 and "expected a validation split, found none" in refused.err


def test_unsafe_names_in_zips_are_rejected(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, (name, content) in enumerate(files.items()):
            archive.writestr(f"/{name}" if number == 0 else f"../{name}" if number == 1 else name, content)
    found = svgpipe("shard", tmp_path / "a.zip", "--out", tmp_path / "out", "--workers", 1)
    assert found.code == 0 and f"{len(files) - 2} usable + 2 rejected" in found.out
    assert set(ShardSet.open(tmp_path / "out").manifest.class_names) == {name.partition("/")[0] for name in files}
    refused = svgpipe("shard", "", "--out", tmp_path / "none")
    assert refused.code == 2 and "found an empty text" in refused.err


def test_odd_places_and_times(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names that pyarrow would read as addresses, names that are not UTF-8, and times beyond 64 bits."""
    with (tmp_path / "x:1.parquet").open("wb") as file:
        parquet.write_table(as_table(files), file)
    for name, content in files.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    os.utime(tmp_path / "photos" / next(iter(files)), (13_000_000_000, 13_000_000_000))
    monkeypatch.chdir(tmp_path)
    for source, out in (("photos", "run:1/out"), ("photos", os.fsdecode(b"o\xff")), ("x:1.parquet", "t")):
        assert main(["shard", source, "--out", out, "--workers", "1"]) == 0
        assert main(["shard", source, "--out", out, "--workers", "1"]) == 0  # finished, unchanged


def test_split_folders_are_not_classes_even_beside_other_files(
    files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    image = next(iter(files.values()))
    names = {"docs/logo.png": image, "logo.png": image}
    names |= {f"{split}/{name}": content for split in ("train", "val") for name, content in files.items()}
    as_tar(names, tmp_path / "splits.tar")
    found = svgpipe("shard", tmp_path / "splits.tar", "--out", tmp_path / "tar", "--workers", 1)
    assert found.code == 0 and "15 inputs = 12 usable + 3 rejected" in found.out
    assert ShardSet.open(tmp_path / "tar").manifest.class_names == CLASSES
    for place in ("splits", "above/imagenet"):
        for name, content in names.items():
            (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / place / name).write_bytes(content)
    for place in ("splits", "above"):
        refused = svgpipe("shard", tmp_path / place, "--out", tmp_path / "folder")
        assert refused.code == 2 and "found a split that holds folders. Give " in refused.err


def test_tables_are_found_by_their_split(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    table = as_table(files)
    for name in ("train.parquet", "validation.parquet"):
        (tmp_path / "a").mkdir(exist_ok=True)
        parquet.write_table(table.slice(0, 6) if "train" in name else table.slice(6), tmp_path / "a" / name)
    (tmp_path / "a" / "preview.png").write_bytes(next(iter(files.values())))
    found = svgpipe("shard", tmp_path / "a", "--out", tmp_path / "out", "--workers", 1)
    assert found.code == 0 and "6 inputs = 6 usable" in found.out
    arrow = as_arrow(files, tmp_path / "b")
    (arrow / "cache-1234.arrow").write_bytes((arrow / "data-00000-of-00001.arrow").read_bytes())
    found = svgpipe("shard", arrow, "--out", tmp_path / "arrow", "--workers", 1)
    assert found.code == 0 and "12 inputs = 12 usable" in found.out
    (tmp_path / "c").mkdir()
    parquet.write_table(table, tmp_path / "c" / "train-00000-of-00003.parquet")
    refused = svgpipe("shard", tmp_path / "c", "--out", tmp_path / "none")
    assert refused.code == 2 and "expected 3 tables, as train-00000-of-00003.parquet says, found 1" in refused.err
    texts = table.set_column(1, "label", pa.array(["01", "1", "02"] * 4)).replace_schema_metadata(None)
    parquet.write_table(texts, tmp_path / "texts.parquet")
    found = svgpipe("shard", tmp_path / "texts.parquet", "--out", tmp_path / "texts", "--workers", 1)
    assert found.code == 0 and ShardSet.open(tmp_path / "texts").manifest.class_names == ["01", "02", "1"]
    content = (arrow / "data-00000-of-00001.arrow").read_bytes()
    (tmp_path / "cut.arrow").write_bytes(content[: len(content) // 2])
    refused = svgpipe("shard", tmp_path / "cut.arrow", "--out", tmp_path / "none")
    assert refused.code == 2 and "cut.arrow: is truncated or damaged" in refused.err
    (tmp_path / "cut.arrow").write_bytes(content[:-8])
    refused = svgpipe("shard", tmp_path / "cut.arrow", "--out", tmp_path / "none")
    assert refused.code == 2 and "cut.arrow: is truncated: it has no end marker" in refused.err
    both = as_parquet(files, tmp_path / "both")
    parquet.write_table(table, both / "train.parquet")
    refused = svgpipe("shard", both, "--out", tmp_path / "none")
    assert refused.code == 2 and "found some in it and in its data/" in refused.err


def test_a_source_that_was_never_there_is_an_error(
    files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    archive = as_tar(files, tmp_path / "photos.tar")
    assert svgpipe("shard", archive, "--out", tmp_path / "out", "--workers", 1).code == 0
    wrong = svgpipe("shard", tmp_path / "typo.tar", "--out", tmp_path / "out")
    assert wrong.code == 2 and "typo.tar: expected a folder of class folders" in wrong.err
    archive.unlink()
    gone = svgpipe("shard", archive, "--out", tmp_path / "out")
    assert gone.code == 0 and "not there any more" in gone.err


def test_pipes_and_looping_links_are_rejected(files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]) -> None:
    (tmp_path / "T" / "cat").mkdir(parents=True)
    (tmp_path / "T" / "cat" / "1.jpg").write_bytes(next(iter(files.values())))
    os.mkfifo(tmp_path / "T" / "cat" / "pipe.jpg")
    (tmp_path / "T" / "cat" / "loop.jpg").symlink_to("loop.jpg")
    (tmp_path / "T" / "cat" / "gone.jpg").symlink_to("nowhere.jpg")
    found = svgpipe("shard", tmp_path / "T", "--out", tmp_path / "out", "--workers", 1)
    assert found.code == 0 and "4 inputs = 1 usable + 3 rejected" in found.out
    rejected = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "not a file: a pipe, socket or device" in rejected and "Too many levels of symbolic links" in rejected


def test_damaged_members_of_compressed_zips_are_rejected(
    files: Files, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    for kind in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        place = tmp_path / f"{kind}.zip"
        with zipfile.ZipFile(place, "w", kind) as archive:
            for name, content in files.items():
                archive.writestr(name, content + bytes(3000))
            start = archive.infolist()[0].header_offset + 30 + len(next(iter(files)))
        stored_bytes = bytearray(place.read_bytes())
        stored_bytes[start : start + 20] = b"\xff" * 20
        place.write_bytes(stored_bytes)
        found = svgpipe("shard", place, "--out", tmp_path / str(kind), "--workers", 1)
        assert found.code == 0 and "12 inputs = 11 usable + 1 rejected" in found.out, found.err
        assert "unreadable: " in (tmp_path / str(kind) / "rejected.jsonl").read_text()
