"""Everyday operations at the size of ImageNet: 1,281,167 rows, 1,000 classes, 5,005 units, 1,000 tars.

    .venv/bin/python -m tests.benchmarks.scale [--rows N]

The cache has a grid of one token with 392 channels, so that its records and statistics have their real size. All tars
of the shard set are links to one real tar. Each operation runs in its own process; seconds include its imports, and
memory is the peak of the process. The files were written just before, so they are in the page cache. The last line is
JSON: seconds and memory as fractions of the limits, 10 s and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.recipe import ShardSection
from svgpipe.manifests.shards import ShardSet
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.shard.scan import ImageSources

from .extract import write_images
from .plan import ROWS, TARS, repeated

CLASSES, CHANNELS, BATCH = 1_000, 392, 4_096
LIMIT_S, LIMIT_GB = 10.0, 2.0
COMMAND = "import sys; from svgpipe.pipeline.cli import main; assert main(sys.argv[1:]) == 0"
CACHE = "import sys; from svgpipe.manifests import FeatureCache; cache = FeatureCache(sys.argv[1]); "
BATCHES = "from svgpipe.stages.train_diffusion.order import batch_at; rows = cache.training_rows; "
READ = (
    "batch = batch_at({step}, seed=1, batch_size=256, num_rows=len(rows), num_views=2); "
    "cache.read_stored(rows[batch.rows], batch.views); cache.labels[rows[batch.rows]]"
)
REFERENCE = (
    "import sys; from svgpipe.stages.evaluate.reference import open_reference, RealSets; "
    "from svgpipe.manifests.evaluation_section import EvaluationSection; "
    "config = EvaluationSection(reference_images=50_000); "
    "sets = RealSets.of(open_reference(sys.argv[1]), config, 256); assert len(sets.reference) == 50_000"
)
PUBLISH = (
    "from svgpipe.manifests.cache_writer import complete_store; from svgpipe.manifests.journal import Journal; "
    "stored = complete_store(cache.store, Journal(cache.path), cache.labels, cache.heldout); "
    "assert stored.content == cache.manifest.content"
)
RESUME = (
    "from svgpipe.manifests.journal import Journal; units = range(cache.store.spec.num_units); "
    "assert not Journal(cache.path).missing(units)"
)


def features(rows: int) -> Iterator[NDArray[np.float32]]:
    """Yield batches of values with two views and a grid of one token."""
    values = np.random.default_rng(0).normal(size=(BATCH, 2, 1, 1, CHANNELS)).astype(np.float32)
    for start in range(0, rows, BATCH):
        yield values[: rows - start]


def operations(root: Path, rows: int) -> Iterator[tuple[str, str, list[str]]]:
    """Yield name, code and arguments of every operation."""
    cache, shards, epoch = str(root / "work" / "cache"), str(root / "work" / "shards"), rows // 256
    yield "open the cache", CACHE, [cache]
    yield "first batch", CACHE + BATCHES + READ.format(step=0), [cache]
    boundary = "; ".join(READ.format(step=step) for step in (epoch - 1, epoch, epoch + 1))
    yield "epoch boundary", CACHE + BATCHES + boundary, [cache]
    yield "resume training at step 1,000,000", CACHE + BATCHES + READ.format(step=1_000_000), [cache]
    yield "find missing units", CACHE + RESUME, [cache]
    yield "publish", CACHE + PUBLISH, [cache]
    yield "svgpipe inspect, cache", COMMAND, ["inspect", cache]
    yield "svgpipe inspect, shards", COMMAND, ["inspect", shards]
    yield "svgpipe verify, cache", COMMAND, ["verify", cache]
    yield "svgpipe verify, shards", COMMAND, ["verify", shards]
    yield "svgpipe status", COMMAND, ["status", str(root / "work")]
    yield "list a reference of 50,000 images", REFERENCE, [shards]


def measure(code: str, arguments: list[str]) -> tuple[float, float]:
    """Return seconds and peak memory in GB of a Python process."""
    peak = "; print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0], file=sys.stderr)"
    started = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-c", code.rstrip("; ") + peak, *arguments], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if found.returncode:
        raise RuntimeError(found.stderr)
    return seconds, int(found.stderr.split()[-1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=ROWS)
    rows = parser.parse_args().rows
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "work").mkdir()
        shard(ImageSources(write_images(root / "images", 32)), root / "one", ShardSection())
        repeated(ShardSet.open(root / "one"), root / "work" / "shards", rows, TARS)
        labels = np.arange(rows) % CLASSES
        started = time.perf_counter()
        held = np.arange(rows) % 200 == 0
        FeatureCache.create(root / "work" / "cache", features(rows), labels, mean=0, std=1, heldout=held)
        print(f"{rows:,} rows; the cache was written in {time.perf_counter() - started:.0f} s")
        fractions = {}
        print(f"{'operation':36} {'seconds':>8} {'GB':>6}")
        for name, code, arguments in operations(root, rows):
            seconds, gigabytes = measure(code, arguments)
            print(f"{name:36} {seconds:8.1f} {gigabytes:6.2f}", flush=True)
            fractions[name] = [round(seconds / LIMIT_S, 2), round(gigabytes / LIMIT_GB, 2)]
    print(json.dumps(fractions))


if __name__ == "__main__":
    main()
