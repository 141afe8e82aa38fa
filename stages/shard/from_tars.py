"""`svgpipe index`: index existing tars as a shard set. The tars are read once and not changed.

Every image member becomes a row. An unusable one keeps its row, with reason and offset: inputs = usable + rejected.
Members may come in any order. Members of one sample share a key: the name up to the first dot of its last part, as in
webdataset. Keys may repeat between tars, but not within one.
"""

from __future__ import annotations

import hashlib
import json
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import (
    Location,
    absolute,
    file_sha256,
    file_size,
    location,
    make_directory,
    read_range,
)
from svgpipe.manifests.index import ImageRef, write_index
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import InputRef, Json, digest
from svgpipe.manifests.shards import ShardFile, ShardSetManifest, Split
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..images.decode import EXTENSIONS, RejectedImageError, check_header, decode_image
from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import cpu_count
from .publish import printable, publish_shards

SCAN_BYTES = 1 << 22
# A larger class number is taken for a mistake.
MAX_LABEL = 10_000_000
IMAGE_EXTENSIONS = {suffix.removeprefix(".") for suffix in EXTENSIONS}
COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


@dataclass(frozen=True)
class IndexConfig:
    """How labels are found, and how images are checked."""

    label_field: str = "label"
    class_names: tuple[str, ...] | None = None
    decode: bool = False


