"""Several Ray nodes: the loss of a node or of a worker costs only time."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from svgpipe.manifests import FeatureCache

from .commands import Command
from .conftest import SMALL_UNITS, STORE, Finished, begin_calibrated, extract_args, tree_bytes, units_done

NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}
# By default Ray waits five times three seconds before it declares a silent node dead.
NOTICES_DEATH_SOON = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}
WORKERS = ["--workers", 2, "--cpus-per-worker", 0.7]


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    found = Cluster(initialize_head=True, head_node_args={**NODE, "_system_config": NOTICES_DEATH_SOON})
    yield found
    found.shutdown()


def encoders() -> list[int]:
    """Return process numbers of the encoder actors of any Ray on this machine."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if b"MapWorker" in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.slow
def test_extraction_survives_a_killed_node_and_a_killed_worker(
    finished: Finished, undisturbed: Path, cluster: Cluster, tmp_path: Path
) -> None:
    out, log = begin_calibrated(undisturbed, tmp_path / "cache"), tmp_path / "log"
    node = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    others = set(encoders())
    process = Command(extract_args(finished, out, *SMALL_UNITS, *WORKERS, "--address", cluster.address), log)
    process.wait_for(lambda: units_done(out) >= 2)
    victims = set(encoders()) - others
    assert victims, "no encoder was found"
    os.kill(min(victims), signal.SIGKILL)
    done = units_done(out)
    process.wait_for(lambda: units_done(out) > done)
    cluster.remove_node(node, allow_graceful=False)
    assert process.wait() == 0, log.read_text()
    assert done < 36
    assert FeatureCache(out).manifest.content == FeatureCache(undisturbed).manifest.content
    assert tree_bytes(out, *STORE) == tree_bytes(undisturbed, *STORE)
