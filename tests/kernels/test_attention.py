"""The Triton attention kernels where there is no GPU: interpreted, and compiled ahead of time."""

from __future__ import annotations

import functools
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

from fastseq.kernels import aot  # noqa: E402
from fastseq.kernels.attention import kernel, launch  # noqa: E402
from fastseq.kernels.attention.tuned import OTHERWISE, TUNED, Tuned, tiles  # noqa: E402

HERE = Path(__file__).parent


OWN = ["kernels/interpreted_attention.py", "kernels/test_attention_gpu.py"]
# The tests of every kernel of attention, those of each thing there is to it that are quick.
SHARED = {
    "test_functional_attention.py": [
        "nowhere",
        "strides and additive",
        "strides and dot",
        "some_inputs",
        "one_output and f32",
        "every_mask_and_dtype and True-query and (location or general)",
        "beyond_the_range",
        "any_cotangent",
        "memory",
        "share_no_memory",
        "autocast",
        "compiles_whole and dot",
        "exports",
        "does_not_fit",
    ],
    "ops/test_attention.py": ["opcheck and True-True-torch.float32", "meta", "itself"],
    "ops/test_attention_kernels.py": ["beyond_a_length", "numbers", "small_terms", "refuses"],
    "nn/test_attention.py": ["every_parameter", "projected_once", "inside_the_tanh"],
}


@pytest.mark.parametrize("which", ["whole", "parts", "shared"])
def test_numbers_by_the_interpreter(which):
    files, chosen = OWN, which
    if which == "shared":
        files = SHARED
        chosen = " or ".join(
            f"({Path(file).name} and ({' or '.join(f'({one})' for one in names)}))"
            for file, names in SHARED.items()
        )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
        + [str(HERE.parent / name) for name in files]
        + ["-k", chosen],
        # Without native kernels, whose place on CPU tensors the interpreted ones take.
        env=os.environ | {"TRITON_INTERPRET": "1", "FASTSEQ_NATIVE": "0"},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


@pytest.fixture(autouse=True)
def nothing_compiled_before(tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))


# Atomics; on NVIDIA, loads by a cache that does not see what the program wrote.
UNWANTED = {"ptx": r"\b(atom|red)\.|\.nc\b", "amdgcn": r"_atomic_"}
# Where a kernel writes global memory and reads it again, as ordered_accesses.py finds; the compiler
# adds barriers of its own for shared memory.
BARRIERS = {"additive_fwd": 2, "additive_bwd": 1, "dot_fwd": 2, "scores_bwd": 2, "merge": 0}
BARRIER = {"ttir": r"\.(?:local_)?barrier\b", "ptx": r"\bbar\.sync\b", "amdgcn": r"\bs_barrier\b"}


def barriers(code, form):
    return len(re.findall(BARRIER[form], code.asm[form]))


def faults(variant, code):
    """What is wrong with the machine code of a variant, a line each."""
    takes = aot.resources(code)
    if not takes.within(aot.BUDGETS[variant.stage]):
        yield f"{takes} is above the budget"
    form = "amdgcn" if variant.target == "gfx942" else "ptx"
    if re.search(UNWANTED[form], code.asm[form]):
        yield "atomics, or loads past the coherent cache"
    wanted = BARRIERS[variant.stage]
    if barriers(code, "ttir") != wanted:
        yield f"{barriers(code, 'ttir')} barriers, not {wanted}"
    # A wavefront of AMD's is in step with itself.
    alone = form == "amdgcn" and dict(variant.options)["num_warps"] == 1
    if barriers(code, form) < wanted and not alone:
        yield "barriers got lost on the way to machine code"
    # In 32 bits only what counts blocks and parts of a source.
    for line in code.asm["ttir"].splitlines():
        narrow = re.search(r"muli .*: (i32|tensor<[0-9x]+i32>)", line)
        if narrow and not re.search(r"%span\b|%c\d+_i32\b", line):
            yield f"an offset of 32 bits: {line}"


