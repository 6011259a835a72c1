"""What ``fastseq doctor`` reports: what runs here, and why not more."""

from __future__ import annotations

import os
import platform

import torch

import fastseq
from fastseq import _native, backends

__all__ = ["report"]


def report() -> tuple[list[tuple[str, str]], bool]:
    """Facts about this installation, and whether its native library works.

    Returns:
        rows: names and values, for printing.
        healthy: the native library is loaded.
    """
    loaded = _native.loaded()
    rows = [
        ("fastseq", f"{fastseq.__version__} in {os.path.dirname(fastseq.__file__)}"),
        ("python", f"{platform.python_version()}, {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", _triton()),
        ("native library", "loaded" if loaded else f"not loaded: {_native.why_not_loaded()}"),
    ]
    if loaded:
        info = _native.build_info()
        rows += [
            ("compiler", info["compiler"]),
            ("kernels", ", ".join(_native.kernels())),
            ("left out", info["left out"]),
            ("eager calls", f"{_native.why_no_eager or 'their own module'}"),
            ("CUDA kernels", _cuda_kernels()),
            ("instruction sets", f"built: {', '.join(_native.built_isas())}"),
            ("", f"of these this machine has: {', '.join(_native.available_isas())}"),
            ("", f"in use: {_native.isa()} ({_native.isa_reason()})"),
            ("AMX", f"{_native.tiles()}: {_native.tiles_reason()}"),
        ]
    rows += [
        ("bfloat16 instructions", ", ".join(backends.bfloat16_units()) or "none"),
        ("threads", _threads()),
        ("gpu", _gpu()),
    ]
    return rows, loaded


def _cuda_kernels() -> str:
    obstacle = _native.cuda_obstacle()
    if not _native.cuda_built():
        return f"none: {obstacle}"
    return f"built; {'not here: ' + obstacle if obstacle else 'there is a device'}"


def _triton() -> str:
    try:
        import triton
    except ImportError as error:
        return "not installed" if error.name == "triton" else f"broken: {error}"
    return triton.__version__


def _threads() -> str:
    return f"{torch.get_num_threads()} used by torch and fastseq, {os.cpu_count()} processors"


def _gpu() -> str:
    if not torch.cuda.is_available():
        cpu_build = torch.version.cuda is None and torch.version.hip is None
        return "none: CPU build of torch" if cpu_build else "none that torch can use"
    return ", ".join(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count()))
