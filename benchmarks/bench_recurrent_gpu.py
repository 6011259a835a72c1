"""Recurrent layers on a GPU against cuDNN: every row checked, timed, then recorded.

python -m benchmarks.bench_recurrent_gpu [--quick] [--output FOLDER] [--table FILE]

All sides in turn, by CUDA events: torch (cuDNN on weights in one piece, the algorithm its own
choice; beside a row of float32 under TF32 too, as cuDNN is by default; or, where torch has no such
layer, the plain reference) and the ways of csrc/cuda, each where it serves. Rows of "tf32" allow it
both sides, and are checked by what it may do to a product. ``cudnn`` is the kernel that cuDNN spent
most time in, by torch's profiler: its name tells the algorithm. --table writes what fastseq chooses
by (fastseq/ops/measured_cuda.py) as rows come: what is wrong as wrong, what torch's side failed at
as unmeasured, and what there was no time for not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import torch
from torch.nn.utils.rnn import PackedSequence

import fastseq
from benchmarks.command import (
    RESULTS,
    UNMEASURED,
    in_time,
    milliseconds,
    torchs_side,
    unmeasured,
    write_csv,
)
from benchmarks.gpu_table import untimed, write_part
from benchmarks.measure import machine
from fastseq import functional
from fastseq._files import check_writable
from fastseq.ops import measured_cuda, recurrent_cuda
from fastseq.testing import (
    RecurrentCase,
    TF32Products,
    allow_tf32,
    assert_matches,
    recurrent_case,
)

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
    "both packed": dict(bidirectional=True, lengths="half"),
    "both": dict(bidirectional=True),
    "packed": dict(lengths="half"),
    "stacked": dict(num_layers=2),
    "both stacked": dict(num_layers=2, bidirectional=True),
    "projected": dict(proj_size="half"),
}
# What torch's layers do not take, by what the table calls it; and the cells it has no layer for.
BEYOND = {"lengths": dict(lengths="half"), "resets": dict(resets=0.1), "zoneout": {}}
OWN = ("peephole_lstm", "layer_norm_lstm")
# "tf32" allows both sides' products TF32; `whole` and `grid` don't use it.
DTYPES = {"f32": torch.float32, "tf32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
# Steps of what is checked: the reference takes a dozen launches a step.
SHORT = 12
COLUMNS = (
    "cell T B I H form dtype mode status torch_ms torch_tf32_ms step_ms whole_ms grid_ms ratio "
    "cudnn"
).split()


def build(cell: str, size: tuple, form: str, dtype: torch.dtype) -> RecurrentCase:
    options = dict((FORMS | BEYOND)[form])
    if options.get("lengths") == "half":
        options["lengths"] = [1 + size[0] * b // size[1] for b in range(size[1])]
    if options.get("proj_size") == "half":
        options["proj_size"] = size[3] // 2
    case = recurrent_case(cell, *size, dtype=dtype, **options)
    case = case.packed() if "packed" in form else case
    return case.on("cuda")


LAYERS = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU, "rnn_tanh": torch.nn.RNN}


def has_torch(cell: str, form: str) -> bool:
    return cell in LAYERS and form not in BEYOND


def by(case: RecurrentCase, form: str, backend: str, way: int) -> Callable[..., object]:
    """The case by the kernels of csrc/cuda, one way, or by "torch" step by step."""
    named = getattr(functional, case.cell)
    # Without draws, which would have to be the same on both sides.
    more = {"zoneout": 0.1, "train": False} if form == "zoneout" else {}
    # The function's name says what of torch's RNN is an option.
    fn = case.functional(
        lambda *given, nonlinearity="", **options: named(*given, **options), **more
    )

    def call(*inputs: object) -> object:
        recurrent_cuda.way = way
        try:
            with fastseq.use_backend(backend):
                return fn(*inputs)
        finally:
            recurrent_cuda.way = recurrent_cuda.ANY_WAY

    return call


def by_kernels(case: RecurrentCase, form: str, way: str) -> Callable[..., object]:
    return by(case, form, "cuda", WAYS[way])


def plainly(case: RecurrentCase, form: str) -> Callable[..., object]:
    return by(case, form, "torch", recurrent_cuda.ANY_WAY)


def torchs(
    case: RecurrentCase, states: int, mode: str
) -> tuple[Callable[..., object], list[torch.Tensor]]:
    """torch's layer with weights of its own, in the one piece of memory that cuDNN wants, and what
    to call it with. In evaluation where nothing is to be differentiated: cuDNN then keeps nothing.
    """
    built = case.build(LAYERS[case.cell]).cuda().train(mode == "train")
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


def under(tf32: bool, run: Callable[[], object]) -> Callable[[], object]:
    """The same, TF32 allowed or not."""

    def switched() -> object:
        with allow_tf32(tf32):
            return run()

    return switched


def wrong(short: RecurrentCase, form: str, way: str, tf32: bool) -> str | None:
    """What is wrong with what one way gives; "" where it does not serve such a size."""
    known = has_torch(short.cell, form)
    reference = short.reference() if known else plainly(short, form)
    baseline = short.module(LAYERS[short.cell]) if known and not tf32 else reference
    try:
        with allow_tf32(tf32):
            assert_matches(
                by_kernels(short, form, way), reference, baseline, short.inputs, short.cotangents,
                baseline_under=TF32Products if tf32 else contextlib.nullcontext,
            )  # fmt: skip
    except AssertionError as error:
        return str(error)
    except UNMEASURED:
        raise
    except RuntimeError as error:
        return "" if "expected weights of" in str(error) else f"{error}".splitlines()[0]
    return None


def theirs(case: RecurrentCase, form: str, mode: str) -> Callable[[], object]:
    """What one sample of torch's side runs."""
    if has_torch(case.cell, form):
        return sample(*torchs(case, len(case.names) - 1, mode), case, mode)
    return sample(plainly(case, form), leaves_of(case), case, mode)


