"""CPU steps of sampling and decoding: read inputs, write latents and images; and the records that they pass.

Separate from the GPU steps, so that processes for these steps need not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.index import ImageRef
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.shard_writer import TarImage, write_tar
from svgpipe.manifests.shards import shard_name
from svgpipe.manifests.store_spec import StoreSpec, unit_name

from ..images.decode import RGBArray, centre_crop, decode_member, encode_png, to_array

DECODE_JOURNAL = "journal/decode"


@dataclass(frozen=True)
class LatentsUnit:
    """An outer shard of the latents of one setting: number of the setting in the sweep, and of the shard."""

    setting: int
    unit: int


@dataclass(frozen=True)
class SampledUnit:
    """Sampled latents (n,1,row,column,channel) float16 of a unit."""

    setting: int
    unit: int
    latents: NDArray[np.float16]


@dataclass(frozen=True)
class ImageUnit:
    """One tar of decoded images, from stored latents, from real images, or, without either, from noise."""

    set_name: str
    shard: int  # in its set
    indices: Sequence[int]
    labels: Sequence[int]
    store: Location | None = None
    originals: Sequence[ImageRef] = ()
    residual: bool = True  # real images: False encodes them without the residual branch
    noise: float = 0.0  # real images: added to their latents, in deviations of the channel

    @property
    def name(self) -> str:
        """Name in the journal."""
        return f"{self.set_name}-{self.shard:06d}"


@dataclass(frozen=True)
class ImageSources:
    """Input of a unit: latents (n,row,column,channel) float32, or crops (n,S,S,3), or None for noise."""

    unit: ImageUnit
    latents: NDArray[np.float32] | None = None
    pixels: RGBArray | None = None


@dataclass(frozen=True)
class DecodedUnit:
    """Decoded images (n,H,W,3) of a unit."""

    unit: ImageUnit
    images: RGBArray


def pass_on(unit: LatentsUnit) -> LatentsUnit:
    """Return the unit: there is nothing to read."""
    return unit


@dataclass(frozen=True)
class WriteLatents:
    """Writes one outer shard of one setting, then its record in the journal of the store."""

    paths: list[Location]
    specs: list[StoreSpec]

    def __call__(self, sampled: SampledUnit) -> LatentsUnit:
        store = FeatureStore(self.paths[sampled.setting], self.specs[sampled.setting])
        store.write_unit(sampled.unit, np.ascontiguousarray(sampled.latents))
        Journal(store.path).record(sampled.unit, {"rows": len(sampled.latents)}, {unit_name(sampled.unit): None})
        return LatentsUnit(sampled.setting, sampled.unit)


def _latents(store: FeatureStore, indices: Sequence[int]) -> NDArray[np.float32]:
    """Return latents of a store.

    Raises:
        ArtifactError: a file of the right size is damaged. (Files of another size were sampled again.)
    """
    try:
        return store.read(indices).astype(np.float32)
    except ArtifactError as error:
        files = ", ".join(str(store.unit_file(unit)) for unit in sorted({i // store.spec.unit_rows for i in indices}))
        raise ArtifactError(f"{error} Delete {files}; the same command then samples it again.") from error


@dataclass(frozen=True)
class ReadForDecoding:
    """Reads latents of a store, or crops of real images, or nothing for noise."""

    size: int

    def __call__(self, unit: ImageUnit) -> ImageSources:
        if unit.store is not None:
            return ImageSources(unit, latents=_latents(FeatureStore.open(unit.store), unit.indices))
        if unit.originals:
            images = (decode_member(ref) for ref in unit.originals)
            return ImageSources(unit, pixels=np.stack([to_array(centre_crop(image, self.size)) for image in images]))
        return ImageSources(unit)


@dataclass(frozen=True)
class WriteImages:
    """Writes one tar, then its journal record."""

    out: Location

    def __call__(self, decoded: DecodedUnit) -> str:
        unit = decoded.unit
        members = [
            TarImage(f"{index:08d}", encode_png(pixels), "png", label)
            for index, label, pixels in zip(unit.indices, unit.labels, decoded.images, strict=True)
        ]
        folder = f"images/{unit.set_name}"
        shard = write_tar(self.out / folder, shard_name(unit.shard), members, "train")
        files = {f"{folder}/{name}": sha256 for name, sha256 in shard.files.items()}
        Journal(self.out, DECODE_JOURNAL).record(unit.name, {"set": unit.set_name, "shard": shard.model_dump()}, files)
        return unit.name
