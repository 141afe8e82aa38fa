"""Choosing a few of many."""

from __future__ import annotations

import numpy as np


def evenly_spread(total: int, count: int | None) -> list[int]:
    """At most `count` of range(total), evenly spread and in order."""
    if count is None or count >= total:
        return list(range(total))
    return [int(i) for i in np.linspace(0, total - 1, count).round()]
