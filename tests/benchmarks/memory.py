"""Growth of an extraction's memory with the size of the data set: 1,000 and 10,000 small images.

    .venv/bin/python -m tests.benchmarks.memory

Real images of 64 pixels, the demo's encoder with random weights, units of the same size. The resident memory of the
driver and of every Ray worker is read twenty times per second during the extraction; each size runs in its own process
and Ray. The largest value counts. Pages of Ray's object store are excluded (column `shared`): they are one block of
fixed size that every process maps, and count fully for each process that has touched them. The number of bytes that Ray
spilled to disk is read at the end. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import ray

from svgpipe.manifests.recipe import Recipe
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardSet
from svgpipe.pipeline.cluster import connected
from svgpipe.stages.extract.stage import extract
from svgpipe.stages.runtime.ray_runner import RayRunner
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.shard.scan import ImageSources
from svgpipe.stages.train_autoencoder.stage import train_autoencoder

from .extract import write_images
from .plan import OVERRIDES, repeated

SIZES = (1_000, 10_000)


def recipe_of() -> Recipe:
    extra = ["extract.calibration_images=200", "extract.unit_rows=100", "extract.batch_size=100"]
    return load_recipe("demo", [*OVERRIDES, *extra])


def watch(peaks: dict[str, int], stop: threading.Event) -> None:
    """Record the peak memory of each Ray worker by role, in kB, and of this process as `driver`; shared pages apart."""
    while not stop.wait(0.05):
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                name = (entry / "cmdline").read_bytes().split(b"\0")[0].decode()
                status = (entry / "status").read_text()
            except OSError:
                continue
            role = "encoder" if "MapWorker" in name else "task" if name.startswith(("ray::IDLE", "ray::Map(")) else ""
            if entry.name == str(os.getpid()):
                role = "driver"
            if role and "RssShmem" in status:
                resident, shared = (int(status.partition(f"{name}:")[2].split()[0]) for name in ("VmRSS", "RssShmem"))
                peaks[role] = max(peaks.get(role, 0), resident - shared)
                peaks["shared"] = max(peaks.get("shared", 0), shared)


def measure(root: Path, rows: int) -> None:
    """Run one extraction; print its peaks as JSON."""
    peaks: dict[str, int] = {}
    stop = threading.Event()
    with connected():
        thread = threading.Thread(target=watch, args=(peaks, stop), daemon=True)
        thread.start()
        shards = repeated(ShardSet.open(root / "shards"), root / f"many-{rows}", rows, rows // 500)
        extract(shards, root / "autoencoder", root / f"cache-{rows}", recipe_of().extract, runner=RayRunner())
        stop.set()
        thread.join()
        summary = ray._private.internal_api.memory_summary(stats_only=True)
    peaks["spilled"] = int("Spilled" in summary)
    print(json.dumps(peaks))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", nargs=2, metavar=("ROOT", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Path(arguments.measure[0]), int(arguments.measure[1]))
        return
    recipe = recipe_of()
    found: dict[int, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shard(
            ImageSources(write_images(root / "images", 64)),
            root / "shards",
            recipe.shard.model_copy(update={"crop": 64}),
        )
        train_autoencoder(ShardSet.open(root / "shards"), root / "autoencoder", recipe.autoencoder)
        for rows in SIZES:
            command = [sys.executable, "-m", "tests.benchmarks.memory", "--measure", str(root), str(rows)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[rows] = json.loads(done.stdout.splitlines()[-1])
    for rows, peaks in found.items():
        line = ", ".join(f"{role} {peaks[role] / 1e3:.0f} MB" for role in ("driver", "encoder", "task", "shared"))
        print(f"{rows:6} images: {line}; spilled: {'yes' if peaks['spilled'] else 'no'}")
    few, many = found[SIZES[0]], found[SIZES[1]]
    ratios = {f"{role}_peak_ratio": round(many[role] / few[role], 3) for role in ("driver", "encoder", "task")}
    print(json.dumps({**ratios, "spilled": many["spilled"]}))


if __name__ == "__main__":
    main()
