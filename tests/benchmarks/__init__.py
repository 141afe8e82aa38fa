"""Benchmarks, run by hand. They compute with all cores, while tests compute with one and reach no network."""

import os

for _name in ("OMP_NUM_THREADS", "LOKY_MAX_CPU_COUNT", "https_proxy"):
    os.environ.pop(_name, None)
