"""The Triton attention kernels where there is no GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fastseq.kernels import aot  # noqa: E402

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


def test_the_quick_variants_meet_every_kernel_and_option():
    quick, everything = (list(aot.variants(quick=q)) for q in (True, False))
    assert {v.stage for v in quick} == {v.stage for v in everything} == set(aot.KERNELS)
    assert len(set(everything)) == len(everything) > 100
    named = {name for v in everything for name in v.absent}
    assert {name for v in quick for name in v.absent} >= named - {"d_context"}


def test_a_budget_exceeded_is_seen():
    assert not aot.Resources(0, 0, 4).within(aot.Resources(1, 1, 0))
    assert aot.Resources(1, 1, 0).within(aot.Resources(1, 1, 0))
