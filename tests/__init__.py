"""Tests of svgpipe. They fetch nothing, so they find the same with and without a network, or with a full cache.

Every process computes with one thread: several test processes share the machine, and the number of threads decides
the last bits of a result.
"""

import os
import tempfile
from pathlib import Path

_NOWHERE = str(Path(tempfile.gettempdir()) / "svgpipe-tests-fetch-nothing")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HOME=_NOWHERE,
    TORCH_HOME=_NOWHERE,
    https_proxy="http://127.0.0.1:9",  # nobody listens: torch.hub's downloads are refused at once
    OMP_NUM_THREADS="1",
    LOKY_MAX_CPU_COUNT="1",  # what `cpu_count` says
)
