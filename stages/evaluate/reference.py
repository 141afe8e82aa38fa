"""The reference of an evaluation: a shard set, a folder of images, or a file as published by ADM."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.evaluation_section import EvaluationSection
from svgpipe.manifests.filesystem import Location, file_sha256, location
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.kinds import KINDS
from svgpipe.manifests.manifest import MANIFEST_NAME, PLAN_NAME, InputRef, Json, digest, read_json
from svgpipe.manifests.selection import choose_evenly
from svgpipe.manifests.shards import ShardSet, Split

from ..images.decode import EXTENSIONS, RejectedImageError, decode_image
from ..images.folder import visible_files
from ..runtime.progress import Progress
from .features import INCEPTION
from .file_hashes import hashes_of
from .reference_npz import EXTRACTOR, StatisticsFile, read_npz, unpack_images

READERS = 16
LOOKED_AT_ONCE = 4096
MIN_IMAGES = 2
REFERENCES = "features/reference-hashes"


@dataclass(frozen=True)
class Reference:
    """Real images or their statistics, and their origin."""

    kind: Literal["shards", "folder", "statistics", "npz"]
    path: str
    ref: InputRef
    images: Sequence[ImageRef] = ()  # of a folder or an .npz
    class_names: Sequence[str] | None = None
    shards: ShardSet | None = None
    statistics: StatisticsFile | None = None

    def count(self, split: Split) -> int:
        """Return the number of images of a split. All images of a folder are in `train`."""
        if self.shards is not None:
            return len(self.shards.usable_rows(split))
        return len(self.images) if split == "train" else 0

    def choose(self, split: Split, count: int | None) -> list[ImageRef]:
        """Return at most `count` evenly spread images of a split; None: all. Lists only the tars that hold them."""
        if self.shards is not None:
            return self.shards.usable(split, count)
        return choose_evenly(self.images, count) if split == "train" else []

    @property
    def _has_statistics(self) -> bool:
        return self.statistics is not None and self.statistics.pooled is not None

    @property
    def description(self) -> str:
        """Description for a report, as in `against …`."""
        return {
            "shards": "real images of the training split",
            "folder": f"the images in {self.path}",
            "statistics": f"the statistics in {self.path}",
            "npz": f"the images in {self.path}" + (", distances to its statistics" if self._has_statistics else ""),
        }[self.kind]


def open_reference(
    spec: str, *, count: int | None = None, pool: Location | None = None, progress: Progress | None = None
) -> Reference:
    """Open a shard set (its directory or tars), an image folder, or an .npz with statistics, images or both.

    Images are not decoded, see `require_decodable`.

    Args:
        spec: path.
        count: maximum number of images of a folder that are measured, evenly spread; None: all. Only these are hashed.
        pool: its folder `REFERENCES` keeps the hashes of the images of folders, so that each file is hashed once, and
            the images of .npz files, as tars; None: nothing is kept, and an .npz has no images.
        progress: receives the progress of unpacking.

    Returns:
        The reference.

    Raises:
        ArtifactError: there is nothing, or it cannot be read.
        UsageError: see `ShardSet.open`.
    """
    kept = None if pool is None else pool / REFERENCES
    if spec.endswith(".npz"):
        return _npz(Path(spec), kept, progress)
    directory = location(spec)
    finished = (directory / MANIFEST_NAME).exists() or (directory / PLAN_NAME).exists()
    if isinstance(directory, Path) and directory.is_dir() and not finished:
        return _folder(directory, count, kept)
    return shard_reference(ShardSet.open(spec))


def shard_reference(shards: ShardSet) -> Reference:
    """Return the training split of a shard set as reference; its held-out images are the floor.

    Raises:
        ArtifactError: fewer than two reference images.
    """
    if (count := len(shards.usable_rows("train"))) < MIN_IMAGES:
        raise ArtifactError(
            f"{shards.directory}: expected two reference images or more, found {count} in training tars."
        )
    names = shards.manifest.class_names
    return Reference("shards", str(shards.directory), shards.as_input(), class_names=names, shards=shards)


def _folder(directory: Path, count: int | None, kept: Location | None) -> Reference:
    """Return `count` evenly spread images below a folder, in the order of their paths, as `svgpipe shard` finds them.

    Classes are the folders, if no image lies outside them.

    Returns:
        The reference.

    Raises:
        ArtifactError: there are artifacts, or fewer than two images.
    """
    below = [Path(entry.path) for entry in visible_files(directory)]
    if artifact := next((path.parent for path in below if path.name == MANIFEST_NAME and _is_ours(path)), None):
        raise ArtifactError(
            f"{directory}: expected a shard set or a folder of images, found a folder with svgpipe's artifacts "
            f"({artifact}). Give the shard set, or a folder with images only."
        )
    paths = sorted(path for path in below if path.suffix.lower() in EXTENSIONS and path.is_file())
    if len(paths) < MIN_IMAGES:
        raise ArtifactError(
            f"{directory}: expected a shard set, or a folder with at least two JPEG, PNG or WebP images; "
            f"found {len(paths)}."
        )
    names = [path.relative_to(directory).as_posix() for path in paths]
    classes = sorted({name.partition("/")[0] for name in names}) if all("/" in name for name in names) else None
    numbers = {name: number for number, name in enumerate(classes or [])}
    chosen = choose_evenly(list(zip(names, paths, strict=True)), count)
    looked = hashes_of(dict(chosen), None if kept is None else kept / f"{digest(str(directory.absolute()))[:16]}.json")
    refs = [
        ImageRef(path, 0, looked[name].size, looked[name].sha256, path.stem, numbers.get(name.partition("/")[0], 0))
        for name, path in chosen
    ]
    content = digest([names, [[name, looked[name].sha256] for name, _ in chosen]])
    ref = InputRef(kind="image-folder", fingerprint=content, path=str(directory), config={"images": len(refs)})
    return Reference("folder", str(directory), ref, refs, class_names=classes)


def _is_ours(manifest: Path) -> bool:
    """Return whether it is a manifest of an artifact, and not another file of this name."""
    try:
        return read_json(manifest).get("kind") in KINDS
    except ArtifactError:
        return False


def was_decoded(shards: ShardSet | None) -> bool:
    """Return whether the images of a set were decoded when it was made; of existing tars only if requested."""
    return shards is not None and bool(shards.manifest.config.get("decode", True))


def require_decodable(refs: Sequence[ImageRef], journal: Journal, progress: Progress) -> None:
    """Decode images that were never decoded, once: a bad one must stop a sweep before hours of sampling.

    Raises:
        ArtifactError: an image cannot be decoded.
    """
    different = {(str(ref.tar), ref.offset): ref for ref in refs}
    looked = digest([[*place, ref.sha256] for place, ref in different.items()])
    journal.kept(0, looked, lambda: _look(list(different.values()), progress))


def _look(refs: Sequence[ImageRef], progress: Progress) -> Json:
    """Decode all images.

    Returns:
        Their number.
    """

    def look(ref: ImageRef) -> None:
        try:
            decode_image(ref.read(), damaged=ref.damaged)
        except RejectedImageError as error:
            in_tar = ref.tar.suffix == ".tar"
            what = (
                "Index the tars again with --decode, which rejects such images." if in_tar else "Remove or repair it."
            )
            where = f"{ref.tar}: {ref.key}" if in_tar else str(ref.tar)
            raise ArtifactError(f"{where}: cannot be measured: {error}. {what}") from error

    progress.begin("check images", len(refs), "images")
    with ThreadPoolExecutor(READERS) as readers:
        for start in range(0, len(refs), LOOKED_AT_ONCE):
            for _ in readers.map(look, refs[start : start + LOOKED_AT_ONCE]):
                progress.advance()
    return {"images": len(refs)}


def _npz(path: Path, kept: Location | None, progress: Progress | None) -> Reference:
    """Return the statistics of an .npz, and its images if there is a directory to unpack them to.

    Raises:
        ArtifactError: see `read_npz`; or it has neither statistics nor two images.
    """
    held, sha256 = read_npz(path), file_sha256(path)
    if held.pooled is None and held.num_images < MIN_IMAGES:
        raise ArtifactError(f"{path}: expected two reference images or more, found {held.num_images}.")
    images = unpack_images(path, sha256, kept, progress) if kept is not None and held.num_images else []
    config: dict[str, int] = {} if held.pooled is None else {"dimensions": len(held.pooled.mean)}
    config |= {"images": held.num_images} if held.num_images else {}
    ref = InputRef(kind="statistics", fingerprint=sha256, path=str(path), config=config)
    return Reference("npz" if images else "statistics", str(path), ref, images, statistics=held)


def require_extractor(reference: Reference, dimensions: int, extractor: str) -> None:
    """Check that statistics are of the features of the extractor.

    Raises:
        UsageError: they are of other features.
    """
    held = reference.statistics
    if held is None or held.pooled is None:
        return
    if (named := held.extractor or INCEPTION) != extractor:
        raise UsageError(
            f"{reference.path}: holds statistics of {named}, but the extractor is {extractor}. With ADM's, "
            f"--set evaluation.extractor.kind=inception; others may name theirs in an array {EXTRACTOR}."
        )
    if len(held.pooled.mean) != dimensions:
        raise UsageError(
            f"{reference.path}: holds statistics of {len(held.pooled.mean)} dimensions, but {extractor} gives "
            f"{dimensions}."
        )


@dataclass(frozen=True)
class RealSets:
    """Real images of a reference: the reference, the floor, and the originals of reconstructions; may be empty."""

    reference: list[ImageRef]
    heldout: list[ImageRef]
    reconstructed: list[ImageRef]
    size: int
    class_names: list[str] | None

    @classmethod
    def of(cls, source: Reference, config: EvaluationSection, size: int) -> RealSets:
        """Choose the images of a reference.

        Returns:
            The three sets.
        """
        reference = source.choose("train", config.reference_images)
        floor = source.choose("heldout", config.num_samples)
        enough = source.count("heldout") >= MIN_IMAGES
        reconstructed = floor if enough else source.choose("train", config.num_samples)
        return cls(
            reference, floor, reconstructed, size, None if source.class_names is None else list(source.class_names)
        )
