"""Recurrent layers and cells on the CPU against torch: each checked, then timed, then recorded.

python -m benchmarks.bench_recurrent [--cells lstm,gru] [--group layers,packed,...] [--rows 1,3]
    [--quick] [--threads 2] [--output FOLDER]

fastseq and its baseline are timed next to each other, round after round; the ratio is the median
over the rounds of the baseline's time by fastseq's in the same round (see measure.py), so it is not
quite that of the two medians, which stand beside it.
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
from benchmarks.measure import (
    Samples,
    busy,
    interleaved,
    machine,
    matmul_precision,
    peak_gflops,
)
from benchmarks.plot import speedups
from benchmarks.subjects import Subject, subject, verify, verify_results
from fastseq import _native, backends
from fastseq._files import check_writable

# Quartiles this far apart mean that something else was running.
NOISY = 0.3
SECONDS, QUICK_SECONDS = 0.75, 0.25
PEAK_SECONDS = 0.03
COLUMNS = (
    "cell group variant T B I H mode dtype status fastseq_ms fastseq_q1_ms fastseq_q3_ms baseline "
    "baseline_ms baseline_q1_ms baseline_q3_ms ratio ratio_q1 ratio_q3 target target_of met "
    "onnxruntime_ms compile_ms gflops peak_gflops peak_part rounds"
).split()


@dataclass
class Row:
    """One measurement; ``problem`` says why it has no times, ``untimed`` which baselines have none:
    "refused", "missing", "wrong" or "error", and why."""

    what: shapes.Measurement
    tokens: int = 0
    problem: str = ""
    times: dict[str, Samples] | None = None
    peak: float = math.nan  # GFLOP/s in float32 FMAs, of the same seconds
    untimed: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def ratio(self) -> Samples:
        return self.times["baseline"].over(self.times["fastseq"])

    @property
    def gflops(self) -> float:
        return self.what.flop(self.tokens) / self.times["fastseq"].median / 1e9

    @property
    def doubtful(self) -> bool:
        return self.ratio.spread > NOISY

    @property
    def peak_part(self) -> float:
        """NaN where the products are not float32's, or the peak is unknown."""
        return self.gflops / self.peak if by_float32(self.what) else math.nan

    def milliseconds(self, name: str) -> str:
        if name in self.untimed:
            return self.untimed[name][0]
        samples = (self.times or {}).get(name)
        return "" if samples is None else f"{samples.median * 1e3:.4g}"

    def record(self, met: str) -> dict[str, object]:
        m = self.what
        row = {name: getattr(m, name) for name in ("cell", "group", "variant", "mode", "dtype")}
        row |= dict(zip("TBIH", m.sizes, strict=True)) | {"baseline": m.baseline, "met": met}
        if m.target is not None:
            row |= {"target": f"{m.target:.4g}", "target_of": m.target_of}
        if self.times is None:
            return row | {"status": self.problem}
        for name in ("fastseq", "baseline"):
            samples = self.times[name]
            row[f"{name}_ms"] = f"{samples.median * 1e3:.4g}"
            row[f"{name}_q1_ms"] = f"{samples.low * 1e3:.4g}"
            row[f"{name}_q3_ms"] = f"{samples.high * 1e3:.4g}"
        for name in baselines.BASELINES:
            row[f"{name}_ms"] = self.milliseconds(name)
        part = self.peak_part
        return row | {
            "status": "ok",
            "ratio": f"{self.ratio.median:.3f}",
            "ratio_q1": f"{self.ratio.low:.3f}",
            "ratio_q3": f"{self.ratio.high:.3f}",
            "gflops": f"{self.gflops:.1f}",
            "peak_gflops": "" if math.isnan(self.peak) else f"{self.peak:.0f}",
            "peak_part": "" if math.isnan(part) else f"{part:.3f}",
            "rounds": len(self.times["fastseq"].values),
        }


def by_float32(m: shapes.Measurement) -> bool:
    """Whether its products are float32 FMAs on this machine; fewer bits without units for them
    are."""
    units = {"bf16": backends.bfloat16_units, "high": tiles}
    return m.group not in units or not units[m.group]()


def tiles() -> str:
    """By what "high" multiplies on this machine: "amx", "emulated", or "", where it is float32."""
    name = _native.tiles() if _native.loaded() else "off"
    return "" if name == "off" else name


def judged(m: shapes.Measurement) -> shapes.Measurement:
    """With the target it has on this machine."""
    return m.in_float32() if m.group == "high" and by_float32(m) else m


def geomean(row: Row, rows: list[Row]) -> float | None:
    """Of the ratios that share the row's target; None while one of them is missing."""

    def key(m: shapes.Measurement) -> tuple[object, ...]:
        return m.cell, m.group, m.variant, m.target_of

    wanted = {m for m in shapes.measurements() if key(m) == key(row.what)}
    ratios = {r.what: r.ratio.median for r in rows if r.what in wanted and r.times}
    if len(ratios) < len(wanted):
        return None
    return math.exp(sum(map(math.log, ratios.values())) / len(ratios))


