"""Recurrent layers and cells on the CPU against torch: each checked, then timed, then recorded.

python -m benchmarks.bench_recurrent [--cells lstm,gru] [--group layers,packed,stacked,cells,bf16]
    [--rows 1,3] [--quick] [--compile] [--threads 2] [--output FOLDER]
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import baselines, shapes
from benchmarks.command import RESULTS, write_csv
from benchmarks.measure import Timing, busy, interleaved, machine, peak_gflops
from benchmarks.plot import speedups
from benchmarks.subjects import Subject, subject, verify, verify_results
from fastseq._files import check_writable

# Quartiles this far apart mean that something else was running.
NOISY = 0.3
SECONDS, QUICK_SECONDS = 0.5, 0.25
PEAK_SECONDS = 0.03
COLUMNS = (
    "cell group variant T B I H mode dtype status fastseq_ms fastseq_q1_ms fastseq_q3_ms baseline "
    "baseline_ms baseline_q1_ms baseline_q3_ms ratio target target_of met onnxruntime_ms "
    "compile_ms gflops peak_gflops peak_part rounds"
).split()


@dataclass
class Row:
    """One measurement; ``problem`` says why it has no times, ``untimed`` which baselines have none:
    "refused", "wrong" or "error", and why."""

    what: shapes.Measurement
    tokens: int = 0
    problem: str = ""
    times: dict[str, Timing] | None = None
    peak: float = math.nan  # GFLOP/s in float32 FMAs, of the same seconds
    untimed: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        return self.times["baseline"].median / self.times["fastseq"].median

    @property
    def gflops(self) -> float:
        return self.what.flop(self.tokens) / self.times["fastseq"].median / 1e9

    @property
    def doubtful(self) -> bool:
        return max(self.times[name].spread for name in ("fastseq", "baseline")) > NOISY

    @property
    def peak_part(self) -> float:
        """NaN where the peak is of another dtype, or unknown."""
        return self.gflops / self.peak if self.what.dtype == "float32" else math.nan

    def milliseconds(self, name: str) -> str:
        if name in self.untimed:
            return self.untimed[name][0]
        timing = (self.times or {}).get(name)
        return "" if timing is None else f"{timing.median * 1e3:.4g}"

    def record(self, met: str) -> dict[str, object]:
        m = self.what
        row = {name: getattr(m, name) for name in ("cell", "group", "variant", "mode", "dtype")}
        row |= dict(zip("TBIH", m.sizes, strict=True)) | {"baseline": m.baseline, "met": met}
        if m.target is not None:
            row |= {"target": f"{m.target:.4g}", "target_of": "geomean" if m.geomean else "row"}
        if self.times is None:
            return row | {"status": self.problem}
        for name in ("fastseq", "baseline"):
            timing = self.times[name]
            row[f"{name}_ms"] = f"{timing.median * 1e3:.4g}"
            row[f"{name}_q1_ms"] = f"{timing.low * 1e3:.4g}"
            row[f"{name}_q3_ms"] = f"{timing.high * 1e3:.4g}"
        for name in (*baselines.OTHERS, *baselines.COMPILE):
            row[f"{name}_ms"] = self.milliseconds(name)
        part = self.peak_part
        return row | {
            "status": "ok",
            "ratio": f"{self.ratio:.3f}",
            "gflops": f"{self.gflops:.1f}",
            "peak_gflops": "" if math.isnan(self.peak) else f"{self.peak:.0f}",
            "peak_part": "" if math.isnan(part) else f"{part:.3f}",
            "rounds": self.times["fastseq"].rounds,
        }


def geomean(row: Row, rows: list[Row]) -> float | None:
    """Of the ratios that share the row's target; None while one of them is missing."""

    def key(m: shapes.Measurement) -> tuple[object, ...]:
        return m.cell, m.group, m.variant, m.geomean

    wanted = {m for m in shapes.measurements() if key(m) == key(row.what)}
    ratios = {r.what: r.ratio for r in rows if r.what in wanted and r.times}
    if len(ratios) < len(wanted):
        return None
    return math.exp(sum(map(math.log, ratios.values())) / len(ratios))


def met(row: Row, rows: list[Row]) -> str:
    """ "yes", "no", or nothing where there is no target, or not all that it is of."""
    if row.what.target is None:
        return ""
    if row.times is None:
        return "no"
    reached = geomean(row, rows) if row.what.geomean else row.ratio
    if reached is None:
        return ""
    return "yes" if reached >= row.what.target else "no"


