"""`svgpipe plan`: estimate of an extraction, from a sample of the shards and the real encoder."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from pydantic import Field

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.feature_store import INT8_LIMIT, ZSTD_LEVEL
from svgpipe.manifests.filesystem import Location
from svgpipe.manifests.manifest import FrozenModel
from svgpipe.manifests.model_manifests import AutoencoderManifest
from svgpipe.manifests.recipe import ExtractSection
from svgpipe.manifests.selection import choose_evenly, evenly_spread
from svgpipe.manifests.shards import ShardSet

from ..runtime.device import pick_device
from ..runtime.progress import Progress, Silent
from .align import needs_alignment
from .cpu_tasks import ReadImages, UnitRows
from .encoder_actor import EncoderOptions, EncodeUnits
from .quantization import int8_scales

# Overhead of every inner chunk: crc32c and index entry.
CHUNK_OVERHEAD = 4 + 16
CPU_BATCH = 4


class ExtractCost(FrozenModel):
    """An estimate. Times are of one worker on this machine. Sizes are exact for float16, sampled for int8."""

    num_images: int
    num_views: int
    sampled_images: int
    shard_bytes: int
    row_shape: tuple[int, int, int]
    read_s: float = Field(description="Seconds per image, one core.")
    decode_s: float = Field(description="Seconds per image, one core.")
    encode_s: float = Field(description="Seconds per image, all views, one worker.")
    bytes_per_row: dict[str, float] = Field(description="Bytes per sample and view, by dtype.")
    gigabytes_per_view: dict[str, float] = Field(description="10^9 bytes of the whole cache, by dtype.")
    num_workers: int
    hours: float = Field(description="Time with this number of encoders, all of them busy.")
    reader_cores: int = Field(description="CPU cores that decode images fast enough for these encoders.")
    deadline_hours: float | None
    workers_for_deadline: int | None = Field(description="Encoders needed for the deadline.")


def estimate_cost(
    shards: ShardSet,
    autoencoder: Location,
    config: ExtractSection,
    *,
    sample: int = 64,
    num_workers: int = 1,
    deadline_hours: float | None = None,
    progress: Progress | None = None,
) -> ExtractCost:
    """Encode `sample` evenly spread images of the shards on this machine, and extrapolate.

    Args:
        shards: shard set to extract.
        autoencoder: finished autoencoder.
        config: section `extract` of a recipe.
        sample: number of images to encode.
        num_workers: number of encoders for the time estimate.
        deadline_hours: available time for the estimate of the number of encoders; None: no such estimate.
        progress: receives the progress.

    Returns:
        The estimate.

    Raises:
        ArtifactError: no image, or no image of the sample can be decoded.
    """
    encoder = AutoencoderManifest.read(autoencoder)
    usable = np.flatnonzero(~shards.rows.rejected)
    rows = choose_evenly(usable.tolist(), sample)
    if not rows:
        raise ArtifactError(f"{shards.directory}: expected images, found none.")
    # On a CPU, large batches are not faster and need more memory.
    batch = min(config.batch_size if pick_device().type == "cuda" else CPU_BATCH, len(rows))
    rows = rows[: len(rows) // batch * batch]
    (progress or Silent()).say(f"encoding {len(rows)} of {len(shards)} images")
    aligned = not needs_alignment(autoencoder, encoder)
    options = EncoderOptions(autoencoder, batch, config.precision, config.compile, views=config.views, aligned=aligned)
    features, read_s, decode_s, encode_s = _encode_sample(ReadImages(shards, encoder.image_size), rows, options)
    bytes_per_row, hours = _bytes_per_row(features), len(shards) * encode_s / 3600
    return ExtractCost(
        num_images=len(shards),
        num_views=len(config.views),
        sampled_images=len(rows),
        shard_bytes=sum(shard.num_bytes for shard in shards.shards),
        row_shape=(*encoder.grid, features.shape[-1]),
        read_s=read_s,
        decode_s=decode_s,
        encode_s=encode_s,
        bytes_per_row=bytes_per_row,
        gigabytes_per_view={dtype: len(shards) * size / 1e9 for dtype, size in bytes_per_row.items()},
        num_workers=num_workers,
        hours=hours / num_workers,
        reader_cores=max(1, math.ceil((read_s + decode_s) / encode_s * num_workers)),
        deadline_hours=deadline_hours,
        workers_for_deadline=None if deadline_hours is None else max(1, math.ceil(hours / deadline_hours)),
    )


def _encode_sample(
    read: ReadImages, rows: list[int], options: EncoderOptions
) -> tuple[NDArray[Any], float, float, float]:
    """Return features (n,view,row,column,channel) of `rows`, and seconds per image for read, decode and encode."""
    unit = read(UnitRows(0, rows))
    seconds = unit.timings[0].seconds
    worker = EncodeUnits(pick_device(), options)
    worker.encode(unit.pixels[: options.batch_size])
    started = time.perf_counter()
    features = worker.encode(unit.pixels)
    encode_s = (time.perf_counter() - started) / len(rows)
    read_s, decode_s = (seconds.get(phase, 0.0) / len(rows) for phase in ("read", "decode"))
    return features, read_s, decode_s, encode_s


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
