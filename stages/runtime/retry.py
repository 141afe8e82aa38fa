"""Retries of storage calls: reads of images and caches, checkpoints, logs. Ray retries units (ray_runner.py)."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from svgpipe.manifests.errors import ArtifactError, first_line
from svgpipe.manifests.filesystem import client_error

R = TypeVar("R")
Say = Callable[[str], None]

WAITS_S = (0.5, 2.0, 8.0)


def call_with_retries(call: Callable[[], R], say: Say = lambda text: None) -> R:
    """Return `call()`. If storage fails, it is tried again after each of `WAITS_S`; the last error is raised.

    A full disk is raised at once, because only a user can free space.
    """
    for wait in WAITS_S:
        try:
            return call()
        except Exception as error:
            if not _may_pass(error):
                raise
            say(f"storage failed ({first_line(error)}); retry in {wait:g} s")
            time.sleep(wait)
    return call()


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno not in (errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, ArtifactError) or client_error(error) is not None
