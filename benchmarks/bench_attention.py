"""Attention against plain PyTorch, eager and compiled: every row checked, timed, then recorded.

python -m benchmarks.bench_attention [--device cuda] [--rows 1,3] [--quick] [--output FOLDER]

On a GPU by CUDA events, all sides in turn; the floors are what the special-function units and the
memory of that GPU allow, see kernels/README.md. On a CPU by the clock; the floors are the tanh at
TANH_SECONDS each, the bytes at CORE_BYTES and the products at the measured peak of the cores.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks.command import Row, command, milliseconds, step
from benchmarks.measure import peak_gflops
from benchmarks.shapes import MODES
from fastseq import functional
from fastseq.reference import scores
from fastseq.testing import assert_matches
from fastseq.testing_attention import AttentionCase, attention_case

COLUMNS = (
    "score B Q S K C dtype mode status fastseq_ms eager_ms compile_ms over_eager over_compile "
    "special_floor_ms bytes_floor_ms flops_floor_ms part_of_floor"
).split()
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Rows, queries, source, K, C: whole targets, single decoding steps, long sources.
SIZES = {
    "cuda": [
        (64, 40, 40, 512, 512),
        (32, 30, 30, 256, 256),
        (64, 1, 200, 512, 512),
        (8, 1, 4000, 512, 512),
        (8, 100, 1000, 512, 512),
    ],
    "cpu": [
        (64, 1, 40, 512, 512),
        (32, 30, 30, 256, 256),
        (64, 40, 40, 512, 512),
        (16, 1, 200, 128, 128),
        (8, 100, 400, 256, 256),
    ],
}
# On a GPU, which of the sizes a score and a dtype besides the first are measured at: what
# torch.compile takes for each row is most of the time there is.
SECOND = {"dot": (0,), "bfloat16": (0, 2)}
# Special functions a clock and multiprocessor; gfx9 and NVIDIA alike.
SPECIAL_RATE = 16
# One core: a tanh from exponentials at hand, in AVX-512, and what it reads from memory a second.
TANH_SECONDS = 1e-10
CORE_BYTES = 26e9


# Of the cores in use, in GFLOP/s.
peak = functools.cache(peak_gflops)


def moved_bytes(size: tuple[int, ...], dtype: str, mode: str) -> int:
    """What a pass has to read and write, each tensor once a pass."""
    B, Q, S, K, C = size
    passes = 2 if mode == "train" else 1
    moved = passes * B * (S * K + S * C + Q * K + Q * C + Q * S)
    moved += B * (S * K + S * C + Q * K) if mode == "train" else 0
    return moved * DTYPES[dtype].itemsize


def cpu_floors(score: str, size: tuple[int, ...], dtype: str, mode: str) -> dict[str, float]:
    """Milliseconds below which these cores cannot be: by tanh, by bytes, by products."""
    B, Q, S, K, C = size
    passes = 2 if mode == "train" else 1
    threads = torch.get_num_threads()
    tanh = passes * B * Q * S * K if score == "additive" else 0
    # Scores and context; backward, a product for the gradient of either factor.
    products = (3 if mode == "train" else 1) * (C + (K if score == "dot" else 0))
    found = {
        "special": tanh * TANH_SECONDS / threads * 1e3,
        "bytes": moved_bytes(size, dtype, mode) / (CORE_BYTES * threads) * 1e3,
    }
    if not math.isnan(peak()):
        found["flops"] = 2 * B * Q * S * products / peak() * 1e-6
    return found


def gpu_floors(score: str, size: tuple[int, ...], dtype: str, mode: str) -> dict[str, float]:
    """Milliseconds below which this GPU cannot be, by special functions and by bytes."""
    device = torch.cuda.get_device_properties(0)
    # In kHz and bits; absent from some builds of torch.
    clock = getattr(device, "clock_rate", 1_755_000) * 1e3
    memory = getattr(device, "memory_clock_rate", 3_201_000) * 1e3
    width = getattr(device, "memory_bus_width", 6144) / 8
    B, Q, S, K, _ = size
    passes = 2 if mode == "train" else 1
    per_term = 2 if score == "additive" else 0
    special = passes * per_term * B * Q * S * K
    return {
        "special": special / (SPECIAL_RATE * device.multi_processor_count * clock) * 1e3,
        "bytes": moved_bytes(size, dtype, mode) / (2 * memory * width) * 1e3,
    }


def verify(case: AttentionCase) -> None:
    """Outputs and every gradient against float64, plain PyTorch being the yardstick."""
    ours, oracle = case.functional(functional), case.functional(scores)
    assert_matches(ours, oracle, oracle, case.inputs, case.cotangents, names=case.names)


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


def rows(size: tuple[int, ...], device: str, quick: bool) -> Iterator[Row]:
    place = SIZES[device].index(size)
    dtypes = ["float32"] if quick or device == "cpu" else list(DTYPES)
    for score, dtype, mode in itertools.product(("additive", "dot"), dtypes, MODES):
        if device == "cuda" and any(
            place not in SECOND.get(name, (place,)) for name in (score, dtype)
        ):
            continue

        def measure(seconds: float, score=score, dtype=dtype, mode=mode) -> dict[str, object]:
            case = attention_case(score, *size, dtype=DTYPES[dtype], lengths=False).to(device)
            verify(case)
            oracle = case.functional(scores)
            calls = {
                "fastseq": step(case.functional(functional), case, mode),
                "eager": step(oracle, case, mode),
            }
            calls |= compiled(oracle, case, mode)
            times = milliseconds(calls, device, seconds)
            ours = times["fastseq"]
            said = {f"{name}_ms": f"{ms:.4f}" for name, ms in times.items()}
            for name in times.keys() - {"fastseq"}:
                said[f"over_{name}"] = f"{times[name] / ours:.2f}"
            least = (gpu_floors if device == "cuda" else cpu_floors)(score, size, dtype, mode)
            said |= {f"{name}_floor_ms": f"{ms:.4f}" for name, ms in least.items()}
            said["part_of_floor"] = f"{max(least.values()) / ours:.2f}"
            return said

        sizes = dict(zip("BQSKC", size, strict=True))
        yield Row({"score": score, **sizes, "dtype": dtype, "mode": mode}, measure)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments."""
    return command("attention", __doc__.splitlines()[0], SIZES, COLUMNS, rows, argv)


if __name__ == "__main__":
    sys.exit(main())
