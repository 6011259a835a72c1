"""The GPU's kernels built for the host (on_host.cpp) behind the ops of the GPU, on CPU tensors.

FASTSEQ_ON_HOST_FLAGS adds flags of the compiler's. With a sanitizer, whose library Python must have
from its start, and that of C++ beside it, for else the first exception ends it all, the tests find
any step outside of shared memory and any misaligned access:

    FASTSEQ_ON_HOST_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined" \\
      ASAN_OPTIONS=detect_leaks=0:log_path=/tmp/sanitizer \\
      LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \\
      python -m pytest tests/cuda/test_recurrent.py tests/cuda/test_decoder.py
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastseq.ops import recurrent, recurrent_cuda

__all__ = ["COMPILER", "load", "on_host"]

ROOT = Path(__file__).parent.parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++")
SOURCES = ("tests/cuda/on_host.cpp", "csrc/cuda/recurrent/table.cpp", "csrc/cpu/cells.cpp")
WITH_TORCH = ("csrc/ops/recurrent_cuda.cpp", "csrc/ops/tensors.cpp")
# As the device: an FMA where the source says so, and nowhere else.
FLAGS = (
    "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -Wno-psabi "
    "-ffp-contract=off -DFASTSEQ_ON_HOST"
)


def build() -> Path:
    """Compile what has changed; returns the library."""
    extra = os.environ.get("FASTSEQ_ON_HOST_FLAGS", "")
    import ninja
    from ninja import ninja_syntax

    folder = ROOT / "build" / ("on_host_flags" if extra else "on_host")
    folder.mkdir(parents=True, exist_ok=True)
    home = Path(torch.__file__).parent
    torch_flags = f"-DTORCH_TARGET_VERSION=0x020a000000000000 -isystem {home}/include"
    library = folder / "libfastseq_on_host.so"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with open(folder / "build.ninja", "w") as file:
            writer = ninja_syntax.Writer(file, width=200)
            command = f"{COMPILER} -MD -MF $out.d {FLAGS} {extra} $more -c $in -o $out"
            writer.rule("compile", command, depfile="$out.d")
            writer.rule("link", f"{COMPILER} -shared {extra} -o $out $in $libs")
            objects = []
            for source in (*SOURCES, *WITH_TORCH):
                objects.append(source.replace("/", "_") + ".o")
                more = {"more": torch_flags if source in WITH_TORCH else ""}
                writer.build(objects[-1], "compile", str(ROOT / source), variables=more)
            libs = {"libs": f"-L{home}/lib -ltorch -ltorch_cpu -lc10 -lpthread"}
            writer.build(library.name, "link", objects, variables=libs)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    return library


_loaded: list[ctypes.CDLL] = []


def load() -> ctypes.CDLL:
    """The library, its ops registered for CPU tensors."""
    if not _loaded:
        path = str(build())
        torch.ops.load_library(path)
        _loaded.append(ctypes.CDLL(path))
    return _loaded[0]


@contextlib.contextmanager
def on_host(
    way: int = recurrent_cuda.ANY_WAY,
    order: int = 0,
    *,
    processors: int = 0,
    shared: int = 0,
    blocks: int = 0,
    layers: bool = True,
) -> Iterator[None]:
    """Inside, fastseq's recurrent layers run the GPU's kernels, on the host.

    Args:
        way: recurrent_cuda.STEP, WHOLE, GRID or ANY_WAY.
        order: of the threads, and of the blocks, between two meetings: 0 as numbered, 1 backwards,
            2 mixed.
        processors, shared: the device's multiprocessors, and the bytes of shared memory that a
            block may have; 0: an H200's.
        blocks: how many run at once; 0: one a multiprocessor.
        layers: whether a layer must run inside.

    Raises:
        RuntimeError: none did, so that the CPU's kernels were tested in place of the GPU's.
    """
    library, ran = load(), []

    def forward(*arguments):
        ran.append(arguments)
        return recurrent_cuda.forward(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        # A call that goes straight to the CPU's kernels passes these by.
        patch.setattr(recurrent, "eager", None)
        patch.setattr(recurrent, "_forward", forward)
        patch.setattr(recurrent, "_backward", recurrent_cuda.backward)
        patch.setattr(recurrent_cuda, "way", way)
        library.fastseq_thread_order(order)
        library.fastseq_device(processors, shared, blocks)
        try:
            yield
        finally:
            library.fastseq_thread_order(0)
            library.fastseq_device(0, 0, 0)
    if layers and not ran:
        raise RuntimeError("on_host: expected a layer on the GPU's kernels, none ran")
