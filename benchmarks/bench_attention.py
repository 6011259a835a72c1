"""Attention against plain PyTorch, eager and compiled: every row checked, timed, then recorded.

python -m benchmarks.bench_attention [--device cuda] [--rows 1,3] [--quick] [--output FOLDER]

On a GPU by CUDA events, all sides in turn; the floors are what the special-function units and the
memory of that GPU allow, see kernels/README.md. On a CPU by the clock, without floors.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from benchmarks.measure import busy, interleaved, machine
from benchmarks.shapes import MODES
from fastseq import functional
from fastseq._files import atomic_write, check_writable
from fastseq.reference import scores
from fastseq.testing import assert_matches
from fastseq.testing_attention import AttentionCase, attention_case

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "score B Q S K C dtype mode status fastseq_ms eager_ms compile_ms over_eager over_compile "
    "special_floor_ms bytes_floor_ms part_of_floor"
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
    "cpu": [(32, 30, 30, 256, 256), (64, 1, 40, 512, 512), (64, 5, 5, 32, 32)],
}
# Special functions a clock and multiprocessor; gfx9 and NVIDIA alike.
SPECIAL_RATE = 16


def select(shapes: list, chosen: str) -> list:
    """The shapes named by a list such as ``1,3`` (counted from 1), or ``all``.

    Raises:
        ValueError: not a number, or no such row.
    """
    if chosen == "all":
        return shapes
    picked = []
    for word in chosen.split(","):
        if not word.strip().isdigit() or not 1 <= int(word) <= len(shapes):
            raise ValueError(f"expected rows from 1 to {len(shapes)}, got {word.strip()!r}")
        picked.append(shapes[int(word) - 1])
    return picked


@dataclass
class Row:
    """One size, dtype and mode; ``problem`` says why it has no times (milliseconds)."""

    score: str
    size: tuple[int, ...]
    dtype: str
    mode: str
    problem: str = ""
    times: dict[str, float] = field(default_factory=dict)
    floors: dict[str, float] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        said = {"score": self.score, "dtype": self.dtype, "mode": self.mode}
        said |= dict(zip("BQSKC", self.size, strict=True))
        said["status"] = self.problem or "ok"
        if self.times:
            ours = self.times["fastseq"]
            said |= {f"{name}_ms": f"{ms:.4f}" for name, ms in self.times.items()}
            for name in self.times.keys() - {"fastseq"}:
                said[f"over_{name}"] = f"{self.times[name] / ours:.2f}"
            if self.floors:
                said |= {f"{name}_floor_ms": f"{ms:.4f}" for name, ms in self.floors.items()}
                said["part_of_floor"] = f"{max(self.floors.values()) / ours:.2f}"
        return said


def floors(row: Row) -> dict[str, float]:
    """Milliseconds below which this GPU cannot be, by special functions and by bytes."""
    device = torch.cuda.get_device_properties(0)
    # In kHz and bits; absent from some builds of torch.
    clock = getattr(device, "clock_rate", 1_755_000) * 1e3
    memory = getattr(device, "memory_clock_rate", 3_201_000) * 1e3
    width = getattr(device, "memory_bus_width", 6144) / 8
    B, Q, S, K, C = row.size
    passes = 2 if row.mode == "train" else 1
    per_term = 2 if row.score == "additive" else 0
    special = passes * per_term * B * Q * S * K
    moved = passes * B * (S * K + S * C + Q * K + Q * C + Q * S)
    moved += B * (S * K + S * C + Q * K) if row.mode == "train" else 0
    return {
        "special": special / (SPECIAL_RATE * device.multi_processor_count * clock) * 1e3,
        "bytes": moved * DTYPES[row.dtype].itemsize / (2 * memory * width) * 1e3,
    }


def verify(case: AttentionCase) -> None:
    """Outputs and every gradient against float64, plain PyTorch being the yardstick."""
    ours, oracle = case.functional(functional), case.functional(scores)
    assert_matches(ours, oracle, oracle, case.inputs, case.cotangents, names=case.names)


def step(call: Callable, case: AttentionCase, mode: str) -> Callable[[], object]:
    """What one sample runs: forward without a graph, or forward and backward."""
    leaves = [t.clone().requires_grad_(mode == "train") for t in case.inputs.values()]

    def infer() -> object:
        with torch.no_grad():
            return call(*leaves)

    def train() -> object:
        return torch.autograd.grad(call(*leaves), leaves, case.cotangents)

    return train if mode == "train" else infer


def on_gpu(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Median milliseconds of each, by events, in turn, the caches cleared before each sample."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    spent = 0.0
    while spent < seconds * 1e3 or len(samples["fastseq"]) < 7:
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Also keeps the GPU busy while the host prepares the launches.
            flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end))
            spent += samples[name][-1]
    return {name: median(times) for name, times in samples.items()}


def measure(row: Row, device: str, seconds: float) -> None:
    """Check one row, then time it."""
    case = attention_case(row.score, *row.size, dtype=DTYPES[row.dtype], lengths=False).to(device)
    try:
        verify(case)
    except AssertionError as error:
        row.problem = f"wrong: {error}"
        return
    oracle = case.functional(scores)
    calls = {
        "fastseq": step(case.functional(functional), case, row.mode),
        "eager": step(oracle, case, row.mode),
        "compile": step(torch.compile(oracle), case, row.mode),
    }
    if device == "cuda":
        row.times = on_gpu(calls, seconds)
        row.floors = floors(row)
    else:
        timed = interleaved(calls, seconds)
        row.times = {name: timing.median * 1e3 for name, timing in timed.items()}


def write_csv(path: Path, rows: list[Row], about: dict[str, str]) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        for key, value in about.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(row.record() for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="bench_attention", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=SIZES, default="cpu")
    parser.add_argument("--rows", default="all", help="sizes by number from 1, as 1,3 (all)")
    parser.add_argument("--quick", action="store_true", help="a tenth of a second a row, float32")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV")
    arguments = parser.parse_args(argv)
    device = arguments.device
    try:
        sizes = select(SIZES[device], arguments.rows)
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("expected a GPU, got none: torch.cuda.is_available() is False")
        arguments.output.mkdir(parents=True, exist_ok=True)
        check_writable(arguments.output)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"bench_attention: {error}\n")
    about = machine()
    if device == "cuda":
        about["gpu"] = torch.cuda.get_device_name()
    else:
        about["load"] = busy() or "idle"
    rows: list[Row] = []
    name = f"attention_{device}" + ("_quick" if arguments.quick else "")
    dtypes = ["float32"] if arguments.quick or device == "cpu" else list(DTYPES)
    for score in ("additive", "dot"):
        for size in sizes:
            for dtype in dtypes:
                for mode in MODES:
                    torch.compiler.reset()
                    row = Row(score, size, dtype, mode)
                    measure(row, device, 0.1 if arguments.quick else 0.5)
                    rows.append(row)
                    print(row.record(), flush=True)
                    # Kept, should the machine's time be up before the last row.
                    write_csv(arguments.output / f"{name}.csv", rows, about)
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
