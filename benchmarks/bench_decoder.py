"""The decoder with attention against its reference, eager and captured: checked, timed, recorded.

python -m benchmarks.bench_decoder [--device cuda] [--rows 1,2] [--quick] [--output FOLDER]
                                   [--table FILE]

All target tokens are given; on a GPU also none but the first, the others being the likeliest, and
once everything is bfloat16. There fastseq's side runs inside use_backend("cuda"), a second time
without the CUDA graph of its loop, and the reference a second time as one of the same call. --table
writes what fastseq chooses by on a GPU (fastseq/ops/measured_cuda.py).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import torch

import fastseq
from benchmarks.command import Row, command, milliseconds, step, torchs_side
from benchmarks.gpu_table import untimed
from benchmarks.shapes import MODES
from fastseq import functional
from fastseq.ops import decoder_cuda, measured_cuda
from fastseq.reference import decoder as reference
from fastseq.testing import assert_matches
from fastseq.testing_decoder import DecoderCase, decoder_case

COLUMNS = (
    "cell order tokens dtype B T S E H K C mode status fastseq_ms uncaptured_ms eager_ms "
    "captured_ms over_eager over_captured"
).split()
ORDERS = {"before": {}, "feeding": {"after": True, "feeds": True}}
KINDS = {
    "cpu": [("lstm", "before", "given", "f32"), ("lstm", "feeding", "given", "f32")],
    "cuda": [
        ("lstm", "before", "given", "f32"),
        ("gru", "before", "given", "f32"),
        ("lstm", "feeding", "given", "f32"),
        ("lstm", "before", "chosen", "f32"),
        ("gru", "before", "chosen", "f32"),
        ("lstm", "before", "given", "bf16"),
    ],
}
KIND = ("cell", "order", "tokens", "dtype")
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SIZES = {
    "cpu": [(64, 5, 5, 16, 32, 32, 64), (32, 30, 30, 256, 256, 256, 512)],
    "cuda": [
        (64, 40, 40, 256, 512, 512, 1024),
        (32, 30, 30, 256, 256, 256, 512),
        (128, 25, 25, 256, 512, 512, 1024),
        (1, 40, 40, 256, 512, 512, 1024),
    ],
}
# Steps of what is checked: the reference takes a score of launches a step.
SHORT = 6
# Tokens to choose from.
VOCABULARY = 8000


def build(
    size: tuple[int, ...], kind: tuple[str, ...], device: str, steps: int | None = None
) -> DecoderCase:
    B, T, S, E, H, K, C = size
    cell, order, tokens, dtype = kind
    T = steps or T
    more = ORDERS[order] | dict(dtype=DTYPES[dtype])
    if tokens == "chosen":
        more |= dict(V=VOCABULARY, forced=(True, *[False] * (T - 1)))
    case = decoder_case(cell, T, B, S, E, H, K, C, A=H, masked=True, **more)

    def on(value: object) -> object:
        if isinstance(value, tuple) and all(map(torch.is_tensor, value)):
            return tuple(map(on, value))
        return value.to(device) if torch.is_tensor(value) else value

    return replace(
        case,
        inputs={name: on(t) for name, t in case.inputs.items()},
        options={name: on(value) for name, value in case.options.items()},
        cotangents=[on(t) for t in case.cotangents],
    )


def captured(run: Callable[[], object]) -> dict[str, Callable[[], object]]:
    """The same launches as one CUDA graph, by name; nothing where they can't be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = run()
    except RuntimeError as error:
        print(f"capture: {str(error).splitlines()[0]}", flush=True)
        return {}

    def replay() -> object:
        graph.replay()
        return kept

    return {"captured": replay}


def rows(size: tuple[int, ...], device: str, quick: bool) -> Iterator[Row]:
    backend = "cuda" if device == "cuda" else "auto"

    def ours(case: DecoderCase) -> Callable[..., object]:
        def call(*tensors: torch.Tensor) -> object:
            with fastseq.use_backend(backend):
                return case.function(functional)(*tensors)

        return call

    for kind, mode in product(KINDS[device], MODES):

        def measure(seconds: float, kind=kind, mode=mode) -> dict[str, object]:
            short = build(size, kind, device, SHORT)
            oracle = short.function(reference)
            case = build(size, kind, device)
            eager = step(case.function(reference), case, mode)
            with torchs_side():
                step(oracle, short, "train")()
                eager()
            assert_matches(
                ours(short), oracle, oracle, short.inputs, short.cotangents, names=short.names
            )
            run = step(ours(case), case, mode)
            calls = {"fastseq": run}
            if device == "cuda":

                def uncaptured() -> object:
                    with decoder_cuda.uncaptured():
                        return run()

                calls |= {"uncaptured": uncaptured, "eager": eager} | captured(eager)
            else:
                calls["eager"] = eager
            times = milliseconds(calls, device, seconds)
            said = {f"{name}_ms": f"{ms:.4f}" for name, ms in times.items()}
            for name in times.keys() - {"fastseq", "uncaptured"}:
                said[f"over_{name}"] = f"{times[name] / times['fastseq']:.2f}"
            return said

        about = dict(zip(KIND, kind, strict=True))
        yield Row(about | dict(zip("BTSEHKC", size, strict=True), mode=mode), measure)


def entry(record: dict[str, object]) -> dict[str, object]:
    """A row as fastseq/ops/measured_cuda.py reads it."""
    known = {name: record[name] for name in (*KIND, "mode")}
    about = measured_cuda.DecoderKind(**known)._asdict()
    about |= {letter: record[letter] for letter in "BTSEHKC"}
    if record["status"] != "ok":
        return about | untimed(record["status"])
    sides = [name for name in ("eager", "captured") if f"{name}_ms" in record]
    theirs = {name: float(record[f"{name}_ms"]) for name in sides}
    ours = {"replayed": "fastseq_ms", "uncaptured": "uncaptured_ms"}
    ours = {name: float(record[column]) for name, column in ours.items() if column in record}
    return about | {"torch": theirs, "ours": ours}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments."""
    about = __doc__.splitlines()[0]
    return command("decoder", about, SIZES, COLUMNS, rows, argv, entry=entry)


if __name__ == "__main__":
    sys.exit(main())
