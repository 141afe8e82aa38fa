"""`svgpipe index`: index existing tars as a shard set. The tars are read once and not changed.

A row per image. An unusable one keeps its row, with reason and offset: inputs = usable + rejected. Keys may repeat
between tars, but not within one.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import (
    Location,
    absolute,
    file_sha256,
    file_size,
    file_version,
    location,
    make_directory,
    read_range,
)
from svgpipe.manifests.index import ImageRef, write_index
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import InputRef, Json, digest
from svgpipe.manifests.shards import ShardFile, ShardSet, ShardSetManifest, Split
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import cpu_count
from .labels import Classes, LabelError, RawLabel, classes_of, empty_classes, order_warning
from .publish import leaked_warning, publish_shards
from .tar_members import Member, ScanOptions, scan_tar

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}


@dataclass(frozen=True)
class IndexConfig:
    """How tars are scanned, and the class names in label order; None: taken from the labels."""

    scan: ScanOptions = field(default_factory=ScanOptions)
    class_names: tuple[str, ...] | None = None


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
        UsageError: a compressed tar, a file that is not a tar, no tar, or labels with two meanings.
        ArtifactError: a tar is missing or was changed, or there is no usable image.
        MismatchError: `out` was begun with other tars or another config.
    """
    spec, splits = _spec(train, heldout, out, config)
    with WorkDir(spec) as work:
        if work.finished is not None:
            ShardSet(out, work.finished, work.finished.shards).check_files()
            return work.finished
        journal = Journal(out)
        make_directory(out / "index")
        progress = Recorded(progress, out)
        missing = list(_missing(journal, splits, progress))
        progress.begin("index", len(splits), "tars", len(splits) - len(missing))
        jobs = [_Scan(str(splits[i][0]), i, str(absolute(out)), config.scan) for i in missing]
        for note in map_in_processes(_Scan.__call__, jobs, processes or cpu_count()):
            if note:
                progress.say(note)
            progress.advance()
        entries = [journal.read(i) for i in range(len(splits))]
        return _publish(work, splits, config, entries, progress)


def _spec(
    train: Sequence[Location], heldout: Sequence[Location], out: Location, config: IndexConfig
) -> tuple[StageSpec[ShardSetManifest], list[tuple[Location, Split]]]:
    """Return what is asked for, and every tar with its split.

    Raises:
        UsageError: a tar is named twice, or is not a plain tar.
        ArtifactError: a tar is missing.
    """
    splits: list[tuple[Location, Split]] = [*((tar, "train") for tar in train), *((tar, "heldout") for tar in heldout)]
    sizes = [_require_plain_tar(tar) for tar, _ in splits]
    splits = [(absolute(tar), split) for tar, split in splits]
    if len({os.path.realpath(str(tar)) if isinstance(tar, Path) else str(tar) for tar, _ in splits}) != len(splits):
        raise UsageError("a tar is named twice, perhaps as training and as held-out images.")
    listing = [[str(tar), split, size] for (tar, split), size in zip(splits, sizes, strict=True)]
    origin = InputRef(kind="tars", fingerprint=digest(listing), path=str(splits[0][0]), config={"tars": len(splits)})
    recorded = {
        **asdict(config.scan),
        "class_names": None if config.class_names is None else list(config.class_names),
    }
    return StageSpec(out, ShardSetManifest, recorded, {"source": origin}), splits


def _require_plain_tar(tar: Location) -> int:
    if tar.is_dir():
        raise UsageError(f"{tar}: expected a tar, found a folder. Give its tars, as in '{tar}/{{0000..0099}}.tar'.")
    size = file_size(tar)
    if size is None and "*" in str(tar):
        raise UsageError(f"{tar}: no file matches. Inside quotes use braces, as in 'train-{{0000..0099}}.tar'.")
    if size is None:
        raise ArtifactError(f"{tar}: expected a tar, found no such file.")
    head = read_range(tar, 0, tarfile.BLOCKSIZE)
    for magic, kind in COMPRESSED.items():
        if head.startswith(magic):
            raise UsageError(
                f"{tar}: is compressed with {kind}. Its images cannot be read one by one; decompress it first "
                "(images hardly compress)."
            )
    empty = not head.strip(b"\0")
    if not empty and (len(head) < tarfile.BLOCKSIZE or (head[257:262] != b"ustar" and not _is_header(head))):
        raise UsageError(f"{tar}: expected a tar, found {size} bytes of something else.")
    return size


