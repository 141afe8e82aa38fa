"""How many workers there are, and what each of them reserves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import joblib

from svgpipe.manifests.errors import UsageError


@dataclass(frozen=True)
class Resources:
    """What workers ask Ray for; None: decided by what the cluster has, see `resolved`."""

    num_workers: int | None = None
    cpus_per_worker: float | None = None
    gpus_per_worker: float | None = None

    def resolved(self, cluster: Mapping[str, float]) -> Reserved:
        """Numbers for a cluster with the totals `cluster`, as `ray.cluster_resources()` gives them.

        A worker takes one GPU if the cluster has any, and there are as many workers as GPUs; without GPUs one.
        """
        total = cluster.get("GPU", 0.0)
        gpus = self.gpus_per_worker if self.gpus_per_worker is not None else float(total >= 1)
        count = self.num_workers if self.num_workers is not None else max(1, int(total // gpus) if gpus else 1)
        return Reserved(count, self.cpus_per_worker, gpus)


@dataclass(frozen=True)
class Reserved:
    """A number of workers, and what each of them reserves. cpus None: one, or less where the cluster is small."""

    num_workers: int
    cpus_per_worker: float | None
    gpus_per_worker: float

    @property
    def threads(self) -> int:
        """Compute threads of a worker on the CPU: what it reserves, else an even share of this machine's cores."""
        if self.cpus_per_worker is not None:
            return max(1, int(self.cpus_per_worker))
        return max(1, cpu_count() // self.num_workers)

    def require(self, cluster: Mapping[str, float], *, beside: float = 0.0) -> float:
        """CPUs that each worker reserves, so that `beside` are left for other tasks.

        Raises:
            UsageError: the cluster does not have so many CPUs or GPUs; Ray would wait for them without end.
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
    """CPUs that this process may use, with the limits of its container and its affinity mask."""
    return int(joblib.cpu_count())
