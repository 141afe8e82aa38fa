"""What both training stages share: seeds, schedules, metrics on disk, stopping, optimizer state."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svgpipe.manifests.errors import ArtifactError
from svgpipe.manifests.recipe import Precision, ScheduleSection
from svgpipe.manifests.storage import Location, write_atomic


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that only depends on `parts`: the same in every process and on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))


def pick_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bfloat16 autocast, or nothing for float32."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def learning_rate(step: int, steps: int, base: float, schedule: ScheduleSection) -> float:
    """Learning rate at optimiser step `step` (from 0) of `steps`: linear warm-up, then constant or cosine."""
    if step < schedule.warmup_steps:
        return base * (step + 1) / schedule.warmup_steps
    if schedule.kind == "constant":
        return base
    progress = (step - schedule.warmup_steps) / max(1, steps - schedule.warmup_steps)
    factor = schedule.final_factor + (1 - schedule.final_factor) * 0.5 * (1 + math.cos(math.pi * progress))
    return base * factor


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Set the rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = value


class MetricsLog:
    """metrics.jsonl and TensorBoard scalars of one run; a resumed run drops what lies past its step.

    An object store cannot append: there metrics.jsonl is written whole at every `flush`, and TensorBoard's
    files are left out.
    """

    def __init__(self, directory: Location, start_step: int) -> None:
        self.path = directory / "metrics.jsonl"
        kept = [entry for entry in read_metrics(self.path) if entry["step"] <= start_step]
        self._lines = [json.dumps(entry) + "\n" for entry in kept]
        self._write_whole()
        # Imported here: it is heavy, and encoder workers use this file without ever writing a log.
        from torch.utils.tensorboard import SummaryWriter

        local = isinstance(directory, Path)
        self._file = self.path.open("a") if isinstance(self.path, Path) else None
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=start_step + 1) if local else None

    def write(self, step: int, **values: float) -> None:
        """Append one line and the same scalars; `step` counts finished optimiser steps."""
        line = json.dumps({"step": step, **values}) + "\n"
        if self._file is None:
            self._lines.append(line)
        else:
            self._file.write(line)
            self._file.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, pixels: Any) -> None:
        """An (H,W,3) uint8 picture."""
        if self._board is not None:
            self._board.add_image(name, pixels, step, dataformats="HWC")

    def flush(self) -> None:
        """Everything written so far is on disk; called before a checkpoint names its step."""
        if self._file is None:
            self._write_whole()

    def _write_whole(self) -> None:
        write_atomic(self.path, "".join(self._lines).encode())

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Location) -> list[dict[str, float]]:
    """Lines of a metrics.jsonl; a last line cut short by a kill is left out.

    Raises:
        ArtifactError: a line other than the last is not JSON.
    """
    if not path.exists():
        return []
    entries = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ArtifactError(f"{path}: line {number}: expected JSON ({error}).") from error
    return entries


class StopRequest:
    """Whether Ctrl-C (or SIGTERM) was seen; the second one stops at once."""

    def __init__(self) -> None:
        self.seen = False

    def __call__(self, number: int, frame: types.FrameType | None) -> None:
        if self.seen:
            signal.default_int_handler(number, frame)
        self.seen = True


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Within the block, the first SIGINT or SIGTERM only sets a flag, so that a step can be finished and saved."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # signals only reach the main thread; a stage run elsewhere is stopped by its caller
        return
    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Optimizer state as flat tensors, `INDEX.NAME`, in the order of its parameters."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{name}": torch.as_tensor(value) for i, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `optimizer_tensors`, for an optimizer over the same parameters."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
