"""Recurrent layers on a GPU against cuDNN: every row checked, timed, then recorded.

python -m benchmarks.bench_recurrent_gpu [--quick] [--output FOLDER] [--table FILE]

All sides in turn, by CUDA events: torch (cuDNN on weights in one piece, the algorithm its own
choice, TF32 as the row says) and the ways of csrc/cuda, each where it serves. ``cudnn`` is the
kernel that cuDNN spent most time in, by torch's profiler: its name tells the algorithm. --table
writes what fastseq chooses by (fastseq/ops/measured_cuda.py), other devices' rows kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch.nn.utils.rnn import PackedSequence

import fastseq
from benchmarks.command import RESULTS, milliseconds, write_csv
from benchmarks.measure import machine
from fastseq import functional
from fastseq._files import atomic_write, check_writable
from fastseq.ops import measured_cuda, recurrent_cuda
from fastseq.testing import RecurrentCase, assert_matches, recurrent_case

WAYS = {
    "step": recurrent_cuda.STEP,
    "whole": recurrent_cuda.WHOLE,
    "grid": recurrent_cuda.GRID,
}
SIZES = [
    (100, 64, 96, 96),
    (100, 128, 128, 128),
    (50, 32, 256, 256),
    (50, 64, 512, 512),
    (500, 8, 40, 320),
    (200, 64, 1000, 1000),
]
FORMS = {
    "plain": {},
    "both": dict(bidirectional=True),
    "stacked": dict(num_layers=2),
    "packed": dict(lengths="half"),
}
# "tf32" allows both sides' products TF32 while they are timed; `whole` and `grid` don't use it.
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Steps of what is checked: the reference takes a dozen launches a step.
SHORT = 12
COLUMNS = (
    "cell T B I H form dtype mode status torch_ms step_ms whole_ms grid_ms ratio cudnn".split()
)


def build(cell: str, size: tuple, form: str, dtype: torch.dtype) -> RecurrentCase:
    options = dict(FORMS[form])
    if options.get("lengths") == "half":
        options["lengths"] = [1 + size[0] * b // size[1] for b in range(size[1])]
    case = recurrent_case(cell, *size, dtype=dtype, **options)
    case = case.packed() if form == "packed" else case
    cotangents = [c.cuda() for c in case.cotangents]
    return replace(case.map(lambda t: t.cuda()), cotangents=cotangents)


LAYERS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}


def by_kernels(case: RecurrentCase, way: str) -> Callable[..., object]:
    """The case by the kernels of csrc/cuda, one way."""
    fn = case.functional(getattr(functional, case.cell))

    def call(*inputs: object) -> object:
        recurrent_cuda.way = WAYS[way]
        try:
            with fastseq.use_backend("cuda"):
                return fn(*inputs)
        finally:
            recurrent_cuda.way = recurrent_cuda.ANY_WAY

    return call


def torchs(case: RecurrentCase, states: int) -> tuple[Callable[..., object], list[torch.Tensor]]:
    """torch's layer with weights of its own, in the one piece of memory that cuDNN wants, and what
    to call it with."""
    built = case.build(LAYERS[case.cell]).cuda()
    sizes = case.keywords.get("batch_sizes")

    def call(x: torch.Tensor, *rest: torch.Tensor) -> object:
        state = rest[0] if states == 1 else rest[:2]
        if sizes is None:
            return built(x, state)
        rows, state = built(PackedSequence(x, sizes), state)
        return rows.data, state

    return call, [*list(case.inputs.values())[: 1 + states], *built.parameters()]


def sample(
    call: Callable, leaves: list[torch.Tensor], case: RecurrentCase, mode: str
) -> Callable[[], object]:
    """What one sample runs: forward without a graph, or forward and backward."""
    for leaf in leaves:
        leaf.requires_grad_(mode == "train")

    def run() -> object:
        with torch.set_grad_enabled(mode == "train"):
            y, state, *_ = call(*leaves)
        h = state[0] if isinstance(state, tuple) else state
        if mode == "train":
            return torch.autograd.grad((y, h), leaves, case.cotangents[:2], allow_unused=True)
        return y

    return run


@contextlib.contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, allowed
    try:
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            yield
    finally:
        matmul.allow_tf32 = before


def wrong(short: RecurrentCase, way: str) -> str | None:
    """What is wrong with what one way gives; "" where it does not serve such a size."""
    try:
        assert_matches(
            by_kernels(short, way),
            short.reference(),
            short.module(LAYERS[short.cell]),
            short.inputs,
            short.cotangents,
        )
    except AssertionError as error:
        return str(error)
    except RuntimeError as error:
        if "expected weights of" not in str(error):
            raise
        return ""
    return None


def measure(
    case: RecurrentCase, ways: list[str], mode: str, seconds: float, tf32: bool
) -> dict[str, object]:
    """Times of torch's layer and of ours, each way that serves."""
    states = len(case.names) - 1
    timed = {"torch": sample(*torchs(case, states), case, mode)}
    for way in ways:
        leaves = [t.detach().clone() for t in case.inputs.values()]
        timed[way] = sample(by_kernels(case, way), leaves, case, mode)
    with tf32_products(tf32):
        times = milliseconds(timed, "cuda", seconds)
        cudnn = busiest(timed["torch"])
    row = {f"{name}_ms": f"{ms:.4f}" for name, ms in times.items()}
    ours = min(ms for name, ms in times.items() if name != "torch")
    return row | {"status": "ok", "ratio": f"{times['torch'] / ours:.2f}", "cudnn": cudnn}


