"""Time to read 64 random rows of a cache, compared with three other ways to read the same numbers.

    .venv/bin/python -m tests.benchmarks.read [--rows 2048]

16x16x392 float16 rows, 200,704 bytes each, in outer shards of 256, with a warm page cache. The others:

- numpy memmap gather: the limit, without checksums and chunks;
- safetensors as in LightningDiT's latent loader: it opens the file for every row, reads latent and label, and torch
  collates the rows (its files hold 10,000 rows in float32; here they hold 256 in float16, which is faster to read);
- zarr-python's orthogonal indexing on the same store.

All are measured in turns within one run, so that noise affects all of them. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file

from svgpipe.manifests.feature_store import FeatureStore
from svgpipe.manifests.store_spec import StoreSpec

GRID, CHANNELS, UNIT, BATCH, TURNS = (16, 16), 392, 256, 64, 40

Rows = NDArray[np.int64]


def write_everything(root: Path, rows: int) -> tuple[FeatureStore, FeatureStore]:
    """The same features as a float16 store, an int8 store, a .npy file and safetensors files."""
    spec = StoreSpec(rows, ("original",), GRID, CHANNELS, UNIT, ("a",))
    zeros, ones = np.zeros(CHANNELS, np.float32), np.ones(CHANNELS, np.float32)
    store = FeatureStore.create(root / "float16", spec, zeros, ones)
    small_spec = StoreSpec(rows, ("original",), GRID, CHANNELS, UNIT, ("a",), "int8")
    small = FeatureStore.create(root / "int8", small_spec, zeros, ones, np.full(CHANNELS, 1 / 30, np.float32))
    plain = np.lib.format.open_memmap(root / "plain.npy", "w+", np.float16, (rows, *GRID, CHANNELS))
    rng = np.random.default_rng(0)
    for unit in range(spec.num_units):
        span = spec.rows_of(unit)
        values = rng.standard_normal(spec.shape_of(unit), np.float32).astype(np.float16)
        store.write_unit(unit, values)
        small.write_unit(unit, values)
        plain[span.start : span.stop] = values[:, 0]
        labels = torch.zeros(len(values), dtype=torch.int64)
        save_file({"latents": torch.from_numpy(values[:, 0]), "labels": labels}, root / f"{unit}.safetensors")
    plain.flush()
    return store, small


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    count = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        store, small = write_everything(root, count)
        plain = np.load(root / "plain.npy", mmap_mode="r")
        array = zarr.open_group(root / "float16", mode="r")["features"]
        assert isinstance(array, zarr.Array)

        def from_safetensors(rows: Rows) -> NDArray[np.float16]:
            result = []
            for row in rows.tolist():
                place = slice(row % UNIT, row % UNIT + 1)
                with safe_open(root / f"{row // UNIT}.safetensors", framework="pt", device="cpu") as file:
                    result.append((file.get_slice("latents")[place].squeeze(0), file.get_slice("labels")[place]))
            latents, _ = torch.utils.data.default_collate(result)
            return np.asarray(latents)

        readers: dict[str, Callable[[Rows], NDArray[np.float16]]] = {
            "numpy memmap gather (the limit)": lambda rows: np.asarray(plain[rows]),
            "svgpipe, float16": store.read,
            "svgpipe, float16, tensorstore": lambda rows: store._by_tensorstore(lambda a: a.vindex[rows, 0 * rows]),
            "svgpipe, int8 + zstd": small.read,
            "safetensors, reopened per row": from_safetensors,
            "zarr-python, orthogonal": lambda rows: np.asarray(array.oindex[rows, 0]),
        }
        rng = np.random.default_rng(1)
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for turn in range(TURNS + 2):
            for name, read in readers.items():
                rows = rng.integers(0, count, BATCH)
                started = time.perf_counter()
                found = read(rows)
                passed = time.perf_counter() - started
                if turn >= 2:
                    seconds[name].append(passed)
                elif "int8" not in name:
                    np.testing.assert_array_equal(found, plain[rows])
    medians = {name: float(np.median(values)) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:34}{value * 1e3:9.2f} ms per {BATCH} rows{BATCH / value:12,.0f} images/s")
    ours = medians["svgpipe, float16"]
    ratios = {
        "speedup_over_safetensors": medians["safetensors, reopened per row"] / ours,
        "speedup_over_zarr": medians["zarr-python, orthogonal"] / ours,
        "time_over_memmap": ours / medians["numpy memmap gather (the limit)"],
    }
    print(json.dumps({name: round(value, 2) for name, value in ratios.items()}))


if __name__ == "__main__":
    main()
