"""The meeting of `grid`'s blocks as nvcc compiled it, for each architecture: no host runs it."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess

import pytest

from fastseq import _native
from tests.cuda.on_host import ROOT
from tests.cuda.test_build import CUOBJDUMP, dump, needs_cuobjdump

if not _native.loaded() or not _native.cuda_built():
    pytest.skip("the library is built without nvcc", allow_module_level=True)

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
GRID = ROOT / "csrc" / "cuda" / "recurrent" / "grid.cuh"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")

# What orders memory, of each kernel in its order, a letter each: a barrier of the block's threads;
# a fence of all the device's memory; an addition, and a load, that the device sees at once; what
# empties the first-level cache; other forms of these, which say less.
ORDERS = [
    ("B", r"BAR\.SYNC"),
    ("F", r"MEMBAR\.(ALL|SC)\.(GPU|SYS)"),
    ("A", r"REDG?\.E\.ADD\.STRONG\.(GPU|SYS)|ATOMG?\.E\.ADD\.STRONG\.(GPU|SYS)"),
    ("L", r"LDG?\.E\.STRONG\.(GPU|SYS)"),
    ("C", r"CCTL\.IVALL"),
    ("?", r"MEMBAR|REDG?\.|ATOMG?\.|LDG?\.E\.STRONG"),
]
# One thread's release, which is a fence and an addition, and its acquire, a load and the emptied
# cache; before it and after it, all threads' barriers.
MEETING = "BFALCB"


_ANY = re.compile("|".join(form for _, form in ORDERS))


def orders(sass: str) -> str:
    found = []
    for line in sass.splitlines():
        if _ANY.search(line):
            found.append(next(letter for letter, form in ORDERS if re.search(form, line)))
    return "".join(found)


def kernels(sass: str) -> dict[tuple[str, str], str]:
    """Those of a dump, by architecture and name."""
    found = {}
    for part in re.split(r"^\s*code for ", sass, flags=re.MULTILINE)[1:]:
        arch = part.split(None, 1)[0]
        for body in re.split(r"^\s*Function : ", part, flags=re.MULTILINE)[1:]:
            found[arch, body.split(None, 1)[0]] = body
    return found


@functools.cache
def two_grids() -> dict[tuple[str, str], str]:
    """Of one cell in float32, forward and backward; which cell it is changes nothing of this."""
    listed = re.findall(r"Function (\S+grid_\w+_kernel\w+RnnReluEf\w+):", dump("-res-usage"))
    found = kernels(dump("-sass", "-fun", ",".join(sorted(set(listed)))))
    assert found.keys() == {(arch, name) for arch in ARCHITECTURES for name in listed}
    assert len(found) == 6
    return found


@needs_cuobjdump
def test_a_grid_releases_what_its_block_wrote_and_acquires_what_others_did():
    for kernel, sass in two_grids().items():
        said = orders(sass)
        assert said.count(MEETING) == 1, (kernel, said)
        # And nowhere else is anything shared among blocks.
        assert set(said.replace(MEETING, "")) <= {"B"}, (kernel, said)


@needs_cuobjdump
def test_what_blocks_hand_each_other_passes_the_first_level_cache():
    """The acquiring thread empties its own; the copies of the others never ask it."""
    for kernel, sass in two_grids().items():
        copies = re.findall(r"LDGSTS\S*", sass)
        assert copies and all(".BYPASS" in copy for copy in copies), (kernel, copies)


@needs_cuobjdump
def test_every_grid_has_one_meeting_also_for_later_architectures():
    """The PTX, of all cells and dtypes."""
    ptx = dump("-ptx")
    assert ptx.count("red.release.gpu.global.add.u32") == 24
    assert ptx.count("ld.acquire.gpu.global.u32") == 24


# By what it does to the source of the meeting; None: nothing.
PLANTED = {
    "nothing": None,
    "an arrival that releases nothing": ("red.release.gpu", "red.relaxed.gpu"),
    "a look that acquires nothing": ("ld.acquire.gpu", "ld.relaxed.gpu"),
    "a release to the block alone": ("red.release.gpu", "red.release.cta"),
    "a look at what the block sees": ("ld.acquire.gpu", "ld.acquire.cta"),
    "a plain load": ("ld.acquire.gpu.global.u32", "ld.global.u32"),
    "no barrier after": ("    __syncthreads();\n  }\n};", "  }\n};"),
}


@needs_cuobjdump
@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_a_weaker_meeting_is_noticed(tmp_path):
    text = re.search(r"template <class T>\nstruct DeviceGroup .*?\n};", GRID.read_text(), re.DOTALL)
    source = ['#include "csrc/cuda/recurrent/grid.cuh"', "namespace fastseq { namespace cuda {"]
    for i, change in enumerate(PLANTED.values()):
        group = text.group(0).replace("DeviceGroup", f"Group{i}")
        if change is not None:
            assert group.count(change[0]) == 1, change
            group = group.replace(*change)
        source.append(
            f"{group}\n__global__ void meet{i}(uint32_t* arrived, int* shared) {{\n"
            f"  Group{i}<float> group{{{{}}, arrived, gridDim.x, 0}};\n"
            "  shared[blockIdx.x] = 1;\n  __syncthreads();\n  group.meet();\n"
            "  shared[gridDim.x + blockIdx.x] = shared[(blockIdx.x + 1) % gridDim.x];\n}\n"
        )
    (tmp_path / "meet.cu").write_text("\n".join([*source, "}}"]))
    command = [NVCC, "-std=c++17", "-O3", "-arch=sm_80", "-cubin", f"-I{ROOT}", "meet.cu"]
    subprocess.run([*command, "-o", "meet.cubin"], cwd=tmp_path, check=True)
    listed = subprocess.run(
        [CUOBJDUMP, "-sass", "meet.cubin"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    found = {int(re.search(r"meet(\d)", name)[1]): orders(said)
             for (_, name), said in kernels(listed.stdout).items()}  # fmt: skip
    for i, planted in enumerate(PLANTED):
        assert (MEETING in found[i]) == (planted == "nothing"), (planted, found[i])
