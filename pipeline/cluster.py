"""The connection to Ray: a cluster where one is named, else this machine."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from svgpipe.stages.runtime.runner import Resources


def training_cluster(resources: Resources | None, address: str | None) -> AbstractContextManager[None]:
    """Ray where training was asked to use workers, else nothing."""
    return nullcontext() if resources is None else connected(address)


@contextmanager
def connected(address: str | None = None) -> Iterator[None]:
    """Ray, connected for the length of the block; one that is already connected is used and left as it is."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's own chatter would run through the progress bars; its errors still arrive as exceptions.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    logging.getLogger("ray").setLevel(logging.ERROR)
    import ray
    import ray.data

    if ray.is_initialized():
        yield
        return
    ray.init(
        # Without a word Ray would join whatever cluster was last started on this machine, dead or alive.
        address=address or os.environ.get("RAY_ADDRESS") or "local",
        include_dashboard=False,
        configure_logging=True,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Schedulers send SIGTERM. Ray's handler, set just now, would end the process with dumps of native stacks.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        ray.shutdown()
