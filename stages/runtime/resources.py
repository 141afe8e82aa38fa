"""Number of workers, and the resources that each one reserves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import joblib

from svgpipe.manifests.errors import UsageError


@dataclass(frozen=True)
class Resources:
    """Requested resources of workers; None: decided by the cluster, see `resolved`."""

    num_workers: int | None = None
    cpus_per_worker: float | None = None
    gpus_per_worker: float | None = None

    def resolved(self, cluster: Mapping[str, float]) -> Reserved:
        """Return the numbers for a cluster with the totals `cluster` of `ray.cluster_resources()`.

        By default, each worker has one GPU, and there are as many workers as GPUs; without GPUs, one worker.
        """
        total = cluster.get("GPU", 0.0)
        gpus = self.gpus_per_worker if self.gpus_per_worker is not None else float(total >= 1)
        count = self.num_workers if self.num_workers is not None else max(1, int(total // gpus) if gpus else 1)
        return Reserved(count, self.cpus_per_worker, gpus)


@dataclass(frozen=True)
class Reserved:
    """Number of workers, and resources of each. cpus_per_worker None: one, or less on a small cluster."""

    num_workers: int
    cpus_per_worker: float | None
    gpus_per_worker: float

    @property
    def threads(self) -> int:
        """Compute threads of a worker on the CPU: its reserved CPUs, or an even share of this machine's cores."""
        if self.cpus_per_worker is not None:
            return max(1, int(self.cpus_per_worker))
        return max(1, cpu_count() // self.num_workers)

    def require(self, cluster: Mapping[str, float], *, beside: float = 0.0) -> float:
        """Return the CPUs that each worker reserves, so that `beside` CPUs remain for other tasks.

        Raises:
            UsageError: the cluster has too few CPUs or GPUs; Ray would wait forever.
        """
        total, count = cluster.get("CPU", 0.0), self.num_workers
        spare = total - beside
        cpus = self.cpus_per_worker or max(0.1, min(1.0, spare / count))
        if cpus * count > spare + 1e-9:
            others = " with reading and writing" if beside else ""
            raise UsageError(
                f"{count} workers of {cpus:g} CPUs need {cpus * count + beside:g} CPUs{others}, but Ray has {total:g}. "
                "Use fewer --workers or less --cpus-per-worker."
            )
        gpus = cluster.get("GPU", 0.0)
        if self.gpus_per_worker * count > gpus:
            raise UsageError(
                f"{count} workers of {self.gpus_per_worker:g} GPUs need {self.gpus_per_worker * count:g}, "
                f"but Ray has {gpus:g}. Use fewer --workers or less --gpus-per-worker."
            )
        return cpus


def cpu_count() -> int:
    """Return the number of CPUs for this process, with the limits of its container and its affinity mask."""
    return int(joblib.cpu_count())
