"""`svgpipe shard`: image folder, archive or tables to WebDataset tars with an index.

The content of every tar depends only on the file list and the config: not on the number of workers, the order of the
file system, or interruptions.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import Location, location
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import MANIFEST_NAME, InputRef, Json, digest
from svgpipe.manifests.recipe import ShardSection
from svgpipe.manifests.shard_writer import TarImage, write_tar
from svgpipe.manifests.shards import ShardFile, ShardSetManifest, Split, shard_name
from svgpipe.manifests.workdir import StageSpec, WorkDir

from ..images.decode import EXTENSIONS, RejectedImageError, centre_crop, decode_or_keep, encode_png, to_array
from ..images.tar_names import printable
from ..runtime.processes import map_in_processes
from ..runtime.progress import Progress, Recorded
from ..runtime.resources import cpu_count
from .changes import ReadFile, read_file, require_unchanged, write_sources
from .labels import empty_classes, order_warning
from .publish import leaked_warning, publish_shards
from .scan import ImageSources, SourceFile, scan


@dataclass(frozen=True)
class ShardJob:
    """One tar to write."""

    number: int
    split: Split
    first_key: int
    files: tuple[SourceFile, ...]
    out: str
    config: ShardSection


def shard(
    sources: ImageSources,
    out: Location,
    config: ShardSection,
    *,
    processes: int | None = None,
    progress: Progress | None = None,
) -> ShardSetManifest:
    """Write the shard set of images to `out`; run again to resume.

    If the images are gone, a finished set with the same config is used as it is.

    Args:
        sources: images. A class index is the position in the sorted names of the classes.
        out: directory to create or resume.
        config: section `shard` of a recipe.
        processes: number of processes; None: one per core.
        progress: receives the progress.

    Returns:
        The manifest of the shard set.

    Raises:
        UsageError: see `scan` and `shard_spec`.
        MismatchError: `out` holds the shards of other images or another config.
        ArtifactError: every image was rejected, or files of a finished set were changed.
    """
    kept = None if sources.train.exists() else spec_without_source(sources, out, config)
    if kept is not None and (done := kept.state()[1]) is not None:
        if progress is not None:
            progress.say(f"{sources.train}: not there any more; the finished shards in {out} are used")
        return done
    class_names, files = scan(sources)
    with WorkDir(shard_spec(sources, files, out, config)) as work:
        if work.finished is not None:
            require_unchanged(out, files, record=True)
            return work.finished
        progress = Recorded(progress, out)
        if (warning := order_warning(class_names)) is not None:
            progress.say(warning)
        jobs = list(assign_shards(files, out, config))
        missing = _missing(jobs, Journal(out), progress)
        progress.begin("shard", len(jobs), "tars", len(jobs) - len(missing))
        for _ in map_in_processes(write_shard, missing, processes or cpu_count()):
            progress.advance()
        return _publish(work, class_names, jobs, progress)


def shard_spec(
    sources: ImageSources, files: Sequence[SourceFile], out: Location, config: ShardSection
) -> StageSpec[ShardSetManifest]:
    """Return what `shard` is asked to make.

    Raises:
        UsageError: `out` lies inside a source, or a fraction is to be held out although held-out images are given.
    """
    if config.holdout > 0 and sources.heldout is not None:
        raise UsageError("expected either --holdout FRACTION (shard.holdout) or --heldout SOURCE, found both.")
    inputs = {}
    for name, path in sources:
        if isinstance(out, Path) and out.resolve().is_relative_to(path.resolve()):
            raise UsageError(
                f"{out}: expected a directory outside the source {path}, which would become a class of it."
            )
        own = [file for file in files if file.heldout == (name == "heldout")]
        listing: list[list[object]] = [[file.path, file.entry.size] for file in own]
        if sources.unlabelled or sources.heldout_labels is not None or any(file.entry.block for file in own[:1]):
            listing += [[file.path, file.label, file.entry.class_name] for file in own]  # they are not those of folders
        config_of = {"files": len(own)}
        inputs[name] = InputRef(kind="images", fingerprint=digest(listing), path=str(path), config=config_of)
    return StageSpec(out, ShardSetManifest, config.model_dump(mode="json"), inputs)


def assign_shards(files: Sequence[SourceFile], out: Location, config: ShardSection) -> Iterator[ShardJob]:
    """Yield the tars to write: held-out ones last. The order of images in a split depends only on the seed.

    Rows of a table that are read together stay together.
    """

    def order(file: SourceFile) -> tuple[bytes, tuple[int, ...]]:
        text = f"{config.seed}/{file.entry.block or file.path}"
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest(), file.entry.place

    given = [file for file in files if file.heldout]
    files = [file for file in files if not file.heldout]
    by_class: dict[int | None, list[SourceFile]] = {}
    for file in sorted(files, key=order):
        by_class.setdefault(file.label, []).append(file)
    splits: dict[Split, list[SourceFile]] = {"train": [], "heldout": given}
    for label, members in by_class.items():
        images = [file for file in members if file.entry.is_image] if label is not None else []
        count = round(config.holdout * len(images))
        if config.holdout > 0 and images:
            count = min(max(count, 1), len(images) - 1)
        held = {file.path for file in images[:count]}
        for file in members:
            splits["heldout" if file.path in held else "train"].append(file)
    number = first_key = 0
    for split, members in splits.items():
        members.sort(key=order)
        for start in range(0, len(members), config.images_per_shard):
            chunk = tuple(members[start : start + config.images_per_shard])
            yield ShardJob(number, split, first_key, chunk, str(out), config)
            number, first_key = number + 1, first_key + len(chunk)


def spec_without_source(
    sources: ImageSources, out: Location, config: ShardSection
) -> StageSpec[ShardSetManifest] | None:
    """Return what a finished shard set was made from, with another config; None if it was made from other sources."""
    if not (out / MANIFEST_NAME).exists():
        return None
    inputs = ShardSetManifest.read(out).inputs
    if {name: str(path.absolute()) for name, path in sources} != {name: ref.path for name, ref in inputs.items()}:
        return None
    return StageSpec(out, ShardSetManifest, config.model_dump(mode="json"), inputs)


def _missing(jobs: Sequence[ShardJob], journal: Journal, progress: Progress) -> list[ShardJob]:
    """Return the tars to write: without a record, or made from files that were changed since."""
    whole = journal.whole([job.number for job in jobs])
    missing = []
    for job in jobs:
        record = whole.get(job.number)
        changed = None if record is None else _changed(job, record.entry["sources"])
        if changed is not None:
            progress.say(f"{changed}: was changed after it was sharded; its tar is written again")
        if record is None or changed is not None:
            missing.append(job)
    return missing


def _changed(job: ShardJob, sources: Sequence[Json]) -> str | None:
    """Return the name of a file that was changed since its tar was written; None if there is none."""
    pairs = zip(job.files, sources, strict=True)
    return next((file.path for file, read in pairs if not ReadFile(**read).is_still(file)), None)


def write_shard(job: ShardJob) -> None:
    """Write one tar, then its index, then its journal record."""
    out = location(job.out)
    rejects: list[dict[str, str]] = []
    sources: list[Json] = []
    labels: Counter[str] = Counter()

    def images() -> Iterator[TarImage]:
        for position, file in enumerate(job.files):
            sha256 = ""
            try:
                data = _read(file)
                sha256 = hashlib.sha256(data).hexdigest()
                image = _image(job, file, f"{job.first_key + position:08d}", data)
            except RejectedImageError as error:
                rejects.append({"path": printable(file.path), "reason": str(error)})
            else:
                labels[str(file.label)] += 1
                yield image
            finally:
                sources.append(asdict(ReadFile(file.path, file.entry.size, file.entry.modified_ns, sha256)))

    entry = write_tar(out, shard_name(job.number, job.split), images(), job.split)
    record = {"shard": entry.model_dump(), "rejected": rejects, "labels": labels, "sources": sources}
    Journal(out).record(job.number, record, entry.files)


def _read(file: SourceFile) -> bytes:
    """Return the content of a file.

    Raises:
        RejectedImageError: it cannot be read.
    """
    if file.entry.problem:
        raise RejectedImageError(file.entry.problem)
    try:
        return read_file(file)
    except OSError as error:
        raise RejectedImageError(f"unreadable: {error.strerror or error}") from error


def _image(job: ShardJob, file: SourceFile, key: str, data: bytes) -> TarImage:
    """Return the image to store.

    Raises:
        RejectedImageError: the image cannot be used.
    """
    if file.label is None:
        no_class = "no label, or one without a name" if file.entry.block else "not in a class folder"
        raise RejectedImageError(no_class if file.entry.class_name is None else "not a training class")
    suffix = Path(file.path).suffix.lower()
    if not file.entry.block and suffix not in EXTENSIONS:
        raise RejectedImageError(f"extension {suffix or '(none)'} is not one of {', '.join(EXTENSIONS)}")
    image, damaged = decode_or_keep(data, keep_damaged=job.config.keep_damaged, max_pixels=job.config.max_pixels)
    path = printable(file.path)
    if job.config.crop is not None:
        return TarImage(key, encode_png(to_array(centre_crop(image, job.config.crop))), "png", file.label, path)
    with Image.open(io.BytesIO(data)) as header:
        kinds = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
        extension = kinds[str(header.format)]
    return TarImage(key, data, extension, file.label, path, damaged)


def _leaked(jobs: Sequence[ShardJob], sources: Sequence[ReadFile], rejected: set[str]) -> str | None:
    """Return a warning if held-out images have the bytes of training images; None if none has."""
    splits = [job.split for job in jobs for _ in job.files]
    stored = [
        (file, split) for file, split in zip(sources, splits, strict=True) if printable(file.path) not in rejected
    ]
    train = {file.sha256 for file, split in stored if split == "train"}
    return leaked_warning(train, ((file.sha256, file.path) for file, split in stored if split == "heldout"))


def _publish(
    work: WorkDir[ShardSetManifest], class_names: list[str], jobs: Sequence[ShardJob], progress: Progress
) -> ShardSetManifest:
    """Publish the set, with a warning for classes without a training image.

    Returns:
        The manifest as written.

    Raises:
        ArtifactError: every image was rejected.
        AssertionError: an input is neither stored nor rejected.
    """
    journal = Journal(work.path)
    records = [journal.read(job.number) for job in jobs]
    shards = [ShardFile.model_validate(record["shard"]) for record in records]
    rejects = [reject for record in records for reject in record["rejected"]]
    sources = [ReadFile(**read) for record in records for read in record["sources"]]
    num_images = sum(shard.num_images for shard in shards)
    if num_images + len(rejects) != len(sources):
        raise AssertionError(f"{len(sources)} inputs, but {num_images} stored and {len(rejects)} rejected")
    if num_images == 0:
        raise ArtifactError(
            f"{work.path}: expected at least one usable image, but all {len(rejects)} files were rejected"
            + (f" ({rejects[0]['path']}: {rejects[0]['reason']})." if rejects else ".")
        )
    trained = (
        Counter[str](record["labels"]) for job, record in zip(jobs, records, strict=True) if job.split == "train"
    )
    stored = sum(trained, Counter[str]())
    warning = empty_classes(class_names, [stored[str(label)] for label in range(len(class_names))])
    if warning is not None:
        progress.say(warning)
    if (warning := _leaked(jobs, sources, {reject["path"] for reject in rejects})) is not None:
        progress.say(warning)
    write_sources(work.path, sources)
    return publish_shards(work, class_names, shards, rejects, len(sources))