def leaves_of(case: RecurrentCase) -> list[torch.Tensor]:
    return [t.detach().clone() for t in case.inputs.values()]


def measure(
    case: RecurrentCase, form: str, ways: list[str], mode: str, seconds: float, dtype: str
) -> dict[str, object]:
    """Times of torch's side and of ours, each way that serves."""
    tf32, known = dtype == "tf32", has_torch(case.cell, form)
    timed = {"torch": under(tf32, theirs(case, form, mode))}
    if dtype == "f32" and known:
        timed["torch_tf32"] = under(True, theirs(case, form, mode))
    with torchs_side():
        for run in timed.values():
            run()
    for way in ways:
        run = sample(by_kernels(case, form, way), leaves_of(case), case, mode)
        timed[way] = under(tf32, run)
    times = milliseconds(timed, "cuda", seconds)
    row = {f"{name}_ms": f"{ms:.4f}" for name, ms in times.items()}
    ours = min(ms for name, ms in times.items() if name in ways)
    ratio = f"{times['torch'] / ours:.2f}"
    cudnn = busiest(timed["torch"]) if known else ""
    return row | {"status": "ok", "ratio": ratio, "cudnn": cudnn}


def busiest(run: Callable[[], object]) -> str:
    """cuDNN's kernel that takes most of the device's time, or "unknown" and the one that does;
    empty where the profiler sees none."""
    kinds = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        run()
        torch.cuda.synchronize()
    took = {e.key: e.self_device_time_total for e in profiler.key_averages()}
    return named_by_cudnn({name: time for name, time in took.items() if time > 0})


# In the names of cuDNN's recurrent kernels (RNN_blockPersist_fp_LSTM, LSTM_elementWise_fp, ..); the
# products of its standard algorithm are cuBLAS's, which anybody may have launched.
_CUDNNS = re.compile("cudnn|rnn|lstm|gru", re.IGNORECASE)


def named_by_cudnn(took: dict[str, float]) -> str:
    own = {name: time for name, time in took.items() if _CUDNNS.search(name)}
    if own:
        return max(own, key=own.get)
    return f"unknown: {max(took, key=took.get)}" if took else ""