@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize("stage", aot.BUDGETS)
def test_every_variant_compiles_within_its_budget(stage, target):
    """And has neither atomics nor narrow offsets, but barriers."""
    found = [variant for variant in aot.variants(target) if variant.stage == stage]
    wrong = [f"{v}: {fault}" for v in found for fault in faults(v, v.compiled())]
    assert found and not wrong, "\n".join(wrong)


@pytest.mark.parametrize("stage", ["additive_bwd", "dot_fwd", "scores_bwd"])
def test_a_missing_barrier_is_seen(stage, tmp_path, monkeypatch):
    """In the kernel and, as each of them is one more there, in machine code."""
    variant = next(v for v in aot.variants("sm_90") if v.stage == stage)
    complete = variant.compiled()
    assert not list(faults(variant, complete))
    nothing = triton.language.core.builtin(lambda _semantic=None: None)
    monkeypatch.setattr(triton.language, "debug_barrier", nothing)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "without"))
    lacking = variant.compiled()
    assert any("barriers, not" in fault for fault in faults(variant, lacking))
    assert barriers(lacking, "ptx") == barriers(complete, "ptx") - BARRIERS[stage]


def test_a_budget_exceeded_is_seen():
    for more in ((1, 0, 0), (0, 1, 0), (0, 0, 4)):
        assert not aot.Resources(*more).within(aot.Resources(0, 0, 0))
    assert aot.Resources(1, 1, 0).within(aot.Resources(1, 1, 0))


def additive_bwd(target):
    """A variant of it."""
    return next(v for v in aot.variants(target) if v.stage == "additive_bwd")


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_a_planted_spill_is_above_the_budget(target, monkeypatch):
    monkeypatch.setattr(launch, "tiles", lambda *key: tiles(*key) | {"maxnreg": 32})
    found = aot.resources(additive_bwd(target).compiled())
    assert found.spills > 0 and not found.within(aot.BUDGETS["additive_bwd"]), found


def test_a_planted_spill_is_above_the_budget_on_amd(monkeypatch):
    """Tiles of more registers than there are."""
    wide = {"BLOCK_S": 16, "BLOCK_K": 512, "num_warps": 1}
    chosen = lambda stage, *key: wide if stage == "additive_bwd" else tiles(stage, *key)  # noqa: E731
    monkeypatch.setattr(launch, "tiles", chosen)
    monkeypatch.setattr(aot, "WIDTHS", (512,))
    found = aot.resources(additive_bwd("gfx942").compiled())
    assert found.spills > 0 and not found.within(aot.BUDGETS["additive_bwd"]), found


WIDTHS = (1, 5, 16, 31, 32, 48, 64, 65, 128, 129, 160, 512)


def random_call(draw):
    """A call of a stage of attention, of any sizes, layouts, dtypes and options."""
    one = draw.choice

    def tensor(*shape, dtype):
        """Dense, a part of something larger, or beginning at an odd place."""
        wider = [n + draw.choice((0, 0, 0, 16, 3)) for n in shape]
        begin = draw.choice((0, 0, 16, 1))
        memory = torch.zeros(math.prod(wider) + begin, dtype=dtype)
        whole = memory[begin:].view(wider)
        part = whole[tuple(slice(n) for n in shape)]
        swapped = len(shape) > 1 and draw.random() < 0.1
        return part.mT.contiguous().mT if swapped else part

    score, dtype = one(("additive", "dot")), one((torch.float32, torch.float16, torch.bfloat16))
    B, Q, S = one((1, 1, 3)), one((1, 1, 2, 7, 40)), one((1, 2, 40, 300, 1000))
    K, C = one(WIDTHS), one((None, *WIDTHS))
    C = K if C is None else C
    q, k, c = (tensor(B, *shape, dtype=dtype) for shape in ((Q, K), (S, K), (S, C)))
    inputs = [q, k, c]
    if score == "additive":
        inputs += [tensor(K, dtype=dtype), one((None, tensor(B, S, K, dtype=dtype)))]
    lengths = one((None, tensor(B, dtype=one((torch.int64, torch.int32, torch.int16)))))
    mask = one((None, tensor(B, one((1, Q)), S, dtype=torch.bool)))
    if draw.random() < 0.5:
        return functools.partial(kernel(f"{score}_fwd"), *inputs, mask, lengths, 0.7)
    given = one(((1, 1), (1, 0), (0, 1)))
    upstream = [
        tensor(B, Q, n, dtype=dtype) if there else None
        for n, there in zip((C, S), given, strict=True)
    ]
    weights = tensor(B, Q, S, dtype=dtype)
    rest = (lengths, weights, 0.7, one((True, True, False)), one((True, False)))
    return functools.partial(kernel(f"{score}_bwd"), *upstream, *inputs, *rest)


