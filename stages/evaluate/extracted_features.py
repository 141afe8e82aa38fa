"""Features of sets of images, kept by the content of images and network, where evaluations share them."""

from __future__ import annotations

from contextlib import suppress

import torch
from torch import Tensor

from svgpipe.manifests.checkpoint import load_tensors, save_tensors
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.filesystem import ABANDONED_S, Location, make_directory, remove_partials, remove_tree
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.manifest import digest

from ..images.image_set import ImageSet
from .features import Extractor

PART = 5000  # images: the unit of resume


def extracted(
    pool: Location, images: ImageSet, extractor: Extractor, batch_size: int, folder: str = "features"
) -> dict[str, Tensor]:
    """Return the features of a set, cached by the content of images and extractor.

    pool/features/DIGEST.safetensors    the features; DIGEST.json is their journal record, with the hash of the file

    Args:
        pool: directory that evaluations share.
        images: the set.
        extractor: feature extractor.
        batch_size: images per forward pass.
        folder: below `pool`; another one for the parts of a large set.
    """
    key = digest([images.digest, extractor.description.model_dump(), extractor.layers])[:16]
    journal, name = Journal(pool, folder), f"{folder}/{key}.safetensors"
    with suppress(ArtifactError):  # missing or altered: they are extracted again
        return load_tensors(pool / name, journal.files(key)[0].sha256)
    make_directory(journal.directory)
    remove_partials(journal.directory, idle_s=ABANDONED_S)
    # A large set is stored in parts, so that a kill does not lose hours of work.
    parts_folder = f"{folder}/parts-{key}"
    if len(images) <= PART:
        features = extractor.features(images, batch_size)
    else:
        parts = [ImageSet(images.refs[start : start + PART], images.size) for start in range(0, len(images), PART)]
        pieces = [extracted(pool, part, extractor, batch_size, parts_folder) for part in parts]
        features = {layer: torch.cat([piece[layer] for piece in pieces]) for layer in extractor.layers}
    journal.record(key, {}, {name: save_tensors(pool / name, features)})
    remove_tree(pool / parts_folder)
    return features