def met(row: Row, rows: list[Row]) -> str:
    """ "yes", "no", or nothing where there is no target, or not all that it is of."""
    if row.what.target is None:
        return ""
    if row.times is None:
        return "no"
    reached = geomean(row, rows) if row.what.target_of == "geomean" else row.ratio.median
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


def measure(m: shapes.Measurement, seconds: float) -> Row:
    """Time one measurement, already checked."""
    tested = subject(m)
    other, side, calls = against(m, tested)
    theirs = other.module(side)
    once = other.step(theirs, m.mode)
    pair = {"fastseq": tested.step(tested.module("fastseq"), m.mode), "baseline": once}
    before = peak_gflops(PEAK_SECONDS)
    times = interleaved(pair, seconds)
    peak = (before + peak_gflops(PEAK_SECONDS)) / 2
    times["baseline"] = times["baseline"].scaled(calls)
    row = Row(m, tested.tokens, times=times, peak=peak)
    if m.baseline != "torch":
        return row
    for name, make in baselines.BASELINES.items():
        try:
            call = make(theirs, m)
            if call is None:
                continue
            run = tested.step(call, m.mode)
            verify_results(name, run(), tested, m.mode)
        except baselines.Untimed as error:
            row.untimed[name] = (error.word, str(error))
        except AssertionError as error:
            row.untimed[name] = ("wrong", str(error))
        except Exception as error:  # a compiler may fail with anything; the row is still good
            row.untimed[name] = ("error", f"{type(error).__name__}: {error}".partition("\n")[0])
        else:
            row.times |= interleaved({name: run}, seconds / 2)
    return row


def table(group: str, rows: list[Row]) -> Table:
    """Milliseconds of every side, the ratio against its target, and the part of the peak."""
    others = [n for n in baselines.BASELINES if any(r.milliseconds(n) for r in rows)]
    caption = (
        "ratio: median of the rounds' ratios; "
        "of peak: of all threads' float32 FMAs, measured just before and after; "
        f"?: quartiles of the ratio {NOISY:.0%} apart; g: target of the geometric mean; "
        "f: target of the float32 row, for want of AMX; "
        "words for times: a baseline that did not run, see below"
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
        mark = {"geomean": "g", "float32 row": "f"}.get(m.target_of, "")
        target = "" if m.target is None else f"{m.target:.3g}{mark}"
        if row.times is None:
            cells += ["-"] * len(heads) + ["-", target, "[red]wrong", "-"]
        else:
            cells += [row.milliseconds(name) for name in ("fastseq", "baseline", *others)]
            reached = met(row, rows)
            good = reached == "yes"
            ratio = row.ratio.median
            colour = "green" if good else "yellow" if ratio >= 1 else "red"
            doubt = "?" if row.doubtful else ""
            part = row.peak_part
            cells += [f"[{colour}]{ratio:.2f}{doubt}", target, reached]
            cells.append("" if math.isnan(part) else f"{part:.0%}")
        last = i + 1 == len(rows) or rows[i + 1].what.name != m.name
        shown.add_row(*cells, end_section=last)
    return shown


def measured(chosen: list[shapes.Measurement], seconds: float, console: Console) -> list[Row]:
    """Check and time all; the modes of one size share a check."""
    rows: list[Row] = []
    answers: dict[tuple[object, ...], str] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("", total=len(chosen))
        for m in chosen:
            progress.update(task, description=f"{m.group}: {m.name} {m.label} {m.mode}")
            key = (m.group, m.cell, m.variant, m.sizes)
            with matmul_precision(m.precision):
                try:
                    if key not in answers:
                        answers[key] = ""
                        tested = subject(m)
                        verify(m, tested)
                        other = against(m, tested)[0]
                        if other is not tested:
                            verify(m, other)
                    problem = answers[key]
                    row = Row(m, problem=problem) if problem else measure(m, seconds)
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
    parser.add_argument("--quick", action="store_true", help="less time each, not the longest")
    parser.add_argument("--threads", type=int, help="threads of torch's pool (as torch chooses)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for CSV and picture")
    arguments = parser.parse_args(argv)
    console = Console()
    if not console.is_terminal:
        console.width = 150
    try:
        chosen = shapes.select(arguments.cells, arguments.group, arguments.rows, arguments.quick)
        if arguments.threads is not None:
            torch.set_num_threads(arguments.threads)
        arguments.output.mkdir(parents=True, exist_ok=True)
        check_writable(arguments.output)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"bench_recurrent: {error}\n")
    warning = busy()
    if warning:
        console.print(f"[yellow]These timings will mislead: {warning}.")
    about = machine() | {"high": tiles() or "float32, without AMX", "load": warning or "idle"}
    console.print(", ".join(f"{key}: {value}" for key, value in about.items()))

    seconds = QUICK_SECONDS if arguments.quick else SECONDS
    rows = measured([judged(m) for m in chosen], seconds, console)
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
