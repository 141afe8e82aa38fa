"""Scaled dot-product attention by the fastest kernel at hand, with the same numbers either way."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

log = logging.getLogger(__name__)


@functools.cache
def _xformers() -> Callable[..., Tensor] | None:
    try:
        from xformers.ops import memory_efficient_attention

        log.info("attention by xformers")
    except ImportError:
        log.info("xformers is not installed: attention by PyTorch's scaled_dot_product_attention")
        return None
    kernel: Callable[..., Tensor] = memory_efficient_attention
    return kernel


@functools.cache
def _say_no_cuda() -> None:
    log.info("no CUDA device: attention by PyTorch's scaled_dot_product_attention")


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(D)) v: three (B,heads,T,D) → (B,heads,T,D).

    xformers on CUDA where it is installed, else PyTorch SDPA; one log line says which.
    """
    if not q.is_cuda:
        if not torch.compiler.is_compiling():  # which would look into the cache's wrapper, and warn of it
            _say_no_cuda()
    elif (kernel := _xformers()) is not None:
        out = kernel(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return out.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v)
