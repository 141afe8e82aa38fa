"""Seeds and random generators that depend only on their arguments."""

from __future__ import annotations

import hashlib

import torch


def seed_of(*parts: int | str) -> int:
    """Return a 63-bit seed that depends only on `parts`, in every process and on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded with `seed_of(*parts)`."""
    return torch.Generator().manual_seed(seed_of(*parts))
