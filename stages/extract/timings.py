"""Timings of an extraction: seconds per worker and phase, and the bottleneck."""

from __future__ import annotations

import os
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

# Phases in order, by the role of the workers.
PHASES = {"reader": ("read", "decode"), "encoder": ("encode", "wait"), "writer": ("statistics", "write")}
BUSY = 0.9
SHORT_S = 60.0  # seconds of all encoders; shorter runs are mostly start and end


@dataclass(frozen=True)
class Timing:
    """Seconds of one worker for one unit, by phase, and the time when it finished (seconds since the epoch)."""

    role: str
    worker: str
    seconds: Mapping[str, float]
    at: float


@dataclass
class Stopwatch:
    """Measures the seconds of one worker for one unit, by phase."""

    role: str
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to the phase `name`.

        Yields:
            Nothing.
        """
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - started

    def timing(self) -> Timing:
        """Return the timing that is passed on with the unit."""
        return Timing(self.role, f"{socket.gethostname()}:{os.getpid()}", dict(self.seconds), time.time())


class Timings:
    """Sum over all units of one run."""

    def __init__(self) -> None:
        self._workers: dict[tuple[str, str], dict[str, float]] = {}
        self._started = time.monotonic()
        self._encoded: list[tuple[float, int]] = []  # time, images
        self._written = 0.0
        self._images = 0

    def add(self, images: int, timings: Sequence[Timing]) -> None:
        """Add a written unit of `images` and the timings of its workers."""
        self._images += images
        for timing in timings:
            if timing.role == "encoder":
                self._encoded.append((timing.at, images))
            self._written = max(self._written, timing.at)
            sums = self._workers.setdefault((timing.role, timing.worker), defaultdict(float))
            sums["images"] += images
            for phase, seconds in timing.seconds.items():
                sums[phase] += seconds

    @property
    def steady_rate(self) -> float | None:
        """Return images/s from the first encoded unit, when all workers have started, to the last written one."""
        first, *others = sorted(self._encoded) or [(0.0, 0)]
        seconds = self._written - first[0]
        return sum(images for _, images in others) / seconds if others and seconds > 0 else None

    def summary(self) -> dict[str, Any]:
        """Return JSON values: the table per worker, the rate, and one line of advice."""
        workers = [
            {
                "role": role,
                "worker": worker,
                "images": int(sums["images"]),
                "seconds": {phase: round(sums[phase], 3) for phase in PHASES[role]},
            }
            for (role, worker), sums in sorted(self._workers.items())
        ]
        rate = self.steady_rate
        return {
            "images": self._images,
            "seconds": round(time.monotonic() - self._started, 3),
            "steady_images_per_s": None if rate is None else round(rate, 3),
            "workers": workers,
            "advice": advice(workers),
        }


def advice(workers: list[dict[str, Any]]) -> str:
    """Return one line of advice, from the seconds that encoders computed and waited."""
    total: dict[str, float] = defaultdict(float)
    for worker in workers:
        for phase, seconds in worker["seconds"].items():
            total[phase] += seconds
    alive = total["encode"] + total["wait"]
    if alive == 0:
        return "nothing was encoded in this run"
    if alive < SHORT_S:
        return "too short to say what limits the rate"
    busy = total["encode"] / alive
    if busy >= BUSY:
        return f"encoders were busy {busy:.0%} of the time: more or faster encoders would help"
    reading = {phase: total[phase] for phase in ("read", "decode", "statistics", "write")}
    slowest = max(reading, key=reading.__getitem__)
    share = f"encoders waited {1 - busy:.0%} of the time"
    if slowest == "read":
        return f"{share}, mostly for reading: the storage of the shards is the bottleneck"
    if slowest == "write":
        return f"{share}, mostly for writing: the storage of the cache is the bottleneck"
    # CPU work per second of encoding.
    cores = max(1.0, sum(reading.values()) / max(total["encode"], 1e-9))
    return f"{share} for {slowest}: give Ray about {cores:.0f} CPU cores beside the encoders'"
