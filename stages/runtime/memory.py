"""What memory there is and how much of it is held: of a GPU, or of this machine or container."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by the device's allocator on CUDA, by this process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage, whose value begins with that of the process that started this one
        return int(status.read_text().partition("VmHWM:")[2].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Bytes of this process now, with libraries, which other processes may share; 0 where that is not told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:
        return 0


def available_memory(device: torch.device) -> tuple[int, int]:
    """Free and total bytes: of the GPU, or of this machine or the container that it is limited to."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():  # what can be had, unlike what nothing lies in
        free = int(meminfo.read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        cached = (group / "memory.stat").read_text().partition("inactive_file ")[2].split()  # given up when asked for
        return min(free, limit - used + int(cached[0])), min(total, limit)
    except (OSError, ValueError, IndexError):  # no such group, or "max"
        return free, total
