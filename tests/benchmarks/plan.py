"""Estimate of an extraction of ImageNet's size: 1,281,167 rows in 1,000 indexed tars.

    .venv/bin/python -m tests.benchmarks.plan

The index is made for the benchmark: every tar is a link to one real tar, and the rows repeat its images. The whole
command is measured in its own process: imports, opening 1,000 tars and indexes, loading the encoder of the demo with
random weights, encoding the sample. Memory is read twice: when the estimate is printed, and at the end of the process,
when destructors of torch's libraries touch more pages of their files. The last line is JSON.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from svgpipe.manifests.index import ImageRef, write_index
from svgpipe.manifests.recipe_loader import load_recipe
from svgpipe.manifests.shards import ShardFile, ShardSet, ShardSetManifest, shard_name
from svgpipe.stages.shard.from_images import shard
from svgpipe.stages.shard.scan import ImageSources
from svgpipe.stages.train_autoencoder.stage import train_autoencoder

from .extract import write_images

COMMAND = """
import sys
from svgpipe.pipeline.cli import main
code = main(sys.argv[1:])
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0], file=sys.stderr)
sys.exit(code)
"""
ROWS, TARS = 1_281_167, 1_000
OVERRIDES = ["autoencoder.backbone.weights=random", "autoencoder.steps=0", "autoencoder.perceptual.weight=0"]
OVERRIDES += ["autoencoder.discriminator.enabled=false", "autoencoder.calibration_images=8"]


def repeated(source: ShardSet, folder: Path, rows: int, tars: int) -> ShardSet:
    """Return a set of `rows` rows in `tars` tars, which are links to the first tar of `source`."""
    folder.mkdir()
    refs = source.refs(range(source.shards[0].num_images))
    shards, left = [], rows
    for number in range(tars):
        count = left // (tars - number)
        left -= count
        name = shard_name(number)
        (folder / name).symlink_to(str(source.tars()[0]))
        mine = [
            ImageRef(folder / name, r.offset, r.size, r.sha256, f"{number:04d}-{i:05d}", r.label, r.path)
            for i, r in ((i, refs[i % len(refs)]) for i in range(count))
        ]
        index_sha256 = write_index(folder / name.replace(".tar", ".parquet"), mine)
        update = {"name": name, "num_images": count, "index_sha256": index_sha256, "split": "train"}
        shards.append(ShardFile.model_validate({**source.shards[0].model_dump(), **update}))
    manifest = ShardSetManifest(
        config={},
        class_names=source.manifest.class_names,
        num_inputs=rows,
        num_images=rows,
        num_rejected=0,
        num_heldout=0,
        content=ShardSetManifest.content_of(shards),
        shards=shards,
    )
    (folder / "rejected.jsonl").touch()
    manifest.publish(folder)
    return ShardSet.open(folder)


def main() -> None:
    recipe = load_recipe("demo", OVERRIDES)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shard(ImageSources(write_images(root / "images", 32)), root / "shards", recipe.shard)
        train_autoencoder(ShardSet.open(root / "shards"), root / "autoencoder", recipe.autoencoder)
        repeated(ShardSet.open(root / "shards"), root / "many", ROWS, TARS)
        command = [sys.executable, "-c", COMMAND, "plan"]
        command += ["--shards", str(root / "many"), "--autoencoder", str(root / "autoencoder"), "--recipe", "demo"]
        started = time.perf_counter()
        found = subprocess.run([*command, "--json"], check=True, capture_output=True, text=True)
        seconds = time.perf_counter() - started
    plan = json.loads(found.stdout)
    assert plan["num_images"] == ROWS
    planned = int(found.stderr.split()[-1]) / 1e6
    ended = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    print(f"{ROWS:,} rows in {TARS:,} tars planned in {seconds:.1f} s and {planned:.2f} GB ({ended:.2f} GB at exit)")
    ratios = {"plan_seconds": round(seconds, 1), "plan_gigabytes": round(planned, 2), "at_exit": round(ended, 2)}
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
