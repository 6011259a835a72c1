"""What nvcc made, judged without a GPU: architectures, resources, loading without a driver."""

from __future__ import annotations

import json
import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

import fastseq
from fastseq import _native, backends, nn

ROOT = Path(__file__).parent.parent.parent
BUDGETS = json.loads(Path(__file__).with_name("budgets.json").read_text())

if not _native.loaded() or not _native.cuda_built():
    pytest.skip("the library is built without nvcc", allow_module_level=True)


def cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    if found:
        return found
    try:
        from triton.backends import nvidia
    except ImportError:
        return None
    path = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"
    return str(path) if path.exists() else None


CUOBJDUMP = cuobjdump()
needs_cuobjdump = pytest.mark.skipif(not CUOBJDUMP, reason="no cuobjdump, of CUDA's or Triton's")


def dump(*arguments: str) -> str:
    command = [CUOBJDUMP, *arguments, str(_native.LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def families(usage: str) -> dict[str, list[dict[str, int]]]:
    """Of every kernel and architecture: registers a thread, bytes of stack, of spills and of the
    shared memory beside what a launch asks for (sm_100 keeps 1024 to itself)."""
    found: dict[str, list[dict[str, int]]] = {}
    for name, numbers in re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", usage):
        family = re.search(r"(step|whole|grid|normalised)_(forward|backward)_kernel", name)
        if family:
            each = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", numbers)}
            found.setdefault(family.group(0), []).append(each)
    return found


@needs_cuobjdump
def test_machine_code_for_each_architecture_and_ptx_for_later_ones():
    code = set(re.findall(r"\.(sm_\w+)\.cubin", dump("-lelf")))
    assert code == {"sm_80", "sm_90a", "sm_100"}
    assert set(re.findall(r"\.(sm_\w+)\.ptx", dump("-lptx"))) == {"sm_80"}


@needs_cuobjdump
def test_resources_keep_the_budget():
    found = families(dump("-res-usage"))
    assert found.keys() == BUDGETS["kernels"].keys()
    for family, budget in BUDGETS["kernels"].items():
        assert len(found[family]) == budget["count"] * 3, family
        for each in found[family]:
            for key in ("REG", "STACK", "SHARED", "LOCAL"):
                assert each[key] <= budget[key], (family, key, each)


def test_registers_of_the_budget_fit_a_block():
    """65536 registers a multiprocessor, given out to a warp by 256."""
    sources = (ROOT / "csrc" / "cuda" / "recurrent" / "launch.h").read_text()
    for kind, constant in (
        ("step", "kStepThreads"),
        ("normalised", "kRowThreads"),
        ("whole", "kWholeThreads"),
        ("grid", "kGridThreads"),
    ):
        threads = int(re.search(rf"{constant} = (\d+)", sources).group(1))
        for family, budget in BUDGETS["kernels"].items():
            if family.startswith(kind):
                assert -(-budget["REG"] // 8) * 8 * threads <= 65536, family


def sections() -> dict[str, int]:
    """Of the library, an ELF file of 64 bits: bytes by name."""
    data = _native.LIBRARY.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    # Name, type, flags, address, place in the file, bytes.
    rows = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    at = rows[names][4]
    return {data[at + row[0] : data.index(b"\0", at + row[0])].decode(): row[5] for row in rows}


def test_the_library_stays_small():
    """Most of it is the CPU's kernels, a set for each instruction set."""
    assert _native.LIBRARY.stat().st_size <= BUDGETS["library bytes"]
    assert 0 < sections()[".nv_fatbin"] <= BUDGETS["GPU code bytes"]


def test_no_symbol_of_the_cuda_runtime_leaks():
    """Another copy of the runtime in the process, torch's, must not be bound to this one."""
    if not shutil.which("nm"):
        pytest.skip("nm is not installed")
    listed = subprocess.run(
        ["nm", "-D", "--defined-only", str(_native.LIBRARY)], capture_output=True, text=True
    )
    assert "fastseq_cell_count" in listed.stdout
    assert not re.search(r"\b_{0,2}cuda", listed.stdout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_it_loads_and_says_so():
    obstacle = _native.cuda_obstacle()
    # Without a driver, and with one that finds nothing.
    assert obstacle in (
        "CUDA driver version is insufficient for CUDA runtime version",
        "no CUDA-capable device is detected",
        "no device",
    )
    x, weights = torch.empty(2, 3, 4), list(nn.LSTM(4, 5).parameters())
    assert backends._cuda_obstacle("lstm", x, weights) == f"no CUDA kernel: {obstacle}"
    with fastseq.use_backend("cuda"), pytest.raises(RuntimeError, match="the cuda backend can run"):
        nn.LSTM(4, 5)(x)