def index_tars(
    train: Sequence[Location],
    heldout: Sequence[Location],
    out: Location,
    config: IndexConfig,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> ShardSetManifest:
    """Index the tars and publish the shard set at `out`; run again to resume.

    Args:
        train: tars of the training split.
        heldout: tars of the held-out split.
        out: directory to create or resume.
        config: how labels are found.
        processes: number of processes; None: one per core.
        progress: receives the progress.

    Returns:
        The manifest of the shard set.

    Raises:
        UsageError: a compressed tar, a file that is not a tar, or no tar.
        ArtifactError: a tar is missing, or there is no usable image.
        MismatchError: `out` was begun with other tars or another config.
    """
    splits: list[tuple[Location, Split]] = [*((tar, "train") for tar in train), *((tar, "heldout") for tar in heldout)]
    sizes = [_require_plain_tar(tar) for tar, _ in splits]
    splits = [(absolute(tar), split) for tar, split in splits]
    if len({str(tar) for tar, _ in splits}) != len(splits):
        raise UsageError("a tar is named twice, perhaps as training and as held-out images.")
    listing = [[str(tar), split, size] for (tar, split), size in zip(splits, sizes, strict=True)]
    origin = InputRef(kind="tars", fingerprint=digest(listing), path=str(splits[0][0]), config={"tars": len(splits)})
    recorded = {
        "label_field": config.label_field,
        "decode": config.decode,
        "class_names": None if config.class_names is None else list(config.class_names),
    }
    with WorkDir(StageSpec(out, ShardSetManifest, recorded, {"source": origin})) as work:
        if work.finished is not None:
            return work.finished
        journal = Journal(out)
        make_directory(out / "index")
        missing = journal.missing(range(len(splits)))
        progress = Recorded(progress, out)
        progress.begin("index", len(splits), "tars", len(splits) - len(missing))
        jobs = [_Scan(str(splits[i][0]), i, str(absolute(out)), config) for i in missing]
        for note in map_in_processes(_Scan.__call__, jobs, processes or cpu_count()):
            if note:
                progress.say(note)
            progress.advance()
        entries = [journal.read(i) for i in range(len(splits))]
        return _publish(work, splits, config, entries)


def _require_plain_tar(tar: Location) -> int:
    if tar.is_dir():
        raise UsageError(f"{tar}: expected a tar, found a folder. Give its tars, as in '{tar}/{{0000..0099}}.tar'.")
    size = file_size(tar)
    if size is None and "*" in str(tar):
        raise UsageError(f"{tar}: '*' is not expanded here; use braces, as in 'train-{{0000..0099}}.tar'.")
    if size is None:
        raise ArtifactError(f"{tar}: expected a tar, found no such file.")
    head = read_range(tar, 0, 512)
    for magic, kind in COMPRESSED.items():
        if head.startswith(magic):
            raise UsageError(
                f"{tar}: is compressed with {kind}. Its images cannot be read one by one; decompress it first "
                "(images hardly compress)."
            )
    if len(head) < 512 or (head[257:262] != b"ustar" and not _is_header(head)):
        raise UsageError(f"{tar}: expected a tar, found {size} bytes of something else.")
    return size


def _is_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _left_unread(path: Location, offset: int, size: int) -> tuple[int, str] | None:
    """Return where and why members may be lost, if the tar does not end properly: with zeros to the last byte.

    tarfile silently treats a damaged header, a cut between two members, and the first end of concatenated tars as the
    end.
    """
    if offset < size and read_range(path, offset, tarfile.BLOCKSIZE).strip(b"\0"):
        return offset, "no readable header, so everything after it in this tar is lost"
    for start in range(offset, size, SCAN_BYTES):
        block = read_range(path, start, SCAN_BYTES)
        if left := block.lstrip(b"\0"):
            at = start + len(block) - len(left)
            return at, "data after the tar's end marker is lost, as in concatenated tars"
    return None


@dataclass(frozen=True)
class _Scan:
    """Scans one tar and writes its record: a row per image member, with its label as found."""

    tar: str
    number: int
    out: str
    config: IndexConfig

    def __call__(self) -> str:
        path = location(self.tar)
        sha256, size = file_sha256(path), file_size(path) or 0
        labels: dict[str, Any] = {}
        images: list[dict[str, Any]] = []
        note = ""
        with path.open("rb") as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        self._look_at(tar, member, size, images, labels)
                    lost = _left_unread(path, tar.offset, size)
                if lost is not None:
                    place: dict[str, Any] = {"key": f"lost-{lost[0]}", "offset": lost[0], "size": 0, "path": ""}
                    images.append({**place, "label": None, "sha256": "", "reject": lost[1]})
                    note = f"{path}: offset {lost[0]}: {lost[1]}; {len(images) - 1} images before it are kept"
            except (tarfile.TarError, EOFError, ValueError) as error:
                note = f"{path}: truncated or damaged after {len(images)} images ({error}); images before that are kept"
        for row in images:
            if row["reject"] is None:
                row["label"] = labels.get(row["key"])
                row["reject"] = None if row["label"] is not None else "no label: expected KEY.cls or KEY.json with one"
        _reject_duplicates(images)
        entry = {"sha256": sha256, "num_bytes": size, "images": images}
        Journal(location(self.out)).record(self.number, entry)
        return note

    def _look_at(
        self,
        tar: tarfile.TarFile,
        member: tarfile.TarInfo,
        size: int,
        images: list[dict[str, Any]],
        labels: dict[str, Any],
    ) -> None:
        key, extension = split_name(member.name)
        if extension not in IMAGE_EXTENSIONS and extension not in ("cls", "json"):
            return
        whole = member.isfile() and member.offset_data + member.size <= size
        if extension in ("cls", "json"):
            if whole and (handle := tar.extractfile(member)) is not None:
                label = _label_in(handle.read(), extension, self.config.label_field)
                if label is not None and (extension == "cls" or key not in labels):
                    labels[key] = label
            return
        row: dict[str, Any] = {"key": printable(key), "offset": member.offset_data, "size": member.size}
        row |= {"path": printable(member.name), "label": None, "sha256": "", "reject": None}
        images.append(row)
        try:
            if (problem := unsafe(member.name)) is not None:
                raise RejectedImageError(f"unsafe name: {problem}")
            if not member.isfile():
                raise RejectedImageError("not a file: a link or a special file")
            if not whole:
                raise RejectedImageError(
                    f"truncated: its tar ends {member.offset_data + member.size - size} bytes early"
                )
            handle = tar.extractfile(member)
            data = b"" if handle is None else handle.read()
            row["sha256"] = hashlib.sha256(data).hexdigest()
            if self.config.decode:
                decode_image(data)
            else:
                check_header(data)
        except RejectedImageError as error:
            row["reject"] = str(error)


def _reject_duplicates(images: list[dict[str, Any]]) -> None:
    seen: set[str] = set()
    for row in images:
        if row["key"] in seen and row["reject"] is None:
            row["reject"] = "duplicate key: another image of this tar has it too"
        seen.add(row["key"])


def split_name(name: str) -> tuple[str, str]:
    """Return key and lower-case extension: `a/b.jpg` → (`a/b`, `jpg`), `a/b.seg.png` → (`a/b`, `seg.png`)."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def unsafe(name: str) -> str | None:
    """Return why a member's name is unsafe as a path or on a terminal; None if it is safe."""
    if name.startswith("/") or "\\" in name or (len(name) > 1 and name[1] == ":"):
        return "an absolute path"
    if ".." in PurePosixPath(name).parts:
        return "it leads to a folder above"
    if not name.isprintable():
        return "it contains unprintable characters"
    return None


def _label_in(content: bytes, extension: str, field: str) -> int | str | None:
    """Return the label as found: a class number, or a class name; None if there is none."""
    try:
        text = content.decode().strip()
        value: Any = text if extension == "cls" else json.loads(text)
        for part in field.split(".") if extension == "json" else []:
            value = value[part]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    if isinstance(value, str):
        if re.fullmatch(r"-?[0-9]{1,18}", value) is None:
            return value
        value = int(value)
    return value if abs(value) <= MAX_LABEL else None


def _publish(
    work: WorkDir[ShardSetManifest], splits: list[tuple[Location, Split]], config: IndexConfig, entries: list[Json]
) -> ShardSetManifest:
    class_names = _class_names(entries, config)
    numbers = {name: i for i, name in enumerate(class_names)}
    shards, rejected = [], []
    for i, ((tar, split), entry) in enumerate(zip(splits, entries, strict=True)):
        refs = [_resolved(ImageRef(tar, **_with_number(row)), row["label"], numbers) for row in entry["images"]]
        name = f"index/{i:06d}.parquet"
        index_sha256 = write_index(work.path / name, refs)
        shards.append(
            ShardFile(
                name=str(tar),
                split=split,
                num_images=len(refs),
                num_bytes=entry["num_bytes"],
                sha256=entry["sha256"],
                index_sha256=index_sha256,
                index=name,
            )
        )
        rejected += [
            {"tar": str(tar), "offset": ref.offset, "key": ref.key, "reason": ref.reject, "path": ref.path}
            for ref in refs
            if ref.reject is not None
        ]
    rows = sum(shard.num_images for shard in shards)
    if rows == len(rejected):
        reason = rejected[0]["reason"] if rejected else "no member has an image's extension"
        raise ArtifactError(f"{splits[0][0]}: expected at least one usable image in {len(splits)} tars ({reason}).")
    return publish_shards(work, class_names, shards, rejected, rows)


def _with_number(row: dict[str, Any]) -> dict[str, Any]:
    return {**{name: value for name, value in row.items() if name != "label"}, "label": -1}


def _resolved(ref: ImageRef, label: int | str | None, numbers: dict[str, int]) -> ImageRef:
    if ref.reject is not None:
        return ref
    number = numbers.get(label, -1) if isinstance(label, str) else label
    if number is None or not 0 <= number < len(numbers):
        return replace(ref, reject=f"unknown label: {label}, expected one of {len(numbers)} classes")
    return replace(ref, label=number)


def _class_names(entries: list[dict[str, Any]], config: IndexConfig) -> list[str]:
    """Return the given names; or the sorted names that were found as labels; or numbers up to the largest label.

    Raises:
        UsageError: labels are numbers and names.
    """
    if config.class_names is not None:
        return list(config.class_names)
    labels = {row["label"] for entry in entries for row in entry["images"] if row["reject"] is None}
    names = sorted(label for label in labels if isinstance(label, str))
    if names and len(names) < len(labels):
        number = min(label for label in labels if isinstance(label, int))
        raise UsageError(
            f"some labels are numbers, others are names (as {number} and {names[0]!r}): the names of the numbers are "
            "unknown. "
            "Give --class-names FILE, one name per line in the order of the numbers."
        )
    if names:
        return names
    return [str(i) for i in range(max((label for label in labels if isinstance(label, int)), default=-1) + 1)]
