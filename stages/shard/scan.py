"""Lists the images to shard: every file with its label and split."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from svgpipe.manifests.errors import UsageError

from ..images.decode import EXTENSIONS
from ..images.folder import visible_files, visible_folders
from .entries import SPLITS, Entry, Listing
from .sources import list_source

UNLABELLED = "all"


@dataclass(frozen=True)
class ImageSources:
    """Where images come from.

    Attributes:
        train: folder, tar, zip or tables.
        heldout: the same for images that are kept out of training; None: `shard.holdout` keeps a fraction.
        heldout_labels: labels of `heldout`, if its images lie in no class folders.
        unlabelled: all images are one class.
    """

    train: Path
    heldout: Path | None = None
    heldout_labels: Path | None = None
    unlabelled: bool = False

    def __iter__(self) -> Iterator[tuple[str, Path]]:
        yield "source", self.train
        if self.heldout is not None:
            yield "heldout", self.heldout


@dataclass(frozen=True)
class SourceFile:
    """One input file; `label` is None outside a class. `path` is unique in the set."""

    path: str
    label: int | None
    entry: Entry
    heldout: bool = False


def scan(sources: ImageSources) -> tuple[list[str], list[SourceFile]]:
    """Return class names and all files, both in order.

    Raises:
        UsageError: a source is missing or of another kind, there is no class, or a class has no image.
    """
    listing = list_source(sources.train, "train")
    if not listing.entries and not sources.train.is_dir():
        raise UsageError(f"{sources.train}: expected images, found none.")
    if sources.unlabelled:
        class_names = [UNLABELLED]
        files = [SourceFile(entry.name, 0, entry) for entry in listing.entries]
    else:
        class_names = _class_names(sources.train, listing)
        labels = {name: label for label, name in enumerate(class_names)}
        files = [SourceFile(entry.name, _label(entry, labels), entry) for entry in listing.entries]
        _require_images(sources.train, class_names, files)
    if sources.heldout is not None:
        files += _heldout(sources, class_names, listing)
    return class_names, sorted(files, key=lambda file: file.path)


def _label(entry: Entry, labels: Mapping[str, int]) -> int | None:
    return None if entry.class_name is None else labels.get(entry.class_name)


def _class_names(source: Path, listing: Listing) -> list[str]:
    if listing.class_names is not None:
        return listing.class_names
    names = {entry.class_name for entry in listing.entries if entry.class_name is not None}
    is_folder = source.is_dir() and all(not entry.place for entry in listing.entries)
    if is_folder:
        names |= set(visible_folders(source))  # also those without a file
        _require_no_splits(source, sorted(names))
    if not names:
        images = sum(_is_image(entry) for entry in listing.entries)
        raise UsageError(
            f"{source}: expected class folders (class/image.jpg), found none; {images} images lie in no class. To "
            "train without labels, add --unlabelled."
        )
    return sorted(names)


def _is_image(entry: Entry) -> bool:
    return bool(entry.block) or PurePosixPath(entry.name).suffix.lower() in EXTENSIONS


def _require_images(source: Path, class_names: Sequence[str], files: Sequence[SourceFile]) -> None:
    with_images = {file.label for file in files if _is_image(file.entry)}
    for label, name in enumerate(class_names):
        if label not in with_images and not any(file.entry.block for file in files[:1]):
            others = sum(file.label == label for file in files)
            raise UsageError(
                f"{source / name}: expected images of class {name!r} ({', '.join(EXTENSIONS)}), found "
                f"{f'{others} other files' if others else 'none'}. Remove the folder."
            )


def _require_no_splits(source: Path, class_names: Sequence[str]) -> None:
    """Check that the folders are not `train/` and `val/`, which hold the class folders: they would become classes.

    Raises:
        UsageError: they are.
    """
    if not class_names or not all(name.lower() in SPLITS for name in class_names):
        return
    holders = [name for name in class_names if visible_folders(source / name)]
    if holders and not any(True for name in holders for _ in visible_files(source / name, below=False)):
        raise UsageError(
            f"{source}: expected class folders, found splits ({', '.join(class_names)}) that hold folders. Give one of "
            f"them, as in {source / holders[0]}."
        )


def _heldout(sources: ImageSources, class_names: Sequence[str], train: Listing) -> list[SourceFile]:
    """Return the held-out files, with the classes of the training images.

    Raises:
        UsageError: none of them has one of these classes.
    """
    assert sources.heldout is not None
    entries = list_source(sources.heldout, "heldout").entries
    if sources.unlabelled:
        entries = [replace(entry, class_name=UNLABELLED) for entry in entries]
    elif sources.heldout_labels is not None:
        entries = _labelled(entries, sources.heldout_labels, class_names)
    _require_others(sources, entries, train)
    labels = {name: label for label, name in enumerate(class_names)}
    files = [SourceFile(f"heldout/{entry.name}", _label(entry, labels), entry, heldout=True) for entry in entries]
    if not any(file.label is not None for file in files):
        found = sorted({entry.class_name for entry in entries if entry.class_name is not None})
        hint = "" if found else " Give --heldout-labels FILE."
        raise UsageError(
            f"{sources.heldout}: expected images of the classes {', '.join(class_names[:3])} …, found "
            f"{', '.join(found[:3]) or 'images without a class'}.{hint}"
        )
    return files


def _require_others(sources: ImageSources, entries: Sequence[Entry], train: Listing) -> None:
    """Check that the held-out images are not the training images.

    Raises:
        UsageError: they are in the same place.
    """
    trained = {(entry.origin, entry.name) for entry in train.entries}
    if any((entry.origin, entry.name) in trained for entry in entries):
        raise UsageError(
            f"{sources.heldout}: expected images that are kept out of training, found images of {sources.train}. To "
            "hold out a part of them, give --holdout FRACTION."
        )


def _labelled(entries: Sequence[Entry], file: Path, class_names: Sequence[str]) -> list[Entry]:
    """Return the entries with the classes of a label file.

    Lines are `NAME LABEL`, or those of Kaggle's LOC_val_solution.csv, or one label per image in the order of the names.
    A label is a class name, or a class number from 0.

    Raises:
        UsageError: the file is missing or not of this form.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{file}: expected a text file of labels: {error}") from error
    images = sorted((entry for entry in entries if _is_image(entry)), key=lambda entry: entry.name)
    rows = [row for row in csv.reader(text.replace(",", " ").splitlines(), delimiter=" ", skipinitialspace=True) if row]
    if rows and rows[0][0] == "ImageId":
        rows = rows[1:]
    if rows and all(len(row) == 1 for row in rows):
        if len(rows) != len(images):
            raise UsageError(f"{file}: expected a label for each of {len(images)} images, found {len(rows)} lines.")
        by_stem = {PurePosixPath(entry.name).stem: row[0] for entry, row in zip(images, rows, strict=True)}
    else:
        by_stem = {PurePosixPath(row[0]).stem: row[1] for row in rows if len(row) > 1}
    classes = {label: _class_of(label, class_names, file) for label in set(by_stem.values())}
    found = (by_stem.get(PurePosixPath(entry.name).stem) for entry in images)
    return [
        replace(entry, class_name=None if label is None else classes[label])
        for entry, label in zip(images, found, strict=True)
    ]


def _class_of(label: str, class_names: Sequence[str], file: Path) -> str:
    if label in class_names:
        return label
    if label.isdigit() and int(label) < len(class_names):
        return class_names[int(label)]
    raise UsageError(
        f"{file}: expected a class name, or a number from 0 to {len(class_names) - 1}, found {label!r}. (The numbers "
        "of ILSVRC's devkit begin at 1 and have another order; use Kaggle's LOC_val_solution.csv.)"
    )
