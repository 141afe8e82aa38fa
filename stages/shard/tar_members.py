"""Scans one existing tar: a row per image, and a reject with its reason per member that cannot be used.

Members of one sample share a key: the name up to the first dot of its last part, as in webdataset. They may come in any
order. Every member that looks like media or carries a label is counted: inputs = usable + rejected.
"""

from __future__ import annotations

import hashlib
import mimetypes
import tarfile
import unicodedata
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from svgpipe.manifests.filesystem import Location, read_range

from ..images.decode import EXTENSIONS, RejectedImageError, check_header, decode_or_keep
from ..images.tar_names import DEPTH_EXTENSION, SEGMENTATION_EXTENSION, printable, split_name
from .labels import NO_LABEL, UNLABELLED, LabelError, RawLabel, label_of_json, label_of_text

SCAN_BYTES = 1 << 22
# Of several images of one sample, the first usable one in this order is taken: masks are PNG.
PREFERENCE = ("jpg", "jpeg", "webp", "png")
OTHER_MEDIA = {
    "heic",
    "heif",
    "avif",
    "jxl",
    "jp2",
    "j2k",
    "tif",
    "tiff",
    "bmp",
    "gif",
    "ppm",
    "pgm",
    "exr",
    "dng",
    "raw",
}
DEFAULT_FIELD = "label"


@dataclass(frozen=True)
class ScanOptions:
    """How labels are found, and how images are checked.

    Attributes:
        label_field: field of KEY.json, which is then the only label; None: KEY.cls, or `label` in KEY.json.
        decode: decode every image, not only its header.
        keep_damaged: keep damaged JPEGs that can be decoded in part. Implies `decode`.
        unlabelled: ignore labels: all images are one class.
    """

    label_field: str | None = None
    decode: bool = False
    keep_damaged: bool = False
    unlabelled: bool = False


@dataclass
class Member:
    """One row of the index: an image, or a member that is rejected."""

    key: str
    offset: int
    size: int
    path: str
    extension: str = ""
    sha256: str = ""
    reject: str | None = None
    damaged: bool = False
    label: RawLabel | None = None


@dataclass
class _Label:
    """Label members of one key, in tar order."""

    place: Member
    found: list[RawLabel | str] = field(default_factory=list)  # a text is the reason why there is none


def scan_tar(path: Location, size: int, options: ScanOptions) -> tuple[list[Member], str]:
    """Scan a tar.

    Args:
        path: the tar.
        size: its size in bytes.
        options: how labels are found.

    Returns:
        Its rows in tar order, and a note if something in it is damaged or missing.
    """
    scan, note = _Scan(options, size), ""
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    scan.add(tar, member)
                lost = left_unread(path, tar.offset, size)
                note = "" if tar.offset < size else "has no end marker; it may be cut off between two members"
        except (tarfile.TarError, EOFError, ValueError) as error:
            lost = (0, "empty file (0 bytes): not even a tar's end marker") if size == 0 else None
            note = "" if lost else f"truncated or damaged ({error})"
    rows = scan.rows()
    if note.startswith("truncated"):
        note += f"; {sum(row.reject is None for row in rows)} images before that are kept"
    if lost is not None:
        note = f"offset {lost[0]}: {lost[1]}; {sum(row.reject is None for row in rows)} images before it are kept"
        rows.append(Member(f"lost-{lost[0]}", lost[0], 0, "", reject=lost[1]))
    elif not note and not rows:
        note = "holds no image and no label"
    return rows, note and f"{path}: {note}"


def left_unread(path: Location, offset: int, size: int) -> tuple[int, str] | None:
    """Return where and why members may be lost, if the tar does not end properly: with zeros to the last byte.

    tarfile silently treats a damaged header, a cut between two members, and the first end of concatenated tars as the
    end.
    """
    if offset < size and read_range(path, offset, tarfile.BLOCKSIZE).strip(b"\0"):
        return offset, "no readable header, so everything after it in this tar is lost"
    for start in range(offset, size, SCAN_BYTES):
        block = read_range(path, start, min(SCAN_BYTES, size - start))
        if left := block.lstrip(b"\0"):
            at = start + len(block) - len(left)
            return at, "data after the tar's end marker is lost, as in concatenated tars"
    return None


