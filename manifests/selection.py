"""Evenly spread choices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def evenly_spread(total: int, count: int | None) -> list[int]:
    """Return at most `count` numbers of range(total), evenly spread, in order; None: all."""
    if count is None or count >= total:
        return list(range(total))
    return [int(i) for i in np.linspace(0, total - 1, count).round()]


def choose_evenly(items: Sequence[T], count: int | None) -> list[T]:
    """Return at most `count` of the items, evenly spread, in order; None: all."""
    return [items[i] for i in evenly_spread(len(items), count)]
