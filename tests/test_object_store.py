"""Artifacts in an object store (moto's S3 server): extraction, resume, reading, verify and repair."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from moto.server import ThreadedMotoServer

from svgpipe.manifests import FeatureCache
from svgpipe.manifests.errors import ArtifactError, UsageError
from svgpipe.manifests.filesystem import (
    Location,
    create_exclusively,
    location,
    read_range,
    write_atomic,
    zarr_store,
)
from svgpipe.manifests.index import read_images
from svgpipe.manifests.journal import Journal
from svgpipe.manifests.local_copy import LocalCopy
from svgpipe.manifests.lock import BusyError, Lock, locked
from svgpipe.manifests.shards import ShardSet

from .commands import run_and_kill
from .conftest import Finished, Outcome, extract_args
from .test_foreign_shards import image, write

UNITS = 5  # 36 rows by eight


@pytest.fixture(scope="session")
def endpoint() -> Iterator[str]:
    """One server per process, because clients that s3fs caches keep using the first one."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(scope="module")
def bucket(endpoint: str) -> Iterator[Location]:
    """A bucket of this server, found through the environment variables of AWS clients."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        root = location("s3://features")
        assert not isinstance(root, Path)
        if not root.fs.exists("features"):
            root.fs.mkdir("features")
        yield root


@pytest.fixture(scope="module")
def uploaded(bucket: Location, finished: Finished) -> Location:
    """Shards and autoencoder of the tiny pipeline, in the bucket."""
    assert not isinstance(bucket, Path)
    for name in ("shards", "autoencoder"):
        for path in (finished.root / name).rglob("*"):
            if path.is_file():
                (bucket / str(path.relative_to(finished.root))).write_bytes(path.read_bytes())
    return bucket


def remote_args(finished: Finished, root: Location) -> list[object]:
    arguments = extract_args(finished, Path("unused"))
    arguments[2], arguments[4], arguments[6] = root / "shards", root / "autoencoder", root / "cache"
    return arguments


def written(place: Location) -> str:
    """Return the time when an object was written."""
    assert not isinstance(place, Path)
    return str(place.fs.info(str(place))["LastModified"])


def run_elsewhere(arguments: list[object]) -> subprocess.CompletedProcess[str]:
    """Run in a new process whose Ray workers get the variables of the store; this process's Ray started earlier."""
    command = [sys.executable, "-c", "from svgpipe.pipeline.cli import entry; entry()", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.slow
def test_extraction_is_killed_resumes_and_reads_and_is_repaired(
    finished: Finished, uploaded: Location, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    remote = uploaded / "cache"
    arguments = remote_args(finished, uploaded)

    def records() -> list[str]:
        return Journal(remote).names()

    run_and_kill(arguments, lambda: len(records()) >= 1)
    assert not (remote / "manifest.json").exists()
    before = {name: written(remote / "journal" / f"{name}.json") for name in records()}
    assert 1 <= len(before) < UNITS
    resumed = run_elsewhere(arguments)
    assert resumed.returncode == 0, resumed.stderr
    assert {name: written(remote / "journal" / f"{name}.json") for name in before} == before
    assert len(records()) == UNITS
    here, there = finished.cache, FeatureCache(str(remote))
    assert there.manifest.content == here.manifest.content
    assert there.manifest.fingerprint == here.manifest.fingerprint
    rows = [5, 3, 3, -1]
    np.testing.assert_array_equal(there.read(rows, "flip"), here.read(rows, "flip"))
    assert (there.labels == here.labels).all()
    copy = LocalCopy(there, tmp_path)
    copy.keep(range(UNITS))
    copy.wait()
    assert copy.units_here() == {*range(UNITS)}
    every, views = np.arange(len(here)), np.zeros(len(here), np.int64)
    np.testing.assert_array_equal(copy.read_stored(every, views), here.read_stored(every))
    group = zarr.open_group(zarr_store(remote), mode="r")
    assert group["features"].shape == here.shape  # type: ignore[union-attr]

    assert svgpipe("verify", remote, "--deep").code == 0
    there.store.unit_file(3).unlink()
    damaged = svgpipe("verify", remote)
    assert damaged.code == 1
    assert "unit 3: expected" in damaged.out
    mended = run_elsewhere(["repair", remote])
    assert mended.returncode == 0, mended.stderr
    assert svgpipe("verify", remote, "--deep").code == 0
    np.testing.assert_array_equal(there.read(range(12, 16)), here.read(range(12, 16)))

    trained = svgpipe(
        "train-diffusion", "--cache", remote, "--out", uploaded / "model", "--recipe", finished.recipe_file
    )
    assert trained.code == 0, trained.err
    assert len((uploaded / "model" / "metrics.jsonl").read_text().splitlines()) >= 12
    assert svgpipe("verify", uploaded / "model", "--deep").code == 0
    assert "feature-cache" in svgpipe("inspect", remote).out

    sampled = run_elsewhere(
        [
            "sample-and-eval",
            *("--diffusion", uploaded / "model"),
            *("--autoencoder", uploaded / "autoencoder"),
            *("--reference", uploaded / "shards"),
            *("--out", uploaded / "evaluation"),
            *("--recipe", finished.recipe_file),
        ]
    )
    assert sampled.returncode == 0, sampled.stderr
    report = (uploaded / "evaluation" / "report.json").read_bytes()
    assert report == (finished.root / "evaluation" / "report.json").read_bytes()
    assert (uploaded / "evaluation" / "report.html").exists()
    assert svgpipe("verify", uploaded / "evaluation", "--deep").code == 0


def test_shards_are_written_and_read_there(
    bucket: Location, photographs: Path, finished: Finished, svgpipe: Callable[..., Outcome]
) -> None:
    out = bucket / "sharded"
    options = ["--recipe", finished.recipe_file, "--workers", 1]
    made = svgpipe("shard", photographs, "--out", out, *options)
    assert made.code == 0, made.err
    shards = ShardSet.open(f"{out}/shard-{{000000..000001}}.tar")
    assert shards.read_image(3) == finished.shards.read_image(3)
    assert ShardSet.open(out).manifest.content == finished.shards.manifest.content
    assert svgpipe("verify", out, "--deep").code == 0


def test_object_stores_allow_one_owner_at_a_time(bucket: Location) -> None:
    folder = bucket / "locked"
    with locked(folder), pytest.raises(BusyError, match="in use by process"):
        Lock(folder)
    with locked(folder):
        pass
    assert create_exclusively(folder / "once", b"1")
    assert not create_exclusively(folder / "once", b"2")
    assert (folder / "once").read_bytes() == b"1"


def test_byte_ranges_may_end_after_the_object(bucket: Location) -> None:
    write_atomic(bucket / "ten", b"0123456789")
    assert read_range(bucket / "ten", 2, 3) == b"234"
    assert read_range(bucket / "ten", 8, 5) == b"89"
    assert read_range(bucket / "ten", 10, 5) == b""
    assert read_range(bucket / "ten", 50, 5) == b""


def test_neighbouring_images_are_read_in_few_requests(
    uploaded: Location, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit's images, some of one tar twice and out of order, as bytes and as errors."""
    assert not isinstance(uploaded, Path)
    shards, asked = ShardSet.open(uploaded / "shards"), []
    real = type(uploaded.fs)._cat_file

    async def counted(*arguments: object, **options: object) -> bytes:
        asked.append(arguments)
        return await real(*arguments, **options)

    monkeypatch.setattr(type(uploaded.fs), "_cat_file", counted)
    rows = [3, 0, 1, 9, 3, *range(16, 24)]
    found = read_images(shards.refs(rows))
    assert found == [finished.shards.read_image(row) for row in rows]
    assert len(asked) <= 3  # one for each tar, of 13 images
    ref = shards.refs([0])[0]
    beyond = replace(ref, offset=10**7)
    one, other = read_images([ref, beyond])
    assert one == finished.shards.read_image(0)
    assert isinstance(other, ArtifactError) and "was altered or truncated" in str(other)


def test_unusable_locations_are_refused(bucket: Location, svgpipe: Callable[..., Outcome]) -> None:
    with pytest.raises(UsageError, match=r"expected a path, s3://… or gs://…, found scheme 'ftp'"):
        location("ftp://host/x")
    with pytest.raises(UsageError, match=r"needs gcsfs. Install it with `pip install gcsfs`"):
        location("gs://bucket/x")
    found = svgpipe("inspect", "s3://no-such-bucket-here/cache")
    assert found.code == 1
    assert "s3://no-such-bucket-here/cache" in found.err
    started = time.monotonic()
    assert (
        svgpipe("train-diffusion", "--cache", bucket / "nothing", "--out", bucket / "model2", "--recipe", "demo").code
        == 1
    )
    assert time.monotonic() - started < 30


def test_existing_tars_are_indexed_there_and_changes_are_noticed(
    bucket: Location, tmp_path: Path, svgpipe: Callable[..., Outcome]
) -> None:
    """By the object's ETag, which changes with its content."""
    members = [(f"{i}.png", image("PNG", i)) for i in range(2)]
    tar = bucket / "tars" / "a.tar"

    def upload(*labels: bytes) -> None:
        local = write(tmp_path / "a.tar", [*members, *((f"{i}.cls", label) for i, label in enumerate(labels))])
        tar.write_bytes(local.read_bytes())

    upload(b"0", b"1")
    index = ("index", tar, "--out", tmp_path / "out")
    for _ in range(2):
        found = svgpipe(*index)
        assert found.code == 0, found.err
    assert ShardSet.open(tmp_path / "out").read_image(1) == members[1][1]
    upload(b"1", b"0")
    refused = svgpipe(*index)
    assert refused.code == 1 and "was changed after it was indexed" in refused.err
