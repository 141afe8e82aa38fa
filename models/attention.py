"""Scaled dot-product attention with the fastest available kernel; all kernels give the same numbers."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)

Kernel = Callable[..., Tensor]
"""Three (B,T,heads,D) → (B,T,heads,D), on CUDA."""


@functools.cache
def fastest_kernel() -> Kernel | None:
    """Return xformers' kernel if there is CUDA and it is installed, else None: PyTorch's own. One log line says which.

    Called when a module is built: inside a compiled forward the import would break the graph at every block.
    """
    if not torch.cuda.is_available():
        log.info("no CUDA device: attention by PyTorch's scaled_dot_product_attention")
        return None
    try:
        from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]  # an extra
    except ImportError:
        log.info("xformers is not installed: attention by PyTorch's scaled_dot_product_attention")
        return None
    kernel: Kernel = memory_efficient_attention
    if reason := failure_of(kernel, torch.device("cuda")):
        log.warning(
            "xformers is installed, but its attention fails here (%s): attention by PyTorch's "
            "scaled_dot_product_attention. Install the xformers that was built for PyTorch %s, or uninstall it.",
            reason,
            torch.__version__,
        )
        return None
    log.info("attention by xformers")
    return kernel


def failure_of(kernel: Kernel, device: torch.device) -> str | None:
    """Return why the kernel fails, or None. An xformers built for another PyTorch imports, but has no CUDA code."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 16, 1, 64, dtype=dtype, device=device, requires_grad=True)
        try:
            kernel(x, x, x).sum().backward()
        except RuntimeError as error:  # includes NotImplementedError, which xformers raises without CUDA code
            return str(error).partition("\n")[0]
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, kernel: Kernel | None = None) -> Tensor:
    """Return softmax(q kᵀ / sqrt(D)) v: three (B,heads,T,D) → (B,heads,T,D). `kernel` is used on CUDA."""
    if kernel is not None and q.is_cuda:
        return kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)