def cases(quick: bool) -> Iterator[tuple[str, tuple, str, str]]:
    """Cell, size, form and dtype of each case, what is asked for most first."""
    sizes = SIZES[:1] if quick else SIZES
    chosen = [(size, "plain", dtype) for size in sizes for dtype in ("f32", "bf16")]
    if not quick:
        # What cuDNN has its fastest algorithm for, and what it hasn't.
        chosen += [(size, "plain", "f16") for size in sizes if size[3] % 128 == 0]
        chosen += [
            (size, form, dtype)
            for size in (SIZES[3], SIZES[0])
            for form in FORMS
            for dtype in ("f32", "bf16")
            if form != "plain"
        ]
        chosen += [(size, form, "f32") for size in (SIZES[3], SIZES[0]) for form in BEYOND]
        chosen += [(size, "plain", "tf32") for size in (SIZES[3], SIZES[5])]
    for (size, form, dtype), cell in product(chosen, (*LAYERS, *OWN)):
        if cell in OWN:
            serves = not quick and form == "plain" and size in (SIZES[3], SIZES[0])
            serves = serves and dtype == "f32"
        elif form == "projected":
            serves = cell == "lstm"
        else:
            serves = form == "plain" or cell in ("lstm", "gru")
        if serves:
            yield cell, size, form, dtype


def rows(quick: bool, seconds: float, within: float | None = None) -> Iterator[dict[str, object]]:
    for cell, size, form, dtype in in_time(cases(quick), within):
        case = build(cell, size, form, DTYPES[dtype])
        short = build(cell, (SHORT, *size[1:]), form, DTYPES[dtype])
        about = dict(zip("TBIH", size, strict=True), cell=cell, form=form, dtype=dtype)
        said, serve = "", []
        try:
            with torchs_side():
                under(dtype == "tf32", theirs(short, form, "train"))()
            errors = {way: wrong(short, form, way, dtype == "tf32") for way in WAYS}
            said = "; ".join(f"{way} is wrong: {error}" for way, error in errors.items() if error)
            serve = [way for way, error in errors.items() if error is None]
        except UNMEASURED as error:
            said = unmeasured(error)
        for mode in ("train", "inf"):
            found = {"status": said}
            if not said:
                try:
                    found = measure(case, form, serve, mode, seconds, dtype)
                except UNMEASURED as error:
                    found = {"status": unmeasured(error)}
                except RuntimeError as error:
                    found = {"status": f"failed: {str(error).splitlines()[0]}"}
            yield about | {"mode": mode} | found


def entry(row: dict[str, object]) -> dict[str, object]:
    """A row as fastseq/ops/measured_cuda.py reads it."""
    form, own = FORMS.get(row["form"], {}), row["dtype"]
    kind = measured_cuda.Kind(
        row["cell"], own, form.get("num_layers", 1), 1 + form.get("bidirectional", False),
        "lengths" in form, "proj_size" in form, row["mode"],
        row["form"] if row["form"] in BEYOND else "",
    )  # fmt: skip
    about = kind._asdict() | {letter: row[letter] for letter in "TBIH"}
    about["P"] = row["H"] // 2 if kind.projected else 0
    if row["status"] != "ok":
        return about | untimed(row["status"])
    by_torch = {own: float(row["torch_ms"])}
    if "torch_tf32_ms" in row:
        by_torch["tf32"] = float(row["torch_tf32_ms"])
    ours = {way: float(row[f"{way}_ms"]) for way in WAYS if f"{way}_ms" in row}
    return about | {"torch": by_torch} | ours


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 without a GPU."""
    parser = argparse.ArgumentParser(
        prog="bench_recurrent_gpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="the first size alone")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV")
    parser.add_argument("--table", type=Path, help="the table to write, such as fastseq's own")
    parser.add_argument("--within", type=float, help="seconds: no case that would end later (all)")
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("bench_recurrent_gpu: expected a GPU, got none", file=sys.stderr)
        return 2
    arguments.output.mkdir(parents=True, exist_ok=True)
    check_writable(arguments.output)
    about = machine() | {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    found = []
    for row in rows(arguments.quick, 0.1 if arguments.quick else 0.15, arguments.within):
        print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        found.append(row)
        # Kept, should the machine's time be up before the last row.
        write_csv(arguments.output / "recurrent_gpu.csv", COLUMNS, found, about)
        if arguments.table:
            write_part(arguments.table, about["gpu"], "recurrent", [entry(row) for row in found])
    return int(any(row["status"] != "ok" for row in found))


if __name__ == "__main__":
    sys.exit(main())
