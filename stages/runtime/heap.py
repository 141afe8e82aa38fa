"""The C library's heap, on Linux: large tensors are made of memory that others left, not of fresh pages every time."""

from __future__ import annotations

import ctypes
import sys

# mallopt's parameters, of glibc's malloc.h.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; whether that could be done (elsewhere than with glibc it cannot).

    By default glibc gives very large blocks, and the heap's end whenever some large tensors are gone, back to the
    system and fetches them again, page by page, for the next ones, which inference on a CPU waits for. The process
    stays as large as its largest moment.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
