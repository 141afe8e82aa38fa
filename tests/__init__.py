"""Tests of svgpipe. They download nothing, so results are the same with and without a network.

Every process uses one compute thread, because several test processes share the machine, and the number of threads
changes the last bits of a result.
"""

import os
import tempfile
from pathlib import Path

_NOWHERE = str(Path(tempfile.gettempdir()) / "svgpipe-tests-fetch-nothing")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=_NOWHERE,
    TORCH_HOME=_NOWHERE,
    https_proxy="http://127.0.0.1:9",  # no server listens here: downloads of torch.hub fail at once
    OMP_NUM_THREADS="1",
    LOKY_MAX_CPU_COUNT="1",  # result of `cpu_count`
)