def against(m: shapes.Measurement, tested: Subject) -> tuple[Subject, str, int]:
    """What a measurement's baseline runs: subject, side, and how many such calls it stands for."""
    if m.baseline == "padded":
        return subject(m, padded=True), "fastseq", 1
    if m.variant == "long":
        return subject(m, T=m.sizes[0] // 10), "fastseq", 10
    return tested, "torch", 1


def measure(m: shapes.Measurement, seconds: float, compile: bool) -> Row:
    """Time one measurement, already checked."""
    tested = subject(m)
    other, side, calls = against(m, tested)
    theirs = other.module(side)
    once = other.step(theirs, m.mode)
    pair = {"fastseq": tested.step(tested.module("fastseq"), m.mode), "baseline": once}
    before = peak_gflops(PEAK_SECONDS)
    times = interleaved(pair, seconds)
    peak = (before + peak_gflops(PEAK_SECONDS)) / 2
    if calls > 1:
        timing = times["baseline"]
        scaled = (calls * timing.median, calls * timing.low, calls * timing.high)
        times["baseline"] = Timing(*scaled, timing.rounds)
    row = Row(m, tested.tokens, times=times, peak=peak)
    if m.baseline != "torch" or m.group == "packed":
        return row
    for name, make in (baselines.OTHERS | (baselines.COMPILE if compile else {})).items():
        if name in baselines.OTHERS and m.group == "cells":
            continue
        try:
            call = make(theirs, m.mode)
            if call is None:
                continue
            run = tested.step(call, m.mode)
            verify_results(name, run(), tested, m.mode)
        except baselines.Refused as error:
            row.untimed[name] = ("refused", str(error))
        except AssertionError as error:
            row.untimed[name] = ("wrong", str(error))
        except Exception as error:  # a compiler may fail with anything; the row is still good
            row.untimed[name] = ("error", f"{type(error).__name__}: {error}".partition("\n")[0])
        else:
            row.times |= interleaved({name: run}, seconds / 2)
    return row


def table(group: str, rows: list[Row]) -> Table:
    """Milliseconds of every side, the ratio against its target, and the part of the peak."""
    known = (*baselines.OTHERS, *baselines.COMPILE)
    others = [n for n in known if any(r.milliseconds(n) for r in rows)]
    caption = (
        "of peak: of all threads' float32 FMAs, measured just before and after; "
        f"?: quartiles {NOISY:.0%} of the median apart; "
        "g: target of the geometric mean; refused: torch.compile(fullgraph=True) cannot trace it"
    )
    shown = Table(title=f"{group}, on the CPU", caption=caption)
    for head in ("cell", "T, B, I, H", "mode", "against"):
        shown.add_column(head, no_wrap=True)
    heads = ("fastseq ms", "baseline ms", *(f"{name} ms" for name in others))
    for head in (*heads, "ratio", "target", "met", "of peak"):
        shown.add_column(head, justify="right", no_wrap=True)
    for i, row in enumerate(rows):
        m = row.what
        cells = [m.name, m.label, m.mode, m.baseline]
        target = "" if m.target is None else f"{m.target:.3g}" + ("g" if m.geomean else "")
        if row.times is None:
            cells += ["-"] * len(heads) + ["-", target, "[red]wrong", "-"]
        else:
            cells += [row.milliseconds(name) for name in ("fastseq", "baseline", *others)]
            reached = met(row, rows)
            good = reached == "yes"
            colour = "green" if good else "yellow" if row.ratio >= 1 else "red"
            doubt = "?" if row.doubtful else ""
            part = row.peak_part
            cells += [f"[{colour}]{row.ratio:.2f}{doubt}", target, reached]
            cells.append("" if math.isnan(part) else f"{part:.0%}")
        last = i + 1 == len(rows) or rows[i + 1].what.name != m.name
        shown.add_row(*cells, end_section=last)
    return shown


def measured(
    chosen: list[shapes.Measurement], seconds: float, compile: bool, console: Console
) -> list[Row]:
    """Check and time all; the modes of one size share a check."""
    rows: list[Row] = []
    answers: dict[tuple[object, ...], str] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for m in chosen:
            progress.update(task, description=f"{m.group}: {m.name} {m.label} {m.mode}")
            key = (m.group, m.cell, m.variant, m.sizes)
            try:
                if key not in answers:
                    answers[key] = ""
                    tested = subject(m)
                    verify(m, tested)
                    other = against(m, tested)[0]
                    if other is not tested:
                        verify(m, other)
                problem = answers[key]
                row = Row(m, problem=problem) if problem else measure(m, seconds, compile)
            except AssertionError as error:
                answers[key] = f"wrong: {error}"
                row = Row(m, problem=answers[key])
            rows.append(row)
            progress.advance(task)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments."""
    parser = argparse.ArgumentParser(prog="bench_recurrent", description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default="all", help=f"among {','.join(shapes.CELLS)} (all)")
    parser.add_argument("--group", default="all", help=f"among {','.join(shapes.GROUPS)} (all)")
    parser.add_argument("--rows", default="all", help="of those, by number from 1, as 1,3 (all)")
    parser.add_argument("--quick", action="store_true", help="half the time a measurement")
    parser.add_argument("--compile", action="store_true", help="torch.compile too; takes minutes")
    parser.add_argument("--threads", type=int, help="threads of torch's pool (as torch chooses)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for CSV and picture")
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 130
    try:
        chosen = shapes.select(arguments.cells, arguments.group, arguments.rows)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        arguments.output.mkdir(parents=True, exist_ok=True)
        check_writable(arguments.output)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"bench_recurrent: {error}\n")
    warning = busy()
    if warning:
        console.print(f"[yellow]These timings will mislead: {warning}.")
    about = machine() | {"load": warning or "idle"}
    console.print(", ".join(f"{key}: {value}" for key, value in about.items()))

    seconds = QUICK_SECONDS if arguments.quick else SECONDS
    rows = measured(chosen, seconds, arguments.compile, console)
    for group in shapes.GROUPS:
        of_group = [row for row in rows if row.what.group == group]
        if of_group:
            console.print(table(group, of_group))
    for row in rows:
        if row.problem:
            where = f"{row.what.name} {row.what.label} {row.what.mode}"
            console.print(f"[red]{where}: {row.problem}", highlight=False, markup=True)
    notes = {(name, *why): None for row in rows for name, why in row.untimed.items()}
    for name, word, why in notes:
        console.print(f"{name}: {word}: {why}", highlight=False, markup=False)
    everything = len(chosen) == len(list(shapes.measurements()))
    name = "recurrent_cpu" if everything and not arguments.quick else "recurrent_cpu_quick"
    path = arguments.output / name
    records = (row.record(met(row, rows)) for row in rows)
    write_csv(path.with_suffix(".csv"), COLUMNS, records, about)
    speedups(path.with_suffix(".csv"), path.with_suffix(".png"), "Recurrent layers on the CPU")
    console.print(f"Wrote {path}.csv and .png")
    return 1 if any(row.problem for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
