"""Comparison of small dtypes on one cache: bytes against error.

    .venv/bin/python -m tests.benchmarks.quantization CACHE

Every scheme packs single rows, like the chunks of the cache, compressed with zstd. It is judged by bytes (relative to
float16), by signal to noise, and by PSNR of its decoded images against those from float16. `CACHE` is a finished
float16 cache whose autoencoder is at its recorded path. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
from numcodecs.bitround import BitRound
from numcodecs.shuffle import Shuffle
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.selection import evenly_spread
from svgpipe.stages.extract.quantization import int8_scales, signal_to_noise
from svgpipe.stages.images.decode import psnr
from svgpipe.stages.networks.autoencoder import latent_decoder

ROWS = 192
# The 16 levels of NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E), for values within ±1.
NF4_BELOW = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105)
NF4_ABOVE = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0)
NF4 = np.asarray([*NF4_BELOW, 0.0, *NF4_ABOVE], np.float32)
ZSTD = Zstd(level=3)

Packed = tuple[list[bytes], NDArray[np.float32]]
Values = NDArray[np.float32]


def int8(values: Values, scale: Values) -> Packed:
    """Uniform steps."""
    steps = np.clip(np.rint(values / scale), -127, 127).astype(np.int8)
    return [ZSTD.encode(row) for row in steps], steps * scale


def float8(values: Values, kind: str) -> Packed:
    """Eight-bit floating point."""
    small = values.astype(getattr(ml_dtypes, kind))
    return [ZSTD.encode(row.view(np.uint8)) for row in small], small.astype(np.float32)


def nf4(values: Values) -> Packed:
    """Four bits per value and one float16 scale per vector of channels."""
    scale = np.abs(values).max(axis=-1, keepdims=True).astype(np.float16).astype(np.float32)
    edges = (NF4[1:] + NF4[:-1]) / 2
    codes = np.searchsorted(edges, values / np.maximum(scale, 1e-6)).astype(np.uint8)
    pairs = codes[..., ::2] << 4 | codes[..., 1::2]
    rows = [ZSTD.encode(p) + ZSTD.encode(s.astype(np.float16)) for p, s in zip(pairs, scale, strict=True)]
    return rows, NF4[codes] * scale


def bit_round(values: Values, bits: int) -> Packed:
    """float16 with that many mantissa bits kept, bytes shuffled."""
    rounded = [BitRound(keepbits=bits).encode(row.astype(np.float16)) for row in values]
    shuffle = Shuffle(elementsize=2)
    kept = np.stack(rounded).view(np.float16).reshape(values.shape)
    return [ZSTD.encode(shuffle.encode(np.ascontiguousarray(row))) for row in kept], kept.astype(np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cache")
    cache = FeatureCache(parser.parse_args().cache)
    usable = np.flatnonzero(cache.valid)
    rows = [int(usable[i]) for i in evenly_spread(len(usable), ROWS)]
    values = cache.read(rows).astype(np.float32)
    flat = values.reshape(-1, values.shape[-1])
    best, largest = int8_scales(flat), np.abs(flat).max(axis=0) / 127
    schemes: dict[str, Callable[[], Packed]] = {
        "int8, steps of least error (svgpipe)": lambda: int8(values, best),
        "int8, steps by the largest value": lambda: int8(values, largest),
        "int8, steps of least error × 2": lambda: int8(values, best * 2),
        "float8 e4m3": lambda: float8(values, "float8_e4m3fn"),
        "float8 e3m4": lambda: float8(values, "float8_e3m4"),
        "NF4, a scale per vector": lambda: nf4(values),
        **{f"float16 rounded to {bits} bits": partial(bit_round, values, bits) for bits in (6, 5, 4, 3)},
    }
    decode = latent_decoder(cache.manifest.inputs["autoencoder"].place(cache.path))
    expected = decode(cache.denormalize(values))
    found: dict[str, dict[str, float]] = {}
    for name, scheme in schemes.items():
        packed, restored = scheme()
        between = psnr(expected, decode(cache.denormalize(restored)))
        found[name] = {
            "bytes": sum(map(len, packed)) / (values.size * 2),
            "signal_to_noise": signal_to_noise(values, restored),
            "decoded_psnr": float(np.minimum(between, 100).mean()),
        }
    print(f"{'scheme, all with zstd':40}{'bytes':>8}{'signal to noise':>18}{'decoded PSNR':>15}")
    for name, row in found.items():
        print(f"{name:40}{row['bytes']:8.3f}{row['signal_to_noise']:15.1f} dB{row['decoded_psnr']:12.1f} dB")
    print(json.dumps({name: {k: round(v, 3) for k, v in row.items()} for name, row in found.items()}))


if __name__ == "__main__":
    main()
