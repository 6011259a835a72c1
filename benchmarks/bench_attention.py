"""Attention against plain PyTorch, eager and compiled: every row checked, timed, then recorded.

python -m benchmarks.bench_attention [--device cuda] [--rows 1,3] [--quick] [--output FOLDER]

On a GPU by CUDA events, all sides in turn; the floors are what the special-function units and the
memory of that GPU allow, see kernels/README.md. There each kind of call, the most wanted first, has
its rows twice: as what torch.compile makes of the reference takes longest, it is among them the
second time; and rows that there is a target for say whether it is met. On a CPU by the clock;
the floors are the tanh at TANH_SECONDS each, the bytes at CORE_BYTES and the products at the
measured peak of the cores.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.command import Row, command, milliseconds, step
from benchmarks.measure import peak_gflops
from benchmarks.shapes import MODES
from fastseq import functional
from fastseq.reference import scores
from fastseq.testing import assert_matches, assert_results_close, run_with_grads
from fastseq.testing_attention import AttentionCase, attention_case

COLUMNS = (
    "score B Q S K C dtype where mode status fastseq_ms eager_ms compile_ms over_eager "
    "over_compile special_floor_ms bytes_floor_ms flops_floor_ms part_of_floor eager_target "
    "compile_target floor_target"
).split()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WHERE = {"all": {}, "lengths": {"lengths": True}, "mask": {"mask": "query"}}
# Rows, queries, source, K, C: whole targets, single decoding steps, long sources.
SIZES = {
    "cuda": [
        (64, 40, 40, 512, 512),
        (32, 30, 30, 256, 256),
        (64, 1, 200, 512, 512),
        (8, 1, 4000, 512, 512),
        (16, 200, 1000, 512, 512),
    ],
    "cpu": [
        (64, 1, 40, 512, 512),
        (32, 30, 30, 256, 256),
        (64, 40, 40, 512, 512),
        (16, 1, 200, 128, 128),
        (8, 100, 400, 256, 256),
    ],
}
# Score, dtype, where to look -> which of the sizes; the most wanted first.
CPU = {(score, "float32", "all"): range(5) for score in ("additive", "dot")}
GPU = {
    ("additive", "float32", "all"): range(5),
    ("additive", "float32", "lengths"): range(5),
    ("additive", "float32", "mask"): (0, 2, 4),
    ("additive", "bfloat16", "all"): (0, 2),
    ("dot", "float32", "all"): (0, 2),
    ("dot", "float32", "lengths"): (0,),
    ("dot", "bfloat16", "all"): (0,),
}
KINDS = {"cpu": CPU, "cuda": GPU}
# What training with the additive score is to reach on a GPU: times over the others, part of the
# larger floor. By the column it is read from, with that of the verdict.
TARGETS = {
    "over_eager": ("eager_target", 5.0),
    "over_compile": ("compile_target", 2.0),
    "part_of_floor": ("floor_target", 0.7),
}
# Terms tanh(q + k) beyond which only two rows of a call are checked: plain PyTorch holds several
# copies of all of them, in float64.
MOST_TERMS = 1 << 27
# Special functions a clock and multiprocessor; gfx9 and NVIDIA alike.
SPECIAL_RATE = 16
# One core: a tanh from exponentials at hand, in AVX-512, and what it reads from memory a second.
TANH_SECONDS = 1e-10
CORE_BYTES = 26e9


# Of the cores in use, in GFLOP/s.
peak = functools.cache(peak_gflops)


def parts_attended(case: AttentionCase) -> tuple[float, float]:
    """Of all pairs of a query and a position those that count, and of all positions."""
    S = case.inputs["keys"].shape[1]
    lengths, mask = case.where.get("lengths"), case.where.get("mask")
    inside = 1.0 if lengths is None else float(lengths.double().mean()) / S
    return inside * (1.0 if mask is None else float(mask.double().mean())), inside


def moved_bytes(size: tuple[int, ...], dtype: str, mode: str, inside: float) -> float:
    """What a pass has to read and write, each tensor once a pass; ``inside``: of the positions."""
    B, Q, S, K, C = size
    S = S * inside
    passes = 2 if mode == "train" else 1
    moved = passes * B * (S * K + S * C + Q * K + Q * C + Q * S)
    moved += B * (S * K + S * C + Q * K) if mode == "train" else 0
    return moved * DTYPES[dtype].itemsize


def cpu_floors(
    score: str, size: tuple[int, ...], dtype: str, mode: str, pairs: float, inside: float
) -> dict[str, float]:
    """Milliseconds below which these cores cannot be: by tanh, by bytes, by products."""
    B, Q, S, K, C = size
    passes = 2 if mode == "train" else 1
    threads = torch.get_num_threads()
    tanh = passes * B * Q * S * K * pairs if score == "additive" else 0
    # Scores and context; backward, a product for the gradient of either factor.
    products = (3 if mode == "train" else 1) * (C + (K if score == "dot" else 0))
    found = {
        "special": tanh * TANH_SECONDS / threads * 1e3,
        "bytes": moved_bytes(size, dtype, mode, inside) / (CORE_BYTES * threads) * 1e3,
    }
    if not math.isnan(peak()):
        found["flops"] = 2 * B * Q * S * pairs * products / peak() * 1e-6
    return found


def driver_s_properties() -> dict[str, int]:
    """Of the current GPU, rates in kHz and widths in bits, which torch leaves out where CUDA's
    headers do."""
    from triton.runtime import driver

    return driver.active.utils.get_device_properties(torch.cuda.current_device())


def gpu_floors(
    score: str, size: tuple[int, ...], dtype: str, mode: str, pairs: float, inside: float
) -> dict[str, float]:
    """Milliseconds below which this GPU cannot be, by special functions and by bytes."""
    device = driver_s_properties()
    clock, memory = device["sm_clock_rate"] * 1e3, device["mem_clock_rate"] * 1e3
    width = device["mem_bus_width"] / 8
    B, Q, S, K, _ = size
    passes = 2 if mode == "train" else 1
    per_term = 2 if score == "additive" else 0
    special = passes * per_term * B * Q * S * K * pairs
    return {
        "special": special / (SPECIAL_RATE * device["multiprocessor_count"] * clock) * 1e3,
        "bytes": moved_bytes(size, dtype, mode, inside) / (2 * memory * width) * 1e3,
    }


@functools.cache
def verify(device: str, kind: tuple[str, str, str], size: tuple[int, ...]) -> None:
    """Outputs and every gradient against float64, plain PyTorch being the yardstick.

    Raises:
        AssertionError: they are wrong.
    """
    case = build(device, kind, size)
    ours, oracle = case.functional(functional), case.functional(scores)
    if math.prod(size[:4]) <= MOST_TERMS:
        assert_matches(ours, oracle, oracle, case.inputs, case.cotangents, names=case.names)
        return
    # Only these rows have a cotangent, so that a gradient summed over all has what it has of these.
    rows = torch.tensor(sorted({size[0] // 2, size[0] - 1}), device=case.inputs["query"].device)
    whole = [torch.zeros_like(c).index_copy(0, rows, c[rows]) for c in case.cotangents]
    found = run_with_grads(ours, case.inputs, whole, names=case.names)
    few = _rows(case, rows)
    wide = few.to(torch.float64)
    oracles = few.functional(scores), wide.functional(scores)
    baseline, truth = (
        run_with_grads(call, one.inputs, one.cotangents, names=case.names)
        for call, one in zip(oracles, (few, wide), strict=True)
    )
    chosen = {name: t if name == "grad v" else t[rows] for name, t in found.items()}
    assert_results_close(chosen, truth, baseline, what=str(case))
    for name in ("grad query", "grad keys", "grad values"):
        left = found[name].index_fill(0, rows, 0.0)
        assert not left.any(), f"{case} {name}: rows without a cotangent have a gradient"


def _rows(case: AttentionCase, rows: Tensor) -> AttentionCase:
    """A case of those rows alone."""
    inputs = {name: t if name == "v" else t[rows] for name, t in case.inputs.items()}
    where = {name: t[rows] if torch.is_tensor(t) else t for name, t in case.where.items()}
    return replace(case, inputs=inputs, where=where, cotangents=[c[rows] for c in case.cotangents])


def build(device: str, kind: tuple[str, str, str], size: tuple[int, ...]) -> AttentionCase:
    score, dtype, where = kind
    return attention_case(score, *size, dtype=DTYPES[dtype], **WHERE[where]).to(device)


def compiled(call: Callable, case: AttentionCase, mode: str) -> dict[str, Callable[[], object]]:
    """What torch.compile makes of it, by name; nothing where it refuses or has no compiler."""
    torch.compiler.reset()
    tried = step(torch.compile(call), case, mode)
    try:
        tried()
    except Exception as error:  # torch's compiler has no type of its own for all it refuses
        print(f"torch.compile: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return {}
    return {"compile": tried}


def judged(score: str, mode: str, reached: dict[str, float]) -> dict[str, str]:
    """By the columns of ``TARGETS`` the target and "met" or "missed", where there is one."""
    if (score, mode) != ("additive", "train"):
        return {}
    return {
        column: f"{target:g} {'met' if reached[name] >= target else 'missed'}"
        for name, (column, target) in TARGETS.items()
        if name in reached
    }


def measured(
    device: str, kind: tuple[str, str, str], size: tuple[int, ...], mode: str, compiling: bool
) -> Callable[[float], dict[str, object]]:
    """What measures a row; ``compiling``: with torch.compile among the sides."""
    score, dtype, _ = kind

    def measure(seconds: float) -> dict[str, object]:
        verify(device, kind, size)
        case = build(device, kind, size)
        oracle = case.functional(scores)
        calls = {
            "fastseq": step(case.functional(functional), case, mode),
            "eager": step(oracle, case, mode),
        }
        if compiling:
            calls |= compiled(oracle, case, mode)
        times = milliseconds(calls, device, seconds)
        ours = times["fastseq"]
        said = {f"{name}_ms": f"{ms:.4f}" for name, ms in times.items()}
        reached = {f"over_{name}": ms / ours for name, ms in times.items() if name != "fastseq"}
        floors = gpu_floors if device == "cuda" else cpu_floors
        least = floors(score, size, dtype, mode, *parts_attended(case))
        said |= {f"{name}_floor_ms": f"{ms:.4f}" for name, ms in least.items()}
        reached["part_of_floor"] = max(least.values()) / ours
        said |= {name: f"{ratio:.2f}" for name, ratio in reached.items()}
        if device == "cuda":
            torch.cuda.empty_cache()
            said |= judged(score, mode, reached)
        return said

    return measure


def rows(size: tuple[int, ...], device: str, quick: bool) -> Iterator[Row]:
    place = SIZES[device].index(size)
    passes = (False, True) if device == "cuda" else (True,)
    ranks = itertools.product(passes, enumerate(KINDS[device].items()), MODES)
    for compiling, (index, (kind, places)), mode in ranks:
        if place in places:
            sizes = dict(zip("BQSKC", size, strict=True))
            score, dtype, where = kind
            yield Row(
                {"score": score, **sizes, "dtype": dtype, "where": where, "mode": mode},
                measured(device, kind, size, mode, compiling),
                rank=2 * index + compiling if device == "cuda" else 0,
            )


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments."""
    verify.cache_clear()
    return command("attention", __doc__.splitlines()[0], SIZES, COLUMNS, rows, argv)


if __name__ == "__main__":
    sys.exit(main())
