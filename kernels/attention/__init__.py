"""Additive and dot attention on a GPU: the operators of fastseq/ops/attention.py in Triton.

Importing this needs no triton; asking for a kernel does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable

import torch

from .. import why_not_available

__all__ = ["STAGES", "kernel", "obstacle"]

STAGES = ("additive_fwd", "additive_bwd", "dot_fwd", "dot_bwd")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def obstacle(*tensors: torch.Tensor) -> str | None:
    """Why no Triton kernel can run on these tensors, or None where one can."""
    reason = why_not_available()
    if reason is not None:
        return reason
    if tensors[0].dtype not in _DTYPES:
        return f"no Triton kernel for {tensors[0].dtype}; float32, float16 and bfloat16 have one"
    for tensor in tensors:
        if not tensor.numel():
            return "nothing to compute"
    return None


@functools.cache
def kernel(stage: str) -> Callable:
    """The implementation of a stage, with the operator's arguments.

    Raises:
        RuntimeError: triton is not installed.
    """
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"fastseq.kernels.attention: {stage} needs triton; it is not installed")
    return getattr(importlib.import_module(f"{__name__}.{stage}"), stage)
