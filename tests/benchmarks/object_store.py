"""Training batches from a cache in an object store with 50 ms of latency: rows per second.

    .venv/bin/python -m tests.benchmarks.object_store [--latency 0.05]

A moto S3 server in a process of its own waits before it answers each request, and counts the requests in flight.
Batches of 256 random rows of 8 kB are read: with tensorstore's default of 32 requests at a time, as svgpipe reads
them, and with a local copy (`--local-cache`) that holds an eighth of the cache, shuffled in blocks. All start with
nothing on the local disk; the downloads share the time. Moto answers some 600 requests per second on one core, so more
requests at a time show in their number, not in the rate. The last line is JSON.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from svgpipe.manifests import FeatureCache, feature_store
from svgpipe.manifests.diffusion_section import DiffusionSection
from svgpipe.manifests.filesystem import location
from svgpipe.manifests.local_copy import LocalCopy
from svgpipe.stages.train_diffusion.data import CacheBatches

ROWS, UNIT_ROWS, BATCH = 32_768, 256, 256
GRID, CHANNELS = 8, 64
BLOCK = 8  # files per block, of 128
STEPS = 24
DEFAULT_REQUESTS = 32


class Slow:
    """A WSGI application that answers late. `/waiting` answers with the mean number of requests in flight."""

    def __init__(self, app: Any, latency: float) -> None:
        self.app, self.latency = app, latency
        self.now = self.sum = self.count = 0
        self.turn = threading.Lock()

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/waiting":
            with self.turn:
                mean, self.sum, self.count = self.sum / max(1, self.count), 0, 0
            start("200 OK", [("Content-Type", "text/plain")])
            return [str(mean).encode()]
        with self.turn:
            self.now, self.sum, self.count = self.now + 1, self.sum + self.now + 1, self.count + 1
        time.sleep(self.latency)
        result: Iterable[bytes] = self.app(environ, start)
        with self.turn:
            self.now -= 1
        return result


def serve(port: int, latency: float) -> None:
    """Run the server until it is killed."""
    import logging

    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = Slow(DomainDispatcherApplication(create_backend_app), latency)
    server = make_server("127.0.0.1", port, app, threaded=True)
    server.socket.listen(1024)
    server.serve_forever()


def rate(path: str, config: DiffusionSection, folder: Path | None) -> float:
    """Return rows per second over some steps, the first batch excluded."""
    cache = FeatureCache(path)
    cache.read([0])  # opens the store once; several threads would open it several times
    copy = None if folder is None else LocalCopy(cache, folder)
    batches = iter(CacheBatches(cache, cache.training_rows, config, 0, range(BATCH), copy=copy))
    next(batches)
    started = time.perf_counter()
    for _ in itertools.islice(batches, STEPS):
        pass
    seconds = time.perf_counter() - started
    batches.close()  # type: ignore[attr-defined]
    return STEPS * BATCH / seconds


def waiting(endpoint: str) -> float:
    """Return the mean number of requests in flight, as every request found it, since the last call."""
    with urllib.request.urlopen(f"{endpoint}/waiting") as answer:
        return float(answer.read())


def measure(folder: Path, endpoint: str) -> dict[str, float]:
    """Return rates and numbers of requests in flight."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(UNIT_ROWS, GRID, GRID, CHANNELS)).astype(np.float32)
    made = FeatureCache.create(
        folder / "cache", itertools.repeat(values, ROWS // UNIT_ROWS), np.arange(ROWS) % 10, mean=0, std=1
    )
    bucket: Any = location("s3://scale")
    bucket.fs.mkdir("scale")
    bucket.fs.put(str(made.path), "scale/cache", recursive=True)
    plain = DiffusionSection(batch_size=BATCH, use_flips=False)
    blocks = plain.model_copy(update={"shuffle_files": BLOCK})
    found: dict[str, float] = {}
    waiting(endpoint)
    for name, requests, config, local in (
        ("default", DEFAULT_REQUESTS, plain, None),
        ("svgpipe", feature_store.REQUESTS, plain, None),
        ("local", feature_store.REQUESTS, blocks, folder / "local"),
    ):
        feature_store.REQUESTS = requests
        found[name] = rate("s3://scale/cache", config, local)
        found[f"{name}_requests"] = waiting(endpoint)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.latency)
        return
    endpoint = "http://127.0.0.1:8567"
    command = [sys.executable, "-m", "tests.benchmarks.object_store", "--latency", str(arguments.latency)]
    server = subprocess.Popen([*command, "--serve", endpoint.rpartition(":")[2]])
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ.update({"AWS_ENDPOINT_URL": endpoint, **keys})
    try:
        for _ in range(100):
            try:
                waiting(endpoint)
                break
            except OSError:
                time.sleep(0.2)
        with tempfile.TemporaryDirectory() as folder:
            found = measure(Path(folder), endpoint)
    finally:
        server.kill()
    print(f"{'rows of 8 kB, batches of 256':44} {'rows/s':>8} {'requests in flight':>20}")
    labels = {
        "default": "32 requests at a time",
        "svgpipe": "svgpipe",
        "local": f"local copy of {2 * BLOCK} of {ROWS // UNIT_ROWS} files",
    }
    for name, label in labels.items():
        print(f"{label:44} {found[name]:8.0f} {found[f'{name}_requests']:20.0f}")
    ratios = {name: round(found[name] / found["default"], 2) for name in ("svgpipe", "local")}
    print(json.dumps(ratios | {"requests_in_flight": round(found["svgpipe_requests"])}))


if __name__ == "__main__":
    main()
