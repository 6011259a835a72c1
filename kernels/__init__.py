"""Triton kernels, installed as ``fastseq.kernels``. Importing this needs no triton."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys

import torch

__all__ = ["float32_matmul_precision", "why_not_available"]

# torch.backends.<first>.<second>.fp32_precision, in a fifth of the time.
_switch = torch._C._get_fp32_precision_getter


def float32_matmul_precision() -> str:
    """What the user lets products of float32 on a GPU be: "highest", "high" or "medium".

    As ``torch.get_float32_matmul_precision()``, which raises once
    ``torch.backends.cuda.matmul.fp32_precision = "tf32"`` was set, and does not notice that it was
    set back to "ieee". The old switch sets the new ones, so these alone are asked: "tf32" is
    "high", and beside "bf16" for oneDNN's products, "medium".
    """
    if _switch("cuda", "matmul") != "tf32":
        return "highest"
    return "medium" if _switch("mkldnn", "matmul") == "bf16" else "high"


@functools.cache
def why_not_available() -> str | None:
    """Why no Triton kernel can run here, or None where one could."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return _why_not_launched()


def _why_not_launched() -> str | None:
    """Triton compiles kernels by itself, but what launches them by a C compiler, with Python's
    headers: once and for all, or up to some version once for each kind of launch."""
    from triton.runtime import driver

    try:
        launcher = type(driver.active.utils).__module__
    # Whatever fails while another's compiler runs.
    except Exception as error:
        said = " ".join(str(error).split())[:160]
        return f"Triton cannot build what launches its kernels: {type(error).__name__}: {said}"
    each = hasattr(sys.modules.get(launcher), "make_launcher")
    if each and not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton finds no C compiler to build what launches its kernels"
    return None
