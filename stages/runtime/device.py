"""Devices, precision, and peak memory.

Workers on Ray get their device from what they reserve, see ray_runner.py and ray_train.py.
"""

from __future__ import annotations

import functools
import logging
import resource
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from svgpipe.manifests.precision import Precision, computes_bfloat16

log = logging.getLogger(__name__)


def pick_device() -> torch.device:
    """Return CUDA if there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`. From the CPU to CUDA it is pinned first, so that the host does not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    """Return bfloat16 autocast, or nothing for float32. Warns once if the CPU must emulate bfloat16."""
    if precision == "float32":
        return nullcontext()
    if device.type == "cpu":
        warn_if_imitated(precision)
    return torch.autocast(device.type, torch.bfloat16)


@functools.cache
def warn_if_imitated(precision: Precision) -> None:
    """Warn once if this machine emulates `precision` in software."""
    if precision == "bfloat16" and not computes_bfloat16():
        log.warning(
            "this CPU has no bfloat16 instructions: bfloat16 will take several times as long as float32 "
            "(--set SECTION.precision=float32, or auto)"
        )


def is_compiled(setting: Literal["auto"] | bool, device: torch.device) -> bool:
    """Return whether models are compiled; auto: on CUDA."""
    return device.type == "cuda" if setting == "auto" else setting


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the device's allocator on CUDA, of this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage, whose value starts with that of the parent process
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