def busiest(run: Callable[[], object]) -> str:
    """The kernel that takes most of the device's time; empty where the profiler sees none."""
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        run()
        torch.cuda.synchronize()
    found = [e for e in profiler.key_averages() if e.self_device_time_total > 0]
    return max(found, key=lambda e: e.self_device_time_total).key if found else ""


def rows(quick: bool, seconds: float) -> Iterator[dict[str, object]]:
    sizes = SIZES[:1] if quick else SIZES
    cases = [(size, "plain", dtype) for size in sizes for dtype in ("f32", "bf16")]
    if not quick:
        # What cuDNN has its fastest algorithm for, and what it hasn't.
        cases += [(size, "plain", "f16") for size in sizes if size[3] % 128 == 0]
        cases += [(SIZES[3], form, dtype) for form in FORMS for dtype in ("f32", "bf16")][2:]
        cases += [(size, "plain", "tf32") for size in (SIZES[3], SIZES[5])]
    for cell, (size, form, dtype) in product(LAYERS, cases):
        case = build(cell, size, form, DTYPES[dtype])
        short = build(cell, (SHORT, *size[1:]), form, DTYPES[dtype])
        about = dict(zip("TBIH", size, strict=True), cell=cell, form=form, dtype=dtype)
        errors = {way: wrong(short, way) for way in WAYS}
        said = "; ".join(f"{way} is wrong: {error}" for way, error in errors.items() if error)
        serve = [way for way, error in errors.items() if error is None]
        for mode in ("train", "inf"):
            found = (
                {"status": said} if said else measure(case, serve, mode, seconds, dtype == "tf32")
            )
            yield about | {"mode": mode} | found


def write_table(path: Path, device: str, found: list[dict[str, object]]) -> None:
    """The rows as fastseq/ops/measured_cuda.py reads them, those of this device in place of what
    the table had."""
    table = dict(measured_cuda.TABLE)
    table[device] = [
        {name: row[name] for name in (*measured_cuda.Kind._fields, *"TBH")}
        | {name: float(row[f"{name}_ms"]) for name in ("torch", *WAYS) if f"{name}_ms" in row}
        for row in found
        if row["status"] == "ok"
    ]
    with atomic_write(path) as temporary:
        Path(temporary).write_text(json.dumps(table, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="bench_recurrent_gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="the first size alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV")
    parser.add_argument("--table", type=Path, help="the table to write, such as fastseq's own")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_recurrent_gpu: expected a GPU, got none", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    check_writable(arguments.output)
    about = machine() | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    found = []
    with torch.backends.cudnn.flags(allow_tf32=False):
        for row in rows(arguments.quick, 0.1 if arguments.quick else 0.15):
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
            found.append(row)
            # Kept, should the machine's time be up before the last row.
            write_csv(arguments.output / "recurrent_gpu.csv", COLUMNS, found, about)
            if arguments.table:
                write_table(arguments.table, about["gpu"], found)
    return int(any(row["status"] != "ok" for row in found))


if __name__ == "__main__":
    sys.exit(main())
