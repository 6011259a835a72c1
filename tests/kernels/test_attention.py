"""The Triton attention kernels where there is no GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fastseq.kernels import aot  # noqa: E402
from fastseq.kernels.attention.tuned import tiles  # noqa: E402

HERE = Path(__file__).parent


@pytest.mark.parametrize("parts", ["whole", "parts"])
def test_numbers_by_the_interpreter(parts):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + [str(HERE / "interpreted_attention.py"), "-k", parts],
        # Without native kernels, whose place on CPU tensors the interpreted ones take.
        env=os.environ | {"TRITON_INTERPRET": "1", "FASTSEQ_NATIVE": "0"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("variant", list(aot.variants(quick=True)), ids=str)
def test_compiles_within_its_budget(variant, target):
    found = aot.compile_variant(variant, target)
    assert found.within(aot.BUDGETS[variant.stage]), found


# Atomics; on NVIDIA, loads by a cache that does not see what the program wrote.
UNWANTED = {"sm_90": r"\b(atom|red)\.|\.nc\b", "gfx942": r"_atomic_"}


@pytest.mark.parametrize("target", UNWANTED)
@pytest.mark.parametrize("variant", list(aot.variants(quick=True)), ids=str)
def test_code_without_atomics_with_barriers_and_wide_offsets(variant, target):
    compiled = aot.compiled(variant, target)
    machine = compiled.asm["ptx" if target == "sm_90" else "amdgcn"]
    assert not re.search(UNWANTED[target], machine)
    if target == "sm_90" and variant.stage != "merge":
        assert "bar.sync" in machine
    # In 32 bits only what counts blocks and parts of a source.
    for line in compiled.asm["ttir"].splitlines():
        if re.search(r"muli .*: (i32|tensor<[0-9x]+i32>)", line):
            assert re.search(r"%span\b|%c\d+_i32\b", line), line


def test_the_quick_variants_meet_every_kernel_and_option():
    quick, everything = (list(aot.variants(quick=q)) for q in (True, False))
    assert {v.stage for v in quick} == {v.stage for v in everything} == set(aot.KERNELS)
    assert len(set(everything)) == len(everything) > 100
    named = {name for v in everything for name in v.absent}
    assert {name for v in quick for name in v.absent} >= named - {"d_context"}


def test_a_budget_exceeded_is_seen():
    assert not aot.Resources(0, 0, 4).within(aot.Resources(1, 1, 0))
    assert aot.Resources(1, 1, 0).within(aot.Resources(1, 1, 0))


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_planted_spill_is_above_the_budget(target, monkeypatch):
    crowded = lambda *key: tiles(*key) | {"maxnreg": 32}  # noqa: E731
    monkeypatch.setattr(aot, "tiles", crowded)
    found = aot.compile_variant(aot.Variant("additive_bwd", "f32"), target)
    assert found.spills > 0 and not found.within(aot.BUDGETS["additive_bwd"]), found


def test_a_planted_spill_is_above_the_budget_on_amd(monkeypatch):
    """Tiles of more registers than there are."""
    wide = {"BLOCK_S": 16, "BLOCK_K": 256, "num_warps": 1}
    monkeypatch.setattr(aot, "tiles", lambda *key: wide)
    found = aot.compile_variant(aot.Variant("additive_bwd", "f32"), "gfx942")
    assert found.spills > 0 and not found.within(aot.BUDGETS["additive_bwd"]), found
