"""`svgpipe shard`: image folder to WebDataset tars with an index.

The content of every tar depends only on the file list and the config: not on the number of workers, the order of the
file system, or interruptions.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import Location, location
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import InputRef, Json, digest
from svgpipe.manifests.recipe import ShardSection
from svgpipe.manifests.shards import ShardFile, ShardSetManifest, Split, TarImage, shard_name, write_tar
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..images.decode import EXTENSIONS, RejectedImageError, centre_crop, decode_image, encode_png, to_array
from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import cpu_count
from .publish import printable, publish_shards


@dataclass(frozen=True)
class SourceFile:
    """One input file; `label` is None outside a class folder."""

    path: str  # relative to the source
    size: int
    label: int | None


@dataclass(frozen=True)
class ShardJob:
    """One tar to write."""

    number: int
    split: Split
    first_key: int
    files: tuple[SourceFile, ...]
    source: str
    out: str
    crop: int | None
    max_pixels: int


def shard(
    source: Path,
    out: Location,
    config: ShardSection,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> ShardSetManifest:
    """Write the shard set of `source` to `out`; run again to resume.

    Args:
        source: folder of class folders. A class index is the position in the sorted names.
        out: directory to create or resume.
        config: section `shard` of a recipe.
        processes: number of processes; None: one per core.
        progress: receives the progress.

    Returns:
        The manifest of the shard set.

    Raises:
        UsageError: no such folder, no class folder, or a class without a file.
        MismatchError: `out` holds the shards of another source or config.
        ArtifactError: every image of a class was rejected.
    """
    class_names, files = scan(source)
    with WorkDir(shard_spec(source, files, out, config)) as work:
        if work.finished is not None:
            return work.finished
        jobs = list(assign_shards(files, source, out, config))
        journal = Journal(out)
        missing = [jobs[number] for number in journal.missing(range(len(jobs)))]
        progress = Recorded(progress, out)
        progress.begin("shard", len(jobs), "tars", len(jobs) - len(missing))
        for _ in map_in_processes(write_shard, missing, processes or cpu_count()):
            progress.advance()
        return _publish(work, class_names, files, [journal.read(job.number) for job in jobs])


def shard_spec(
    source: Path, files: Sequence[SourceFile], out: Location, config: ShardSection
) -> StageSpec[ShardSetManifest]:
    """Return what `shard` is asked to make.

    Raises:
        UsageError: `out` lies inside `source`.
    """
    if isinstance(out, Path) and out.resolve().is_relative_to(source.resolve()):
        raise UsageError(f"{out}: expected a directory outside the source {source}, which would become a class of it.")
    listing = digest([[f.path, f.size] for f in files])
    origin = InputRef(kind="image-folder", fingerprint=listing, path=str(source), config={"files": len(files)})
    return StageSpec(out, ShardSetManifest, config.model_dump(mode="json"), {"source": origin})


def scan(source: Path) -> tuple[list[str], list[SourceFile]]:
    """Return class names and all non-hidden files below `source`, both sorted.

    Raises:
        UsageError: no such folder, no class folder, or a class without a file.
    """
    if not source.is_dir():
        raise UsageError(f"{source}: expected a folder of class folders, found {_what(source)}.")
    class_names = sorted(e.name for e in os.scandir(source) if e.is_dir() and not e.name.startswith("."))
    if not class_names:
        raise UsageError(f"{source}: expected class folders (class/image.jpg), found none.")
    files = [SourceFile(e.name, _size(e), None) for e in os.scandir(source) if _counts(e)]
    for label, name in enumerate(class_names):
        own = [SourceFile(os.path.relpath(e.path, source), _size(e), label) for e in _walk(source / name)]
        if not own:
            raise UsageError(f"{source / name}: expected images of class {name!r}, found none. Remove the folder.")
        files += own
    return class_names, sorted(files, key=lambda f: f.path)


def _what(path: Path) -> str:
    return "a file" if path.exists() else "nothing"


def _counts(entry: os.DirEntry[str]) -> bool:
    # A broken symbolic link is an input that cannot be read, and is rejected with that reason.
    return not entry.name.startswith(".") and not entry.is_dir()


def _size(entry: os.DirEntry[str]) -> int:
    return entry.stat(follow_symlinks=entry.is_file()).st_size


def _walk(folder: Path) -> Iterator[os.DirEntry[str]]:
    for entry in os.scandir(folder):
        if entry.is_dir() and not entry.name.startswith("."):
            yield from _walk(Path(entry.path))
        elif _counts(entry):
            yield entry


def assign_shards(files: Sequence[SourceFile], source: Path, out: Location, config: ShardSection) -> Iterator[ShardJob]:
    """Yield the tars to write: held-out ones last. The order of images in a split depends only on the seed."""

    def order(file: SourceFile) -> bytes:
        return hashlib.sha256(f"{config.seed}/{file.path}".encode("utf-8", "surrogateescape")).digest()

    by_class: dict[int | None, list[SourceFile]] = {}
    for file in sorted(files, key=order):
        by_class.setdefault(file.label, []).append(file)
    splits: dict[Split, list[SourceFile]] = {"train": [], "heldout": []}
    for label, members in by_class.items():
        count = round(config.holdout * len(members))
        if config.holdout > 0 and label is not None:
            count = min(max(count, 1), len(members) - 1)
        splits["heldout"] += members[:count] if label is not None else []
        splits["train"] += members[count:] if label is not None else members
    number = first_key = 0
    for split, members in splits.items():
        members.sort(key=order)
        for start in range(0, len(members), config.images_per_shard):
            chunk = tuple(members[start : start + config.images_per_shard])
            yield ShardJob(number, split, first_key, chunk, str(source), str(out), config.crop, config.max_pixels)
            number, first_key = number + 1, first_key + len(chunk)


def write_shard(job: ShardJob) -> None:
    """Write one tar, then its index, then its journal record."""
    out = location(job.out)
    rejects: list[dict[str, str]] = []
    labels: Counter[str] = Counter()

    def images() -> Iterator[TarImage]:
        for position, file in enumerate(job.files):
            try:
                data, extension = _load(job, file)
            except RejectedImageError as error:
                rejects.append({"path": printable(file.path), "reason": str(error)})
                continue
            assert file.label is not None
            labels[str(file.label)] += 1
            yield TarImage(f"{job.first_key + position:08d}", data, extension, file.label, printable(file.path))

    entry = write_tar(out / shard_name(job.number), images(), job.split)
    record = {"shard": entry.model_dump(), "rejected": rejects, "labels": labels}
    Journal(out).record(job.number, record, entry.files)


def _load(job: ShardJob, file: SourceFile) -> tuple[bytes, str]:
    """Return the bytes to store and their extension.

    Raises:
        RejectedImageError: the image cannot be used.
    """
    if file.label is None:
        raise RejectedImageError("not in a class folder")
    suffix = Path(file.path).suffix.lower()
    if suffix not in EXTENSIONS:
        raise RejectedImageError(f"extension {suffix or '(none)'} is not one of {', '.join(EXTENSIONS)}")
    try:
        data = (Path(job.source) / file.path).read_bytes()
    except OSError as error:
        raise RejectedImageError(f"unreadable: {error.strerror}") from error
    image = decode_image(data, max_pixels=job.max_pixels)
    if job.crop is not None:
        return encode_png(to_array(centre_crop(image, job.crop))), "png"
    with Image.open(io.BytesIO(data)) as header:
        return data, {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}.get(
            str(header.format), EXTENSIONS[suffix]
        )


def _publish(
    work: WorkDir[ShardSetManifest],
    class_names: list[str],
    files: Sequence[SourceFile],
    records: Sequence[Json],
) -> ShardSetManifest:
    shards = [ShardFile.model_validate(record["shard"]) for record in records]
    rejects = [reject for record in records for reject in record["rejected"]]
    stored = sum((Counter(record["labels"]) for record in records), Counter[str]())
    empty = [name for label, name in enumerate(class_names) if not stored[str(label)]]
    if empty:
        reason = next((r for r in rejects if r["path"].startswith(empty[0] + os.sep)), {"reason": "unknown"})
        raise ArtifactError(
            f"{work.path}: class {empty[0]!r}: expected at least one usable image, but all were rejected "
            f"({reason['reason']}). Remove the class folder and shard into a new directory."
        )
    num_images = sum(shard.num_images for shard in shards)
    if num_images + len(rejects) != len(files):
        raise AssertionError(f"{len(files)} inputs, but {num_images} stored and {len(rejects)} rejected")
    return publish_shards(work, class_names, shards, rejects, len(files))
