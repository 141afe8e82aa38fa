"""CPU steps of an extraction: read and decode, write, collect statistics; and the records that they pass.

Separate from the encoder, so that processes for these steps need not load torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests.cache_writer import write_unit
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import Features, FeatureStore
from svgpipe.manifests.filesystem import absolute
from svgpipe.manifests.index import ImageRef, read_images
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.moments import Moments
from svgpipe.manifests.rejects import Reject
from svgpipe.manifests.shards import ShardSet

from ..images.decode import RejectedImageError, RGBArray, centre_crop, decode_image, to_array
from .timings import Stopwatch, Timing
from .vision_source import VisionSource


@dataclass(frozen=True)
class UnitRows:
    """A unit to extract: its number, and its rows in the shard set."""

    unit: int
    rows: Sequence[int]


@dataclass(frozen=True)
class UnitPixels:
    """Decoded crops (n,S,S,3) of a unit; zeros for rejected images. `vision`: see `VisionSource.read`."""

    unit: int
    pixels: RGBArray
    rejects: tuple[Reject, ...]
    timings: tuple[Timing, ...]
    vision: Features | None = None


@dataclass(frozen=True)
class UnitFeatures:
    """Features (n,view,row,column,channel) of a unit: float16 normalised, or float32 as encoded."""

    unit: int
    features: NDArray[Any]
    rejects: tuple[Reject, ...]
    timings: tuple[Timing, ...]

    @property
    def valid(self) -> NDArray[np.bool_]:
        """(n,) False for rejected images."""
        valid = np.ones(len(self.features), bool)
        valid[[reject.row for reject in self.rejects]] = False
        return valid


@dataclass(frozen=True)
class UnitWritten:
    """A unit that was written."""

    unit: int
    rejects: tuple[Reject, ...]
    timings: tuple[Timing, ...]


@dataclass(frozen=True)
class UnitMoments:
    """Statistics of a unit of the calibration pass, and some of its vectors (m,C)."""

    unit: int
    moments: Moments
    sample: NDArray[np.float32]


class ReadImages:
    """Reads ranges, decodes, and crops like ADM. Opens only the indexes of the tars that a unit needs.

    With a `source`, it also reads the vision features that are there.
    """

    def __init__(self, shards: ShardSet, image_size: int, source: VisionSource | None = None) -> None:
        self.shards, self.image_size, self.source = shards.absolute(), image_size, source

    def __call__(self, unit: UnitRows) -> UnitPixels:
        watch = Stopwatch("reader")
        with watch.phase("read"):
            refs = self.shards.refs(list(unit.rows))
            datas = iter(read_images([ref for ref in refs if ref.reject is None]))
        pixels = np.zeros((len(refs), self.image_size, self.image_size, 3), np.uint8)
        rejects = []
        for row, ref in enumerate(refs):
            try:
                if ref.reject is not None:
                    raise RejectedImageError(ref.reject)
                data = _again_if_altered(ref, next(datas))
                with watch.phase("decode"):
                    image = decode_image(data, damaged=ref.damaged)
                    pixels[row] = to_array(centre_crop(image, self.image_size))
            except RejectedImageError as error:
                rejects.append(Reject(row, str(ref.tar), ref.offset, ref.key, str(error)))
        vision = None
        if self.source is not None:
            with watch.phase("read"):
                vision = self.source.read(unit.rows, [reject.row for reject in rejects])
        return UnitPixels(unit.unit, pixels, tuple(rejects), (watch.timing(),), vision)


def _again_if_altered(ref: ImageRef, data: bytes | ArtifactError) -> bytes:
    """Return the indexed bytes.

    They are read twice before a reject, because a network file system may give a short read.

    Raises:
        RejectedImageError: the bytes are not the indexed ones.
    """
    if isinstance(data, bytes):
        return data
    try:
        return ref.read()
    except ArtifactError as error:
        raise RejectedImageError(f"other bytes than indexed: {error}") from error


class WriteUnit:
    """Writes one outer shard, then its journal record."""

    def __init__(self, store: FeatureStore) -> None:
        self.path, self.spec = absolute(store.path), store.spec

    def __call__(self, encoded: UnitFeatures) -> UnitWritten:
        store, journal = FeatureStore(self.path, self.spec), Journal(self.path)
        # Ray runs a task twice if a node seemed lost. The bytes of the first run are then already recorded.
        if journal.find(encoded.unit) is not None:
            return UnitWritten(encoded.unit, encoded.rejects, encoded.timings)
        watch = Stopwatch("writer")
        features = np.ascontiguousarray(encoded.features)
        write_unit(store, journal, encoded.unit, features, encoded.rejects, watch.phase)
        return UnitWritten(encoded.unit, encoded.rejects, (*encoded.timings, watch.timing()))


@dataclass(frozen=True)
class CollectMoments:
    """Step of the calibration pass: statistics, and `sampled_vectors` to choose int8 steps on, instead of a write."""

    sampled_vectors: int

    def __call__(self, encoded: UnitFeatures) -> UnitMoments:
        features = encoded.features[encoded.valid]
        flat = features.reshape(-1, features.shape[-1])
        chosen = np.linspace(0, len(flat) - 1, min(self.sampled_vectors, len(flat))).round().astype(int)
        return UnitMoments(encoded.unit, Moments.of(features), np.ascontiguousarray(flat[chosen]))
