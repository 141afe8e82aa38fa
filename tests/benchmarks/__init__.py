"""Benchmarks, run by hand. Unlike tests, they use all cores."""

import os

for _name in ("OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT", "https_proxy"):
    os.environ.pop(_name, None)
