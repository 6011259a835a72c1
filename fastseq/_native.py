"""The native library: finding it, loading it, asking it what it holds.

Set FASTSEQ_NATIVE=0 to run as if it had not been built, FASTSEQ_CPU_ISA to use a narrower
instruction set than this machine has, FASTSEQ_AMX=off to leave AMX alone, or emulated to have its
arithmetic without it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sysconfig
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch

__all__ = [
    "available_isas",
    "build_info",
    "built_isas",
    "cuda_built",
    "cuda_obstacle",
    "cuda_way",
    "eager",
    "isa",
    "isa_reason",
    "kernels",
    "loaded",
    "set_isa",
    "set_tiles",
    "tiles",
    "tiles_reason",
    "why_no_eager",
    "why_not_loaded",
]

LIBRARY = Path(__file__).with_name("libfastseq.so")


def _declare(handle: ctypes.CDLL) -> None:
    """What the library's functions take and return."""
    text, number = ctypes.c_char_p, ctypes.c_int
    for name, restype in {
        "fastseq_isa": text,
        "fastseq_isa_reason": text,
        "fastseq_compiler": text,
        "fastseq_built_isa": text,
        "fastseq_built_count": number,
        "fastseq_machine_has": number,
        "fastseq_use_isa": number,
        "fastseq_tiles": text,
        "fastseq_tiles_reason": text,
        "fastseq_use_tiles": number,
        "fastseq_cell_name": text,
        "fastseq_cuda_built": number,
        "fastseq_cuda_obstacle": text,
    }.items():
        getattr(handle, name).restype = restype
    wide = ctypes.c_int64
    handle.fastseq_cuda_way.argtypes = [number] * 3 + [wide] * 3 + [number] * 3


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if os.environ.get("FASTSEQ_NATIVE") == "0":
        return None, "FASTSEQ_NATIVE=0 is set"
    if not LIBRARY.exists():
        return None, "the native library was not built when fastseq was installed"
    try:
        torch.ops.load_library(str(LIBRARY))
        handle = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"the native library does not load: {error}"
    try:
        _declare(handle)
    except AttributeError as error:
        return None, f"the native library is another version's, build it again: {error}"
    return handle, None


def _load_eager() -> tuple[ModuleType | None, str | None]:
    """csrc/ops/eager, which is for one version of torch and of Python."""
    if _library is None:
        return None, _reason
    name = f"_eager-torch{torch.__version__}-{sysconfig.get_config_var('SOABI')}.so"
    file = LIBRARY.with_name(name)
    if not file.exists():
        return None, "it was not built for this torch and this Python"
    loader = ExtensionFileLoader("fastseq._eager", str(file))
    try:
        module = module_from_spec(spec_from_file_location(loader.name, file, loader=loader))
        loader.exec_module(module)
    except ImportError as error:
        return None, f"it does not load: {error}"
    return module, None


_library, _reason = _load()
eager, why_no_eager = _load_eager()
"""The module that runs recurrent layers for eager Python, autograd included; None and why where
there is none: then they go the longer way through the registered ops."""


def loaded() -> bool:
    """Whether the native kernels can be called."""
    return _library is not None


def why_not_loaded() -> str | None:
    """One sentence, or None where the library is loaded."""
    return _reason


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        RuntimeError: it is not there; the text says why.
    """
    if _library is None:
        raise RuntimeError(f"fastseq: expected the native library, got none: {_reason}")
    return _library


def isa() -> str:
    """The instruction set in use: "scalar", "avx2" or "avx512"."""
    return library().fastseq_isa().decode()


def isa_reason() -> str:
    """Why that one is in use."""
    return library().fastseq_isa_reason().decode()


def built_isas() -> list[str]:
    """Instruction sets the library was built with, narrowest first."""
    handle = library()
    return [handle.fastseq_built_isa(i).decode() for i in range(handle.fastseq_built_count())]


def available_isas() -> list[str]:
    """Those of :func:`built_isas` that this machine has."""
    handle = library()
    return [name for i, name in enumerate(built_isas()) if handle.fastseq_machine_has(i)]


def set_isa(name: str) -> None:
    """Use another instruction set from now on, in every thread.

    Raises:
        ValueError: it was not built, or this machine lacks it.
    """
    if not library().fastseq_use_isa(name.encode()):
        raise ValueError(f"fastseq.set_isa: expected one of {available_isas()}, got {name!r}")


def tiles() -> str:
    """How bfloat16 is multiplied in tiles where torch's switches of precision permit it: by "amx",
    "emulated" (for tests: AMX's arithmetic without AMX), or "off"."""
    return library().fastseq_tiles().decode() if isa() == "avx512" else "off"


def tiles_reason() -> str:
    """Why that way; FASTSEQ_AMX=off or emulated chooses another."""
    handle = library()
    return handle.fastseq_tiles_reason().decode() if isa() == "avx512" else f"{isa()} is in use"


def set_tiles(name: str) -> None:
    """Use another way from now on, in every thread.

    Raises:
        ValueError: it cannot run here.
    """
    if not library().fastseq_use_tiles(name.encode()):
        raise ValueError(f"fastseq.set_tiles: expected a way that runs here, got {name!r}")


def cuda_built() -> bool:
    """Whether the library holds the GPU's C++ kernels."""
    return bool(library().fastseq_cuda_built())


@functools.cache
def cuda_obstacle() -> str | None:
    """Why those can't run here, in a few words; None where there is a device."""
    found = library().fastseq_cuda_obstacle()
    return None if found is None else found.decode()


def cuda_way(
    cell: int, bytes: int, wanted: int, H: int, B: int, D: int, backward: bool,
    multiprocessors: int, shared: int,
) -> int:  # fmt: skip
    """How a layer would go from step to step on such a device, as csrc/cuda numbers its ways; -1
    where what is wanted can't run, or nothing is built. Launches nothing, and needs no device."""
    return library().fastseq_cuda_way(
        cell, bytes, wanted, H, B, D, backward, multiprocessors, shared
    )


class Cell(NamedTuple):
    """A cell the kernels know: how many of what it has, as in csrc/cell/cell.h."""

    name: str
    number: int
    gates: int
    states: int
    saved: int
    params: int
    masks: int

    @property
    def reference(self) -> str:
        """The cell of fastseq.reference.rnn that this is, zoneout aside."""
        return self.name.removeprefix("zoneout_")


def cells() -> dict[str, Cell]:
    """The cells by name."""
    handle = library()

    def cell(i: int) -> Cell:
        asked = ("gates", "states", "saved", "params", "masks")
        counts = [getattr(handle, f"fastseq_cell_{what}")(i) for what in asked]
        return Cell(handle.fastseq_cell_name(i).decode(), i, *counts)

    found = map(cell, range(handle.fastseq_cell_count()))
    return {cell.name: cell for cell in found}


def kernels() -> list[str]:
    """The kernels built in, as "<cell or op>_<pass>_<dtype>_<isa>"."""
    return [
        f"{op}_{stage}_{dtype}_{name}"
        for op in (*cells(), "additive_attention", "dot_attention")
        for stage in ("fwd", "bwd")
        for dtype in ("f32", "f64")
        for name in built_isas()
    ]


def build_info() -> dict[str, str]:
    """How the library was built: compiler, instruction sets in and left out."""
    built = built_isas()
    left_out = [name for name in ("scalar", "avx2", "avx512") if name not in built]
    left_out += [] if cuda_built() else ["CUDA C++ kernels"]
    return {
        "compiler": library().fastseq_compiler().decode(),
        "isas": " ".join(built),
        "left out": " ".join(left_out) or "nothing",
    }
