"""Features of sets of images, kept by the content of images and network, where evaluations share them.

POOL/features/KEY.safetensors           features of one set; KEY.json is the journal record, with the hash of the file
POOL/features/parts-KEY/NUMBER.safetensors    of a part of a set that is not complete, with their journal

A part is a unit of work: a large set is extracted by several workers, and a kill does not lose hours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import (
    ABANDONED_S,
    Location,
    absolute,
    make_directory,
    remove_partials,
    remove_tree,
)
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import digest

from ..images.decode import RGBArray
from ..images.image_set import ImageSet
from ..runtime.progress import Progress
from ..runtime.runner import LocalRunner, Runner, Steps
from .features import Extractor

FOLDER = "features"
PART = 500  # images per unit


@dataclass(frozen=True)
class FeaturePart:
    """Unit of work: some images of a set, and where their features go."""

    folder: Location
    number: int
    refs: Sequence[ImageRef]
    size: int

    @property
    def file(self) -> str:
        """Name of the file of the features."""
        return f"{self.number:06d}.safetensors"


@dataclass(frozen=True)
class _Pixels:
    part: FeaturePart
    images: RGBArray  # (n,H,W,3)


@dataclass(frozen=True)
class _Computed:
    part: FeaturePart
    features: dict[str, Tensor]  # (n,D) float32 on the CPU, by layer


def extracted(
    pool: Location, images: ImageSet, extractor: Extractor, batch_size: int, runner: Runner | None = None
) -> dict[str, Tensor]:
    """Return the features of a set (n,D) float32 by layer, kept or computed now.

    Args:
        pool: directory that evaluations share.
        images: the set.
        extractor: feature extractor.
        batch_size: images per forward pass.
        runner: where parts are computed; default: in this process.
    """
    key = _key(images, extractor)
    if not _is_kept(pool, key):
        extract_sets(pool, [images], extractor, batch_size, runner or LocalRunner())
    return load_tensors(pool / FOLDER / f"{key}.safetensors")


def extract_sets(
    pool: Location,
    sets: Sequence[ImageSet],
    extractor: Extractor,
    batch_size: int,
    runner: Runner,
    progress: Progress | None = None,
) -> None:
    """Compute the features of all sets that are not kept in `pool` yet; run again to resume.

    The arguments are those of `extracted`; `progress` counts images.
    """
    missing = {key: images for images in sets if not _is_kept(pool, key := _key(images, extractor))}
    parts = [part for key, images in missing.items() for part in _missing_parts(pool, key, images)]
    total = sum(len(images) for images in missing.values())
    if progress is not None:
        progress.begin("features", total, "images", total - sum(len(part.refs) for part in parts))
    make_worker = _MakeWorker(extractor.source, extractor, batch_size)
    for count in runner.run(parts, Steps(_read, make_worker, _write)):
        if progress is not None:
            progress.advance(count)
    for key, images in missing.items():
        _merge(pool, key, images)


def _key(images: ImageSet, extractor: Extractor) -> str:
    return digest([images.digest, extractor.description.model_dump(), extractor.layers])[:16]


def _is_kept(pool: Location, key: str) -> bool:
    """Return whether features are there and were not altered."""
    with suppress(ArtifactError):
        Journal(pool, FOLDER).check(key, deep=True)
        return True
    return False


def _missing_parts(pool: Location, key: str, images: ImageSet) -> list[FeaturePart]:
    make_directory(pool / FOLDER)
    remove_partials(pool / FOLDER, idle_s=ABANDONED_S)
    folder = absolute(pool / FOLDER / f"parts-{key}")
    starts = range(0, len(images), PART)
    parts = [FeaturePart(folder, i, images.refs[s : s + PART], images.size) for i, s in enumerate(starts)]
    missing = set(Journal(folder).missing(range(len(parts)), deep=True))
    return [part for part in parts if part.number in missing]


def _read(part: FeaturePart) -> _Pixels:
    return _Pixels(part, ImageSet(part.refs, part.size).all_pixels())


@dataclass(frozen=True)
class _MakeWorker:
    """Builds the step that computes. A worker in another process loads the network itself: weights are not sent."""

    source: Callable[[], Extractor]
    loaded: Extractor | None
    batch_size: int

    def __reduce__(self) -> tuple[type[_MakeWorker], tuple[Callable[[], Extractor], None, int]]:
        return _MakeWorker, (self.source, None, self.batch_size)

    def __call__(self, device: torch.device) -> Callable[[_Pixels], _Computed]:
        extractor = self.loaded or self.source()
        extractor.module.to(device)
        return lambda pixels: _Computed(pixels.part, extractor.features(pixels.images, self.batch_size))


def _write(computed: _Computed) -> int:
    part = computed.part
    make_directory(part.folder)
    sha256 = save_tensors(part.folder / part.file, computed.features)
    Journal(part.folder).record(part.number, {"images": len(part.refs)}, {part.file: sha256})
    return len(part.refs)


def _merge(pool: Location, key: str, images: ImageSet) -> None:
    """Write the features of a set from its parts, and remove these. Another evaluation may have done it already."""
    if _is_kept(pool, key):
        remove_tree(pool / FOLDER / f"parts-{key}")
        return
    folder, count = pool / FOLDER / f"parts-{key}", -(-len(images) // PART)
    journal = Journal(folder)
    pieces = [load_tensors(folder / f"{i:06d}.safetensors", journal.files(i)[0].sha256) for i in range(count)]
    features = {layer: torch.cat([piece[layer] for piece in pieces]) for layer in pieces[0]}
    name = f"{FOLDER}/{key}.safetensors"
    Journal(pool, FOLDER).record(key, {}, {name: save_tensors(pool / name, features)})
    remove_tree(folder)
