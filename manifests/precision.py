"""`precision: auto` in a recipe is replaced by a dtype when the recipe is read.

Configs, fingerprints and artifacts therefore always name the dtype that was used.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator

# Names in torch, for x86 (Zen 4, Cooper Lake, Sapphire Rapids and newer) and ARM.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


@functools.cache
def computes_bfloat16() -> bool:
    """Return whether this machine has a GPU, or a CPU with bfloat16 instructions.

    Other CPUs emulate bfloat16 and are several times slower than in float32.
    """
    import torch

    if torch.cuda.is_available():
        return True
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older torch
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)


def fastest_precision() -> Literal["float32", "bfloat16"]:
    """Return the faster precision on this machine, the value of `auto`."""
    return "bfloat16" if computes_bfloat16() else "float32"


def _definite(value: object) -> object:
    if value not in ("float32", "bfloat16", "auto"):
        raise ValueError("expected float32, bfloat16 or auto")
    return fastest_precision() if value == "auto" else value


Precision = Annotated[Literal["float32", "bfloat16"], BeforeValidator(_definite)]
"""dtype of matrix products and convolutions. auto: the faster one on this machine."""
