"""LSTM on the CPU against torch: every row checked, then timed, then recorded.

python -m benchmarks.bench_lstm [--rows 1,3] [--quick] [--threads 2] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import baselines, shapes
from benchmarks.measure import Timing, busy, interleaved, machine, peak_gflops
from benchmarks.plot import speedups
from fastseq import nn
from fastseq._files import atomic_write, check_writable
from fastseq.reference import rnn
from fastseq.testing import LSTMCase, assert_close_to_reference, assert_matches, lstm_case

RESULTS = Path(__file__).parent / "results"
# Quartiles this far apart mean that something else was running.
NOISY = 0.3
COLUMNS = (
    "T B I H mode status fastseq_ms fastseq_q1_ms fastseq_q3_ms torch_ms torch_q1_ms torch_q3_ms "
    "ratio target met onnxruntime_ms gflops peak_part rounds"
).split()


@dataclass
class Row:
    """One size in one mode; ``problem`` says why it has no times."""

    shape: shapes.Shape
    mode: str
    problem: str = ""
    times: dict[str, Timing] | None = None

    @property
    def ratio(self) -> float:
        return self.times["torch"].median / self.times["fastseq"].median

    @property
    def met(self) -> bool:
        return self.times is not None and self.ratio >= self.shape.target(self.mode)

    @property
    def gflops(self) -> float:
        return self.shape.lstm_flop(self.mode) / self.times["fastseq"].median / 1e9

    def record(self, peak: float) -> dict[str, object]:
        row = dict(zip("TBIH", self.shape.sizes, strict=True))
        row |= {"mode": self.mode, "target": self.shape.target(self.mode)}
        if self.times is None:
            return row | {"status": self.problem, "met": "no"}
        for name in ("fastseq", "torch"):
            timing = self.times[name]
            row[f"{name}_ms"] = f"{timing.median * 1e3:.4g}"
            row[f"{name}_q1_ms"] = f"{timing.low * 1e3:.4g}"
            row[f"{name}_q3_ms"] = f"{timing.high * 1e3:.4g}"
        if "onnxruntime" in self.times:
            row["onnxruntime_ms"] = f"{self.times['onnxruntime'].median * 1e3:.4g}"
        return row | {
            "status": "ok",
            "ratio": f"{self.ratio:.3f}",
            "met": "yes" if self.met else "no",
            "gflops": f"{self.gflops:.1f}",
            "peak_part": f"{self.gflops / peak:.3f}",
            "rounds": self.times["fastseq"].rounds,
        }


def verify(case: LSTMCase) -> None:
    """Raise AssertionError unless every output and gradient keeps the error budget."""
    assert_matches(
        case.module(nn.LSTM),
        case.functional(rnn.lstm),
        case.module(torch.nn.LSTM),
        case.inputs,
        case.cotangents,
        names=case.names,
        what=str(case),
    )


def step(call: Callable[[Tensor], object], case: LSTMCase, mode: str) -> Callable[[], object]:
    """What one sample runs: forward without a graph, or forward and backward."""
    x = case.inputs["x"].clone()
    if mode == "inf":

        def infer() -> object:
            with torch.no_grad():
                return call(x)

        return infer
    leaves = [x.requires_grad_(), *call.parameters()]
    cotangent = case.cotangents[0]

    def train() -> object:
        return torch.autograd.grad(call(x)[0], leaves, cotangent)

    return train


def measure(shape: shapes.Shape, seconds: float) -> list[Row]:
    """Check one size, then time it in both modes."""
    rows = [Row(shape, mode) for mode in shapes.MODES]
    case = lstm_case(*shape.sizes, hx=False)
    try:
        verify(case)
    except AssertionError as error:
        for row in rows:
            row.problem = f"wrong: {error}"
        return rows
    for row in rows:
        theirs, ours = case.build(torch.nn.LSTM), case.build(nn.LSTM)
        pair = {"fastseq": step(ours, case, row.mode), "torch": step(theirs, case, row.mode)}
        row.times = interleaved(pair, seconds)
        for name, make in baselines.OTHERS.items():
            call = make(theirs, row.mode)
            if call is not None:
                verify_other(name, call, case)
                row.times |= interleaved({name: step(call, case, row.mode)}, seconds / 2)
    return rows


def verify_other(name: str, call: Callable[[Tensor], Tensor], case: LSTMCase) -> None:
    """A baseline set up wrongly would flatter us; its own rounding is not our concern."""
    exact = case.to(torch.float64)
    truth = exact.functional(rnn.lstm)(*exact.inputs.values())[0]
    assert_close_to_reference(call(case.inputs["x"]), truth, what=name)


def write_csv(path: Path, rows: list[Row], about: dict[str, str], peak: float) -> None:
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        for key, value in about.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(row.record(peak) for row in rows)


def table(rows: list[Row], peak: float) -> Table:
    """Milliseconds of every side, the ratio against its target, and the part of the peak."""
    others = [n for n in baselines.OTHERS if any(r.times and n in r.times for r in rows)]
    others.insert(0, "torch")
    heads = ["fastseq ms", *(f"{name} ms" for name in others)]
    caption = f"peak: {peak:.0f} GFLOP/s by torch.mm; ?: quartiles {NOISY:.0%} of the median apart"
    shown = Table(title="LSTM on the CPU, float32", caption=caption)
    for head in ("T, B, I, H", "mode"):
        shown.add_column(head, no_wrap=True)
    for head in (*heads, "ratio", "target", "met", "of peak"):
        shown.add_column(head, justify="right", no_wrap=True)
    for row in rows:
        cells = [row.shape.label, row.mode]
        target = f"{row.shape.target(row.mode):g}"
        if row.times is None:
            cells += ["-"] * len(heads) + ["-", target, "[red]wrong", "-"]
        else:
            for name in ("fastseq", *others):
                timing = row.times.get(name)
                cells.append("" if timing is None else f"{timing.median * 1e3:.3f}")
            colour = "green" if row.met else "yellow" if row.ratio >= 1 else "red"
            doubt = "?" if max(row.times[n].spread for n in ("fastseq", "torch")) > NOISY else ""
            cells += [f"[{colour}]{row.ratio:.2f}{doubt}", target, "yes" if row.met else "no"]
            cells.append(f"{row.gflops / peak:.0%}")
        shown.add_row(*cells, end_section=row.mode == shapes.MODES[-1])
    return shown


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="bench_lstm", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", default="all", help="rows by number from 1, as 1,3 (all)")
    parser.add_argument("--quick", action="store_true", help="half a second a row, not six")
    parser.add_argument("--threads", type=int, help="threads of torch's pool (as torch chooses)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for CSV and picture")
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 110
    try:
        chosen = shapes.select(shapes.LSTM, arguments.rows)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        arguments.output.mkdir(parents=True, exist_ok=True)
        check_writable(arguments.output)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"bench_lstm: {error}\n")
    warning = busy()
    if warning:
        console.print(f"[yellow]These timings will mislead: {warning}.")
    peak = peak_gflops()
    about = machine() | {"peak GFLOP/s": f"{peak:.0f}", "load": warning or "idle"}
    console.print(", ".join(f"{key}: {value}" for key, value in about.items()))

    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("LSTM", total=len(chosen))
        for shape in chosen:
            progress.update(task, description=f"LSTM {shape.label}")
            rows += measure(shape, 0.25 if arguments.quick else 3.0)
            progress.advance(task)
    console.print(table(rows, peak))
    for row in rows:
        if row.problem:
            console.print(f"[red]{row.shape.label} {row.mode}: {row.problem}", highlight=False)
    name = "lstm_cpu_quick" if arguments.quick or len(chosen) < len(shapes.LSTM) else "lstm_cpu"
    write_csv(arguments.output / f"{name}.csv", rows, about, peak)
    speedups(arguments.output / f"{name}.csv", arguments.output / f"{name}.png", "LSTM on the CPU")
    console.print(f"Wrote {arguments.output / name}.csv and .png")
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