def asked_at_random(target, calls=600):
    """What so many random calls would have Triton compile."""
    draw, found = random.Random(0), set()
    before = torch.get_float32_matmul_precision()
    try:
        for processors in (1, 16, 132, 304):
            with aot.asked_for(target, processors=processors) as asked:
                for _ in range(calls // 4):
                    switch = draw.choice(("highest", "high", "medium"))
                    torch.set_float32_matmul_precision(switch)
                    random_call(draw)()
            found |= asked
    finally:
        torch.set_float32_matmul_precision(before)
    return found


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_what_calls_can_ask_for_is_what_is_compiled(target):
    known, asked = set(aot.variants(target)), asked_at_random(target)
    assert not asked - known, sorted(map(str, asked - known))
    assert len(asked) > 0.8 * len(known)


def test_a_kind_of_call_left_out_is_seen(monkeypatch):
    asked = asked_at_random("sm_90")
    for name in ("DTYPES", "PRECISIONS", "WIDTHS", "QUERIES"):
        everything = getattr(aot, name)
        for left_out in everything:
            with monkeypatch.context() as patch:
                patch.setattr(aot, name, [one for one in everything if one != left_out])
                assert asked - set(aot.variants("sm_90")), f"{name} without {left_out}"


def test_tiles_that_won_on_a_device_are_compiled(monkeypatch):
    won = tiles("dot_fwd", False, False) | {"BLOCK_Q": 64}
    monkeypatch.setitem(TUNED, "a device", Tuned("sm_90", {("dot_fwd", False, False): won}))
    for target in ("sm_90", "sm_100"):
        there = any(v.named.get("BLOCK_Q") == 64 for v in aot.variants(target))
        assert there == (target == "sm_90")


def test_a_winner_above_its_budget_in_another_dtype_is_seen(monkeypatch):
    """By what every variant is held to: tiles that half dtypes could have."""
    won = tiles("dot_fwd", False, False) | {"BLOCK_K": 64, "BLOCK_C": 64}
    monkeypatch.setitem(TUNED, "a device", Tuned("sm_90", {("dot_fwd", False, False): won}))
    found = [v for v in aot.variants("sm_90") if v.named.get("BLOCK_C") == 64]
    found = [v for v in found if v.stage == "dot_fwd"]
    wrong = {str(v) for v in found if list(faults(v, v.compiled()))}
    assert len(found) == 4 and wrong and not any(" bf16 " in said for said in wrong)


@pytest.mark.skipif(triton.__version__ < "3.9", reason="Triton 3.6 spills nothing there")
def test_amd_s_narrower_tile_has_its_reason(monkeypatch):
    """tuned.py: with NVIDIA's, products as three of bfloat16 spill."""
    key = ("additive_fwd", False, "hip")
    assert OTHERWISE[key] == {"RANGE_S": 16} and not OTHERWISE[(*key, True)]
    monkeypatch.setitem(OTHERWISE, key, {})
    found = [v for v in aot.variants("gfx942") if v.named.get("PRECISION") == "bf16x3"]
    wide = next(v for v in found if v.named.get("RANGE_S") == 32 and "aligned" in str(v))
    assert aot.resources(wide.compiled()).spills > 0
