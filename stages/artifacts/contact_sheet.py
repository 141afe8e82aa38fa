"""Pictures of rows of a cache: source, features, residual, reconstruction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.cache import FeatureCache
from svgpipe.manifests.errors import ArtifactError, SvgpipeError
from svgpipe.manifests.manifest import require_same
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.selection import choose_evenly, evenly_spread
from svgpipe.manifests.shards import ShardSet

from ..images.decode import RGBArray, tile
from ..images.stream import load_images
from ..networks.autoencoder import latent_decoder

# Standard deviations at the ends of the colour scale.
COLOUR_RANGE = 2.5
BINS = 81
HISTOGRAM_RANGE = 5.0
# Rows for the distributions, evenly spread, and rows per read.
HISTOGRAM_ROWS, HISTOGRAM_READ = 1024, 64


@dataclass(frozen=True)
class SheetRow:
    """One sample. A picture is None if `ContactSheet.missing` says why."""

    row: int
    class_name: str
    heldout: bool
    source: RGBArray | None
    features: RGBArray  # the first three principal components of the first group of channels as red, green, blue
    residual: RGBArray | None  # every residual channel, side by side
    decoded: RGBArray | None


@dataclass(frozen=True)
class ContactSheet:
    """Some samples of a cache, and the distribution of each channel over many more."""

    rows: list[SheetRow]
    histogram: NDArray[np.float64]  # (channel, bin) fractions, bins over ±HISTOGRAM_RANGE, ends included
    histogram_rows: int  # number of valid rows, original view
    missing: list[str]


def contact_sheet(cache: FeatureCache, count: int) -> ContactSheet:
    """Return pictures of at most `count` valid rows, classes in turn, with one PCA for all.

    Raises:
        ArtifactError: the cache has no valid row.
    """
    chosen = _classes_in_turn(cache, count)
    if not chosen:
        raise ArtifactError(f"{cache.path}: expected a valid row to show, found none.")
    features = cache.read_latents(chosen).astype(np.float32)
    groups = cache.manifest.channel_groups
    colours = _principal_colours(features[..., next(iter(groups.values()))])
    residual = _residual_maps(features[..., groups["residual"]]) if "residual" in groups else None
    missing: list[str] = []
    sources = _sources(cache, chosen, missing)
    decoded = _decoded(cache, features, missing)
    rows = [
        SheetRow(
            row=row,
            class_name=cache.classes[int(cache.labels[row])],
            heldout=bool(cache.heldout[row]),
            source=None if sources is None else sources[i],
            features=colours[i],
            residual=None if residual is None else residual[i],
            decoded=None if decoded is None else decoded[i],
        )
        for i, row in enumerate(chosen)
    ]
    usable = np.flatnonzero(cache.valid)
    spread = usable[evenly_spread(len(usable), HISTOGRAM_ROWS)]
    return ContactSheet(rows, _histogram(cache, spread), len(spread), missing)


def _classes_in_turn(cache: FeatureCache, count: int) -> list[int]:
    """Return evenly spread rows of every class, or of evenly spread classes if there are many."""
    usable = np.flatnonzero(cache.valid)
    present = np.unique(cache.labels[usable])
    classes = present[evenly_spread(len(present), count)]
    per_class = max(1, count // max(1, len(classes)))
    rows: list[int] = []
    for label in classes:
        members = usable[cache.labels[usable] == label]
        rows += choose_evenly(members.tolist(), per_class)
    return rows[:count]


def _principal_colours(features: NDArray[np.float32]) -> RGBArray:
    """(n,h,w,C) → (n,h,w,3): projections on the first three principal components of all vectors.

    Returns:
        The projections.
    """
    flat = features.reshape(-1, features.shape[-1]).astype(np.float64)
    centred = flat - flat.mean(axis=0)
    _, axes = np.linalg.eigh(centred.T @ centred)
    axes = axes[:, ::-1][:, :3]
    # The sign of an eigenvector is arbitrary. Its largest entry decides, so that colours do not flip between runs.
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])
    projected = centred @ axes
    projected /= np.maximum(projected.std(axis=0), 1e-12)
    colours = np.zeros((*features.shape[:-1], 3), np.uint8)
    colours[..., : axes.shape[1]] = _as_shades(projected).reshape(*features.shape[:-1], -1)
    return colours


def _residual_maps(residual: NDArray[np.float32]) -> list[RGBArray]:
    """(n,h,w,R) → one picture each: R grey maps in rows of at most four, separated by white lines.

    Returns:
        The pictures.
    """
    framed = np.pad(_as_shades(residual), ((0, 0), (0, 1), (0, 1), (0, 0)), constant_values=255)
    channels = residual.shape[-1]
    return [tile(np.repeat(np.moveaxis(sample, -1, 0)[..., None], 3, axis=-1), min(4, channels)) for sample in framed]


def _as_shades(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    return np.clip((values / COLOUR_RANGE + 1) * 127.5, 0, 255).astype(np.uint8)


def _histogram(cache: FeatureCache, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    channels = cache.manifest.latent_shape[-1]
    counts = np.zeros(channels * BINS, np.int64)
    for start in range(0, len(rows), HISTOGRAM_READ):
        flat = cache.read_latents(rows[start : start + HISTOGRAM_READ]).astype(np.float32).reshape(-1, channels)
        places = np.clip((flat / HISTOGRAM_RANGE + 1) / 2 * BINS, 0, BINS - 1).astype(np.int64)
        counts += np.bincount((places + np.arange(channels) * BINS).ravel(), minlength=channels * BINS)
    return counts.reshape(channels, BINS) / max(1, counts[:BINS].sum())


def _sources(cache: FeatureCache, rows: Sequence[int], missing: list[str]) -> RGBArray | None:
    try:
        recorded = cache.manifest.input("shards")
        shards = ShardSet.of_input(recorded, cache.path)
        require_same(str(cache.path), recorded, shards.as_input(), what_to_do="")
        size = int(cache.manifest.input("autoencoder").config["image_size"])
        return load_images(shards, rows, size)
    except (SvgpipeError, OSError) as error:
        missing.append(f"source images: {str(error).splitlines()[0]}")
        return None


def _decoded(cache: FeatureCache, features: NDArray[np.float32], missing: list[str]) -> RGBArray | None:
    try:
        recorded = cache.manifest.input("autoencoder")
        place = recorded.place(cache.path)
        # Another autoencoder may be there by now. Its images would be taken for those of the cache.
        require_same(str(cache.path), recorded, AutoencoderManifest.read(place).as_input(place), what_to_do="")
        decode = latent_decoder(place)
    except (SvgpipeError, OSError) as error:
        missing.append(f"reconstructions: {str(error).splitlines()[0]}")
        return None
    return decode(cache.denormalize(features))
