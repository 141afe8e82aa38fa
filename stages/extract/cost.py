"""`svgpipe plan`: what an extraction will take, from a sample of the real shards and the real encoder."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from svgpipe.manifests.checkpoint import AutoencoderManifest
from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import INT8_LIMIT, ZSTD_LEVEL
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.recipe import ExtractSection
from svgpipe.manifests.shards import ShardSet

from ..runtime.device import pick_device
from ..runtime.progress import Progress, Silent
from ..runtime.selection import choose_evenly, evenly_spread
from .align import needs_alignment
from .cpu_tasks import ReadImages, UnitRows
from .encoder_actor import EncoderOptions, EncodeUnits
from .quantization import int8_scales

# crc32c and index entry of every inner chunk.
CHUNK_OVERHEAD = 4 + 16
CPU_BATCH = 4


@dataclass(frozen=True)
class ExtractCost:
    """An estimate. Seconds are of this machine's one worker; bytes are exact for float16, sampled for int8."""

    num_images: int
    num_views: int
    sampled_images: int
    shard_bytes: int
    row_shape: tuple[int, int, int]
    read_s: float  # per image, one core
    decode_s: float  # per image, one core
    encode_s: float  # per image, all views, one worker
    bytes_per_row: dict[str, float]  # per sample and view, by dtype

    def hours(self, workers: int) -> float:
        """With that many encoders like this machine's, all of them kept busy."""
        return self.num_images * self.encode_s / workers / 3600

    def reader_cores(self, workers: int) -> int:
        """CPU cores that keep so many encoders busy with decoded images."""
        return max(1, math.ceil((self.read_s + self.decode_s) / self.encode_s * workers))

    def workers_for(self, hours: float) -> int:
        """Encoders needed to be done within `hours`."""
        return max(1, math.ceil(self.hours(1) / hours))

    def gigabytes(self, dtype: str) -> float:
        """Of one view of the whole cache, in units of 10^9 bytes."""
        return self.num_images * self.bytes_per_row[dtype] / 1e9


def estimate_cost(
    shards: ShardSet,
    autoencoder: Location,
    config: ExtractSection,
    *,
    sample: int = 64,
    progress: Progress | None = None,
) -> ExtractCost:
    """Encode `sample` evenly spread images of the real shards here, and count what there is.

    Raises:
        ArtifactError: no image, or none of the sample can be decoded.
    """
    progress = progress or Silent()
    encoder = AutoencoderManifest.read(autoencoder)
    usable = np.flatnonzero(~shards.rows.rejected)
    rows = choose_evenly(usable.tolist(), sample)
    if not rows:
        raise ArtifactError(f"{shards.directory}: expected images to plan for, found none.")
    # A CPU is no faster in large batches, and needs their memory.
    batch = min(config.batch_size if pick_device().type == "cuda" else CPU_BATCH, len(rows))
    rows = rows[: len(rows) // batch * batch]
    progress.say(f"encoding {len(rows)} of {len(shards)} images")
    read = ReadImages(shards, encoder.image_size)(UnitRows(0, rows))
    seconds = read.timings[0].seconds
    options = EncoderOptions(
        autoencoder,
        batch,
        config.precision,
        config.compile,
        views=config.views,
        aligned=not needs_alignment(autoencoder, encoder),
    )
    worker = EncodeUnits(pick_device(), options)
    pixels = read.pixels
    worker.encode(pixels[:batch])
    started = time.perf_counter()
    features = worker.encode(pixels)
    encode_s = (time.perf_counter() - started) / len(rows)
    rows_, columns, channels = encoder.grid[0], encoder.grid[1], features.shape[-1]
    return ExtractCost(
        num_images=len(shards),
        num_views=len(config.views),
        sampled_images=len(rows),
        shard_bytes=sum(shard.num_bytes for shard in shards.shards),
        row_shape=(rows_, columns, channels),
        read_s=seconds.get("read", 0.0) / len(rows),
        decode_s=seconds.get("decode", 0.0) / len(rows),
        encode_s=encode_s,
        bytes_per_row=_bytes_per_row(features),
    )


def _bytes_per_row(features: NDArray[Any]) -> dict[str, float]:
    tile = features[0, 0]
    flat = features.reshape(-1, features.shape[-1]).astype(np.float32)
    std = flat.std(axis=0)
    normalised = (flat - flat.mean(axis=0)) / np.where(std > 0, std, 1)
    scale = int8_scales(normalised[evenly_spread(len(normalised), 8192)])
    steps = np.clip(np.rint(normalised / scale), -INT8_LIMIT, INT8_LIMIT).astype(np.int8)
    codec = Zstd(level=ZSTD_LEVEL)
    packed = [len(codec.encode(row)) for row in steps.reshape(-1, tile.size)]
    return {
        "float16": tile.size * 2 + CHUNK_OVERHEAD,
        "int8": float(np.mean(packed)) + CHUNK_OVERHEAD,
    }
