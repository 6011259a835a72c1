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


@functools.cache
def _too_old(device: int) -> str | None:
    """Why a GPU by NVIDIA cannot run the kernels: aot.py compiles them for 8.0 and newer."""
    major, minor = (8, 0) if torch.version.hip else torch.cuda.get_device_capability(device)
    if major >= 8:
        return None
    return f"the Triton kernels need compute capability 8.0 or newer, this GPU has {major}.{minor}"


def obstacle(*tensors: torch.Tensor) -> str | None:
    """Why no Triton kernel can run on these tensors, or None where one can."""
    reason = why_not_available()
    if reason is not None:
        return reason
    device = tensors[0].get_device()
    if device >= 0 and (reason := _too_old(device)):
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