class _Scan:
    """Members of one tar, by key."""

    def __init__(self, options: ScanOptions, tar_size: int) -> None:
        self.options, self.tar_size = options, tar_size
        self.images: list[Member] = []
        self.labels: dict[str, _Label] = {}

    def add(self, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
        """Look at one member."""
        if member.isdir():
            return
        key, extension = split_name(member.name)
        last = extension.rpartition(".")[2]
        row = Member(printable(key), member.offset_data, member.size, printable(member.name), last)
        whole = member.isfile() and not member.issparse() and member.offset_data + member.size <= self.tar_size
        if extension in ("cls", "json"):
            if self.options.unlabelled:
                return
            self._add_label(key, extension, row, _content(tar, member) if whole else None)
            return
        if not _is_media(last) or extension in (SEGMENTATION_EXTENSION, DEPTH_EXTENSION):
            return
        self.images.append(row)
        try:
            self._require_readable(member, extension)
            data = _content(tar, member)
            row.sha256 = hashlib.sha256(data).hexdigest()
            self._check(row, data)
        except RejectedImageError as error:
            row.reject = str(error)

    def _add_label(self, key: str, extension: str, row: Member, content: bytes | None) -> None:
        field_asked = self.options.label_field
        if extension == "cls" and field_asked is not None:
            return
        name = f"{key}.{extension}"
        try:
            if content is None:
                raise LabelError(f"no label: KEY.{extension} is truncated or not a plain file")
            label = (
                label_of_text(content) if extension == "cls" else label_of_json(content, field_asked or DEFAULT_FIELD)
            )
            if label is None:
                return
            found: RawLabel | str = label
        except LabelError as error:
            found = str(error)
        self.labels.setdefault(name, _Label(row)).found.append(found)

    def _require_readable(self, member: tarfile.TarInfo, extension: str) -> None:
        base = member.name.rpartition("/")[2]
        last = extension.rpartition(".")[2]
        missing = member.offset_data + member.size - self.tar_size
        problems = {
            f"unsafe name: {unsafe(member.name)}": unsafe(member.name) is not None,
            "hidden file: its name begins with a dot": base.startswith("."),
            "not a file: a link or a special file": not member.isfile(),
            "sparse member: its bytes are not stored in one piece": member.issparse(),
            f"truncated: its tar ends {missing} bytes early": missing > 0,
            f"{last} is not a format that svgpipe reads ({', '.join(PREFERENCE)})": last not in PREFERENCE,
            f"{extension!r} is not an image's extension (names are split at their first dot)": extension != last,
        }
        for reason, holds in problems.items():
            if holds:
                raise RejectedImageError(reason)

    def _check(self, row: Member, data: bytes) -> None:
        if self.options.decode or self.options.keep_damaged:
            _, row.damaged = decode_or_keep(data, keep_damaged=self.options.keep_damaged)
        else:
            check_header(data)

    def rows(self) -> list[Member]:
        """Return all rows in tar order, with one image per key and its label."""
        by_key: dict[str, list[Member]] = {}
        for row in self.images:
            by_key.setdefault(row.key, []).append(row)
        for rows in by_key.values():
            _reject_all_but_one([row for row in rows if row.reject is None])
        orphans = []
        for row in self.images:
            if row.reject is None:
                self._label(row)
        for label in self.labels.values():
            if label.place.key not in by_key and any(isinstance(found, RawLabel) for found in label.found):
                label.place.reject = "label without an image"
                orphans.append(label.place)
        return sorted([*self.images, *orphans], key=lambda row: row.offset)

    def _label(self, row: Member) -> None:
        """Set the label of a row, or the reason why it has none. KEY.cls wins over KEY.json."""
        if self.options.unlabelled:
            row.label = RawLabel("name", UNLABELLED)
            return
        held = [self.labels[name].found for name in (f"{row.key}.cls", f"{row.key}.json") if name in self.labels]
        found = next(iter(held), [NO_LABEL if self.options.label_field is None else self._no_field])
        if len(set(found)) > 1:
            row.reject = "two labels: its label is stored twice in this tar, with different content"
        elif isinstance(found[0], RawLabel):
            row.label = found[0]
        else:
            row.reject = found[0]

    @property
    def _no_field(self) -> str:
        return f"no label: expected the field {self.options.label_field!r} in KEY.json"


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    handle = tar.extractfile(member)
    return b"" if handle is None else handle.read()


def _is_media(extension: str) -> bool:
    kind = (mimetypes.guess_type(f"x.{extension}")[0] or "").partition("/")[0]
    return f".{extension}" in EXTENSIONS or extension in OTHER_MEDIA or kind in ("image", "video", "audio")


def _reject_all_but_one(usable: list[Member]) -> None:
    """Keep the preferred image of one key; reject the others with its name."""
    # Of two with one name, the later one, as when the tar is unpacked.
    chosen = min(reversed(usable), key=lambda row: PREFERENCE.index(row.extension), default=None)
    for row in usable:
        if row is not chosen and chosen is not None:
            row.reject = f"duplicate key: {chosen.path} is the image of this key"


def unsafe(name: str) -> str | None:
    """Return why a member's name is unsafe as a path or on a terminal; None if it is safe."""
    if name.startswith("/") or (len(name) > 1 and name[1] == ":"):
        return "an absolute path"
    if "\\" in name:
        return "it contains a backslash"
    if ".." in PurePosixPath(name).parts:
        return "it leads to a folder above"
    if any(not c.isprintable() and unicodedata.category(c) != "Zs" for c in name):  # some cameras write odd spaces
        return "it contains unprintable characters"
    return None