def _is_header(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head, "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError):
        return False
    return True


def _missing(journal: Journal, splits: Sequence[tuple[Location, Split]], progress: Progress) -> Iterator[int]:
    """Yield the numbers of the tars to scan: without a record, or changed since they were scanned."""
    whole = journal.whole(range(len(splits)))
    for number, (tar, _) in enumerate(splits):
        if number not in whole:
            yield number
        elif whole[number].entry["version"] != file_version(tar) and whole[number].entry["sha256"] != file_sha256(tar):
            progress.say(f"{tar}: was changed after it was scanned; it is scanned again")
            yield number


@dataclass(frozen=True)
class _Scan:
    """Scans one tar and writes its record: a row per image, with its label as found."""

    tar: str
    number: int
    out: str
    options: ScanOptions

    def __call__(self) -> str:
        path = location(self.tar)
        version = file_version(path)  # before it is read: a later write is noticed
        sha256, size = file_sha256(path), file_size(path) or 0
        rows, note = scan_tar(path, size, self.options)
        entry = {"sha256": sha256, "num_bytes": size, "version": version, "images": [asdict(row) for row in rows]}
        Journal(location(self.out)).record(self.number, entry)
        return note


def _publish(
    work: WorkDir[ShardSetManifest],
    splits: list[tuple[Location, Split]],
    config: IndexConfig,
    entries: list[Json],
    progress: Progress,
) -> ShardSetManifest:
    """Resolve the labels, write an index per tar, and publish the set.

    Returns:
        The manifest as written.

    Raises:
        UsageError: a label has two meanings.
        ArtifactError: there is no usable image.
    """
    tars = [[_member(row) for row in entry["images"]] for entry in entries]
    classes = classes_of((row.label for rows in tars for row in rows if row.label is not None), config.class_names)
    shards, rejected = [], []
    counts = np.zeros(len(classes.names), np.int64)
    train, heldout = set[str](), list[tuple[str, str]]()
    for i, ((tar, split), entry, rows) in enumerate(zip(splits, entries, tars, strict=True)):
        refs = [_resolved(tar, row, classes) for row in rows]
        shards.append(_indexed(work.path, i, (tar, split), entry, refs))
        rejected += [_rejected(ref) for ref in refs if ref.reject is not None]
        usable = [ref for ref in refs if ref.reject is None]
        if split == "train":
            train.update(ref.sha256 for ref in usable)
            np.add.at(counts, [ref.label for ref in usable], 1)
        else:
            heldout += [(ref.sha256, f"{tar}: {ref.key}") for ref in usable]
    rows_in_all = sum(shard.num_images for shard in shards)
    if rows_in_all == len(rejected):
        reason = rejected[0]["reason"] if rejected else "no member has an image's extension"
        raise ArtifactError(f"{splits[0][0]}: expected at least one usable image in {len(splits)} tars ({reason}).")
    leaked = leaked_warning(train, heldout)
    for warning in (order_warning(classes.names), empty_classes(classes.names, counts.tolist()), leaked):
        if warning is not None:
            progress.say(warning)
    return publish_shards(work, classes.names, shards, rejected, rows_in_all)


def _member(row: Json) -> Member:
    label = row["label"]
    return Member(**{**row, "label": None if label is None else RawLabel(**label)})


def _resolved(tar: Location, row: Member, classes: Classes) -> ImageRef:
    """Return the row of the index; −1 as label of a reject."""
    label, reject = -1, row.reject
    if row.label is not None and reject is None:
        try:
            label = classes.index(row.label)
        except LabelError as error:
            reject = str(error)
    return ImageRef(tar, row.offset, row.size, row.sha256, row.key, label, row.path, reject, row.damaged)


def _rejected(ref: ImageRef) -> Json:
    return {"tar": str(ref.tar), "offset": ref.offset, "key": ref.key, "reason": ref.reject, "path": ref.path}


def _indexed(
    out: Location, number: int, source: tuple[Location, Split], entry: Json, refs: Sequence[ImageRef]
) -> ShardFile:
    """Write the index of one tar.

    Returns:
        Its entry in the manifest.
    """
    tar, split = source
    name = f"index/{number:06d}.parquet"
    return ShardFile(
        name=str(tar),
        split=split,
        num_images=len(refs),
        num_bytes=entry["num_bytes"],
        sha256=entry["sha256"],
        index_sha256=write_index(out / name, refs),
        index=name,
        version=entry["version"],
    )
