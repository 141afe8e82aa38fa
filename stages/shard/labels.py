"""Labels of existing tars: from text or JSON to class indexes.

A text never silently becomes a number: `1` in a file of class names is a name, and `01` is not `1`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from svgpipe.manifests.errors import UsageError

from ..images.tar_names import printable

# A larger class number is taken for a mistake.
MAX_LABEL = 10_000_000
NAMED = 5
UNLABELLED = "all"  # the class of images whose labels are ignored
NO_LABEL = "no label: expected KEY.cls or KEY.json with one"


@dataclass(frozen=True)
class RawLabel:
    """A label as found.

    `number` is a number in JSON, `name` a text in JSON, and `text` the content of a .cls file, which may be either.
    """

    kind: Literal["number", "name", "text"]
    value: int | str

    @property
    def number(self) -> int | None:
        """The class number that the label may mean; None if it can only be a name."""
        if isinstance(self.value, int):
            return self.value
        is_number = self.kind == "text" and re.fullmatch(r"-?[0-9]{1,18}", self.value) is not None
        return int(self.value) if is_number else None


class LabelError(ValueError):
    """A label that cannot be used. The message is the reason in the records."""


def label_of_text(content: bytes) -> RawLabel:
    """Return the label in the content of a .cls file.

    Raises:
        LabelError: it is empty or not UTF-8.
    """
    if not (text := _decoded(content)):
        raise LabelError("no label: KEY.cls is empty")
    return _in_range(RawLabel("text", text))


def label_of_json(content: bytes, field: str) -> RawLabel | None:
    """Return the label in a field of a JSON file; None if there is no such field.

    Args:
        content: of the file.
        field: name of the field; `a.b` is nested.

    Raises:
        LabelError: the file is not JSON, or the field holds neither a text nor a whole number.
    """
    try:
        value: Any = json.loads(_decoded(content))
    except (ValueError, RecursionError) as error:
        raise LabelError(f"no label: KEY.json is not valid JSON: {str(error)[:80]}") from error
    for part in field.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and value.strip():
        return RawLabel("name", value.strip())
    if isinstance(value, int) and not isinstance(value, bool):
        return _in_range(RawLabel("number", value))
    raise LabelError(f"no label: expected a text or a whole number in {field!r} of KEY.json, found {repr(value)[:40]}")


def _decoded(content: bytes) -> str:
    try:
        return content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise LabelError("no label: its file is not UTF-8") from error


def _in_range(label: RawLabel) -> RawLabel:
    number = label.number
    if number is not None and not 0 <= number <= MAX_LABEL:
        raise LabelError(f"label {number} is out of range: expected 0 to {MAX_LABEL}")
    return label


@dataclass(frozen=True)
class Classes:
    """Class names in label order, and the class index of every label that means one."""

    names: Sequence[str]
    indexes: Mapping[RawLabel, int]

    def index(self, label: RawLabel) -> int:
        """Return the class index of a label.

        Raises:
            LabelError: it is not a class.
        """
        if (found := self.indexes.get(label)) is None:
            raise LabelError(f"unknown label: {label.value}, expected one of {len(self.names)} classes")
        return found


def classes_of(labels: Iterable[RawLabel], names: Sequence[str] | None) -> Classes:
    """Resolve labels to class indexes.

    Args:
        labels: of all usable images.
        names: class names in label order; None: the labels are numbers, or their sorted names are the classes.

    Returns:
        The classes.

    Raises:
        UsageError: a label means two classes; labels are numbers and names; two texts of one number; or numbers without
            an image between them.
    """
    found = set(labels)
    return _inferred(found) if names is None else _named(found, names)


def _named(found: set[RawLabel], names: Sequence[str]) -> Classes:
    lines = {name: index for index, name in enumerate(names)}
    indexes: dict[RawLabel, int] = {}
    for label in found:
        number = label.number
        as_name = lines.get(str(label.value))
        as_number = number if number is not None and number < len(names) else None
        if as_name is not None and as_number is not None and as_name != as_number:
            raise UsageError(
                f"label {label.value} has two meanings: line {as_name + 1} of the class names (class {as_name}) and "
                f"class number {as_number} ({names[as_number]!r}). Number labels from 0, or use names that are not "
                "numbers."
            )
        index = as_number if as_name is None else as_name
        if index is not None:
            indexes[label] = index
    return Classes(names, indexes)


def _inferred(found: set[RawLabel]) -> Classes:
    numbers = {label: number for label in found if (number := label.number) is not None}
    texts = sorted({str(label.value) for label in found - numbers.keys()})
    if texts and numbers:
        raise UsageError(
            f"some labels are numbers, others are names (as {min(numbers.values())} and {texts[0]!r}): the names of "
            "the numbers are unknown. Give --class-names FILE, one name per line in the order of the numbers."
        )
    if texts:
        require_distinct(texts)
        lines = {name: index for index, name in enumerate(texts)}
        return Classes(texts, {label: lines[str(label.value)] for label in found})
    _require_one_text_each(numbers)
    _require_no_gaps(set(numbers.values()))
    return Classes([str(number) for number in range(len(set(numbers.values())))], numbers)


def require_distinct(names: Sequence[str]) -> None:
    """Check that no two classes look alike: names that are not UTF-8, or differ in the form of accents.

    Raises:
        UsageError: two of them do.
    """
    seen: set[str] = set()
    for name in names:
        if (shown := unicodedata.normalize("NFC", printable(name))) in seen:
            raise UsageError(f"expected distinct class names, found two that look alike: {shown!r}.")
        seen.add(shown)


def _require_one_text_each(numbers: Mapping[RawLabel, int]) -> None:
    texts: dict[int, str] = {}
    for label, number in sorted(numbers.items(), key=lambda item: str(item[0].value)):
        if (other := texts.setdefault(number, str(label.value))) != str(label.value):
            raise UsageError(
                f"labels {other!r} and {label.value!r} are the same number. Write them alike, or give "
                "--class-names FILE, one name per line."
            )


def _require_no_gaps(numbers: set[int]) -> None:
    if not numbers or len(numbers) == max(numbers) + 1:
        return
    missing = (number for number in range(max(numbers)) if number not in numbers)
    some = ", ".join(str(number) for number, _ in zip(missing, range(NAMED), strict=False))
    count = max(numbers) + 1 - len(numbers)
    raise UsageError(
        f"labels are numbers up to {max(numbers)}, but {count} of these numbers have no image ({some}"
        f"{', …' if count > NAMED else ''}). Number labels from 0 without gaps. If the gaps are intended, give "
        f"--class-names FILE, one line per number (`seq 0 {max(numbers)} > FILE` keeps the numbers)."
    )


def order_warning(names: Sequence[str]) -> str | None:
    """Return a warning if all class names are numbers that are not in numeric order; None otherwise."""
    if not all(re.fullmatch(r"[0-9]{1,18}", name) for name in names):
        return None
    numbers = [int(name) for name in names]
    if numbers == sorted(numbers):
        return None
    first = next(index for index, number in enumerate(sorted(numbers)) if number != numbers[index])
    return (
        f"warning: class names are numbers in the order of texts: class {first} is {names[first]!r}, not "
        f"{sorted(numbers)[first]}. Pad them with zeros if labels must equal names."
    )


def empty_classes(names: Sequence[str], counts: Sequence[int]) -> str | None:
    """Return a warning that lists the classes without training images; None if every class has one."""
    empty = [f"{index} ({name})" for index, (name, count) in enumerate(zip(names, counts, strict=True)) if not count]
    if not empty:
        return None
    more = f" and {len(empty) - NAMED} more" if len(empty) > NAMED else ""
    return (
        f"warning: {len(empty)} of {len(names)} classes have no training images: {', '.join(empty[:NAMED])}{more}. "
        "They are not sampled with equal labels."
    )
