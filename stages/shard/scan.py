"""Lists the images to shard: every file with its label and split."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from svgpipe.manifests.errors import UsageError

from ..images.decode import EXTENSIONS
from ..images.folder import visible_files, visible_folders
from .entries import SPLITS, Entry, Listing
from .label_files import labelled
from .labels import UNLABELLED, require_distinct
from .sources import list_source
from .tables import LABELS, TABLES


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
    if not listing.entries and (listing.class_names is not None or not sources.train.is_dir()):
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
        images = [entry for entry in listing.entries if entry.is_image]
        if images and images[0].block:
            raise UsageError(
                f"{source}: expected a column of labels ({', '.join(LABELS)}), found none, or no label in it. To train "
                "without labels, add --unlabelled."
            )
        problem = f" ({images[0].name}: {images[0].problem})" if images and images[0].problem else ""
        raise UsageError(
            f"{source}: expected class folders (class/image.jpg), found none; {len(images)} images lie in no class"
            f"{problem}. To train without labels, add --unlabelled."
        )
    require_distinct(sorted(names))
    return sorted(names)


def _require_images(source: Path, class_names: Sequence[str], files: Sequence[SourceFile]) -> None:
    with_images = {file.label for file in files if file.entry.is_image}
    for label, name in enumerate(class_names):
        if label not in with_images and not any(file.entry.block for file in files[:1]):
            others = [file.path for file in files if file.label == label]
            tables = any(PurePosixPath(path).suffix in TABLES for path in others)
            advice = f"To read its tables, give {source / name}." if tables else "A source holds class folders only."
            raise UsageError(
                f"{source / name}: expected images of class {name!r} ({', '.join(EXTENSIONS)}), found "
                f"{f'{len(others)} other files' if others else 'none'}. {advice}"
            )


def _require_no_splits(source: Path, class_names: Sequence[str]) -> None:
    """Check that the folders are not `train/` and `val/`, which hold the class folders: they would become classes.

    Raises:
        UsageError: they are.
    """
    for name in class_names:
        # `train/` that holds folders; or `imagenet/train/`, one level too high.
        inner = [f"{name}/{folder}" for folder in visible_folders(source / name)]
        for split in [name, *inner]:
            if _is_split(source / split):
                raise UsageError(
                    f"{source}: expected class folders, found a split that holds folders. Give {source / split}."
                )


def _is_split(folder: Path) -> bool:
    if folder.name.lower() not in SPLITS or not visible_folders(folder):
        return False
    return not any(PurePosixPath(e.name).suffix.lower() in EXTENSIONS for e in visible_files(folder, below=False))


def _heldout(sources: ImageSources, class_names: Sequence[str], train: Listing) -> list[SourceFile]:
    """Return the held-out files, with the classes of the training images.

    Raises:
        UsageError: there are none, or none of them has one of these classes.
    """
    assert sources.heldout is not None
    entries = list_source(sources.heldout, "heldout").entries
    if not any(entry.is_image for entry in entries):
        raise UsageError(
            f"{sources.heldout}: expected a validation split, found none. (A test split is not used.) Give the file or "
            "folder of the held-out images."
        )
    if sources.unlabelled:
        entries = [replace(entry, class_name=UNLABELLED) for entry in entries]
    elif sources.heldout_labels is not None:
        entries = labelled(entries, sources.heldout_labels, class_names)
    _require_others(sources, entries, train)
    labels = {name: label for label, name in enumerate(class_names)}
    files = [SourceFile(f"--heldout/{entry.name}", _label(entry, labels), entry, heldout=True) for entry in entries]
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
    places = {origin: os.path.realpath(origin) for origin in {entry.origin for entry in (*train.entries, *entries)}}
    trained = {(places[entry.origin], entry.name) for entry in train.entries}
    if any((places[entry.origin], entry.name) in trained for entry in entries):
        raise UsageError(
            f"{sources.heldout}: expected images that are kept out of training, found images of {sources.train}. To "
            "hold out a part of them, give --holdout FRACTION."
        )
