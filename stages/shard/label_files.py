"""Label files of held-out images: a table of names, labels in order, Kaggle's table, or ILSVRC's development kit."""

from __future__ import annotations

import csv
import io
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath

import scipy.io

from svgpipe.manifests.errors import UsageError, first_line

from .entries import Entry

GROUND_TRUTH, META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"


def labelled(entries: Sequence[Entry], file: Path, class_names: Sequence[str]) -> list[Entry]:
    """Return the entries with the classes of a label file.

    Lines are `NAME LABEL`, with a tab, a comma (CSV) or a space between, or those of Kaggle's LOC_val_solution.csv, or
    one label per image in the order of the names. NAME is a path in the source, a file name, or a file name without
    extension. A label is a class name, or a class number from 0. ILSVRC's development kit (.tar.gz) is a label file.

    Raises:
        UsageError: the file is missing, not of this form, or names several images or labels at once.
    """
    try:
        text = _devkit(file) if tarfile.is_tarfile(file) else file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, tarfile.TarError, EOFError) as error:
        raise UsageError(f"{file}: expected a text file of labels: {error}") from error
    lines = [line.strip() for line in re.split(r"\r\n|\n|\r", text) if line.strip()]
    images = sorted((entry for entry in entries if entry.is_image), key=lambda entry: entry.name)
    if lines and lines[0].startswith("ImageId,"):
        lines = lines[1:]
    names = _names_of(images)
    classes: dict[str, str] = {}
    one_each = all(len(re.split(r"[,\s]", line)) == 1 for line in lines) or all(line in class_names for line in lines)
    if one_each:
        if len(lines) != len(images):
            raise UsageError(f"{file}: expected a label for each of {len(images)} images, found {len(lines)} lines.")
        classes = {entry.name: _required(line, class_names, file) for entry, line in zip(images, lines, strict=True)}
    else:
        for name, text in _pairs(lines, names, class_names, file):
            found = names[name]
            if len(found) > 1:
                raise UsageError(f"{file}: {name} means {len(found)} images, as {found[0]} and {found[1]}. Give paths.")
            for image in found:
                label = _required(text, class_names, file)
                if classes.setdefault(image, label) != label:
                    raise UsageError(f"{file}: {name} has two labels: {classes[image]} and {label}.")
    return [replace(entry, class_name=classes.get(entry.name)) for entry in entries]


def _pairs(
    lines: Sequence[str], names: Mapping[str, object], class_names: Sequence[str], file: Path
) -> list[tuple[str, str]]:
    """Return the name and the label of every line that names an image.

    Raises:
        UsageError: no line names an image, or one names several.
    """
    pairs = [pair for line in lines if (pair := _pair(line, names, class_names, file)) is not None]
    if not pairs:
        raise UsageError(f"{file}: expected lines that name images, found none, as in {lines[:1]}.")
    return pairs


def _pair(line: str, names: Mapping[str, object], class_names: Sequence[str], file: Path) -> tuple[str, str] | None:
    """Return name and label of a line, by the separator before which an image is named; None if there is none.

    Raises:
        UsageError: names with spaces that mean several images.
    """
    for delimiter in ("\t", ","):
        name, *rest = next(csv.reader([line], delimiter=delimiter))
        if rest and name.strip() in names:
            return name.strip(), delimiter.join(rest).strip()
    spaces = [match.start() for match in re.finditer(r"\s", line)]
    found = [(line[:at], line[at:].strip()) for at in spaces if line[:at] in names]
    if len(found) > 1:
        found = [(name, label) for name, label in found if _class_of(label, class_names) is not None] or found[:1]
    if len(found) > 1:
        raise UsageError(f"{file}: {line!r} may mean {found[0][0]!r} or {found[1][0]!r}. Put a tab before the label.")
    return found[0] if found else None


def _names_of(images: Sequence[Entry]) -> dict[str, list[str]]:
    """Return the images that a name may mean: by path, else by file name, else by file name without its extension."""
    names: dict[str, list[str]] = {}
    for form in (str, lambda name: PurePosixPath(name).name, lambda name: PurePosixPath(name).stem):
        found: dict[str, list[str]] = {}
        for entry in images:
            found.setdefault(form(entry.name), []).append(entry.name)
        names = found | names  # the exact form wins
    return names


def _class_of(label: str, class_names: Sequence[str]) -> str | None:
    """Return the class of a label: all of it, or its first word as in Kaggle's file; None if there is none."""
    for text in (label, *label.split()[:1]):
        if text in class_names:
            return text
        if re.fullmatch(r"[0-9]{1,9}", text) and int(text) < len(class_names):
            return class_names[int(text)]
    return None


def _required(label: str, class_names: Sequence[str], file: Path) -> str:
    if (found := _class_of(label, class_names)) is None:
        raise UsageError(
            f"{file}: expected a class name, or a number from 0 to {len(class_names) - 1}, found {label!r}. (The "
            "numbers of ILSVRC's devkit begin at 1 and have another order; give its .tar.gz, or Kaggle's "
            "LOC_val_solution.csv.)"
        )
    return found


def _devkit(path: Path) -> str:
    """Return the synset of every validation image, one per line, from ILSVRC2012_devkit_t12.tar.gz.

    The ground truth holds numbers from 1, which meta.mat translates to synsets.

    Raises:
        UsageError: the archive holds something else.
    """
    with tarfile.open(path) as archive:
        members = {PurePosixPath(member.name).name: member for member in archive if member.isfile()}
        try:
            truth, meta = (archive.extractfile(members[name]) for name in (GROUND_TRUTH, META))
            assert truth is not None and meta is not None
            numbers = [int(line) for line in truth.read().split()]
            synsets = scipy.io.loadmat(io.BytesIO(meta.read()), squeeze_me=True)["synsets"]
            names = {int(s["ILSVRC2012_ID"]): str(s["WNID"]) for s in synsets}
            return "\n".join(names[number] for number in numbers)
        except (KeyError, ValueError, IndexError, TypeError) as error:
            raise UsageError(
                f"{path}: expected ILSVRC's development kit with {GROUND_TRUTH} and {META} ({first_line(error)})."
            ) from error
