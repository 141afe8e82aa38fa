"""What `precision: auto` in a recipe means: it becomes a definite dtype where the recipe is read.

So what is kept of a recipe, and what artifacts are compared by, names what was computed with, on whatever machine.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator

# Of x86 (Zen 4, Cooper Lake, Sapphire Rapids and newer) and of ARM, as torch names them.
BFLOAT16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")


@functools.cache
def computes_bfloat16() -> bool:
    """Whether this machine has a GPU, or a CPU with bfloat16 instructions.

    Without them a CPU computes bfloat16 in software, several times slower than float32.
    """
    import torch

    if torch.cuda.is_available():
        return True
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch cannot tell
    return any(capabilities.get(name) for name in BFLOAT16_INSTRUCTIONS)


def _definite(value: object) -> object:
    if value != "auto":
        return value
    return "bfloat16" if computes_bfloat16() else "float32"


Precision = Annotated[Literal["float32", "bfloat16"], BeforeValidator(_definite)]
"""dtype of matrix products and convolutions; a recipe may also say auto: what this machine is faster in."""
