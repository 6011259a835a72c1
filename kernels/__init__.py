"""Triton kernels, installed as ``fastseq.kernels``. Importing this needs no triton."""

from __future__ import annotations

import functools
import importlib.util

__all__ = ["why_not_available"]


@functools.cache
def why_not_available() -> str | None:
    """Why no Triton kernel can run here, or None where one could."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    import torch

    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None
