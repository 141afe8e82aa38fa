"""What both training stages share: seeds, schedules, stopping, optimizer state."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import signal
import threading
import types
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from svgpipe.manifests.precision import Precision, computes_bfloat16
from svgpipe.manifests.recipe import ScheduleSection

log = logging.getLogger(__name__)


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


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy there. Towards a GPU it runs beside the computation: from pageable memory the host would wait for both."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """bfloat16 autocast, or nothing for float32; warns once where a CPU has to imitate bfloat16."""
    if precision == "float32":
        return nullcontext()
    if device.type == "cpu":
        warn_if_imitated(precision)
    return torch.autocast(device.type, torch.bfloat16)


@functools.cache
def warn_if_imitated(precision: Precision) -> None:
    """Say, once, that this machine computes `precision` in software."""
    if precision == "bfloat16" and not computes_bfloat16():
        log.warning(
            "this CPU has no bfloat16 instructions: bfloat16 will take several times as long as float32 "
            "(--set SECTION.precision=float32, or auto)"
        )


def is_compiled(setting: Literal["auto"] | bool, device: torch.device) -> bool:
    """Whether models are compiled; auto: where it pays, which is on CUDA."""
    return device.type == "cuda" if setting == "auto" else setting


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
        # A copy: tensors of a file are the file, mapped into memory, which may change or go while training lasts.
        state.setdefault(int(index), {})[name] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
