"""What the benchmarks of single operations share: arguments, gate, clock, and the table written.

Each is a list of sizes a device, and a function from a size to its rows.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks.gpu_table import write_part
from benchmarks.measure import FEWEST_ROUNDS, busy, interleaved, machine
from fastseq._files import atomic_write, check_writable

__all__ = [
    "RESULTS",
    "UNMEASURED",
    "Row",
    "command",
    "in_time",
    "milliseconds",
    "select",
    "step",
    "torchs_side",
    "unmeasured",
    "write_csv",
]

# What is not timed, clearing the caches and waiting, takes longer than a short call.
MOST_ON_A_GPU = 300
RESULTS = Path(__file__).parent / "results"


class Unmeasured(RuntimeError):
    """What a row compares with does not run."""


# Says nothing of ours.
UNMEASURED = (Unmeasured, torch.OutOfMemoryError)


def unmeasured(error: Exception) -> str:
    """A row's status for one of ``UNMEASURED``, as gpu_table reads it."""
    return f"unmeasured: {error}".splitlines()[0]


@contextlib.contextmanager
def torchs_side() -> Iterator[None]:
    """Inside runs what is no part of ours.

    Raises:
        Unmeasured: it failed.
    """
    try:
        yield
    except RuntimeError as error:
        raise Unmeasured(f"torch's side: {error}".splitlines()[0]) from error


@dataclass
class Row:
    """What one row of the table is about, and ``measure``, which checks and then times it.

    ``measure(seconds)`` returns further columns, or raises AssertionError if an answer is wrong.
    Rows of the least ``rank`` come first; one with another's labels takes its place in the table.
    """

    labels: dict[str, object]
    measure: Callable[[float], dict[str, object]]
    rank: int = 0

    def record(self, seconds: float) -> dict[str, object]:
        try:
            return self.labels | {"status": "ok"} | self.measure(seconds)
        except AssertionError as error:
            return self.labels | {"status": f"wrong: {error}"}
        except UNMEASURED as error:
            return self.labels | {"status": unmeasured(error)}
        # A row that cannot run, for want of memory or a compiler, must not take others with it.
        except Exception as error:
            traceback.print_exc()
            said = " ".join(str(error).split())[:200]
            return self.labels | {"status": f"failed: {type(error).__name__}: {said}"}


def select(sizes: list, chosen: str) -> list:
    """The sizes named by a list such as ``1,3`` (counted from 1), or ``all``.

    Raises:
        ValueError: not a number, or no such row.
    """
    if chosen == "all":
        return sizes
    picked = []
    for word in chosen.split(","):
        if not word.strip().isdigit() or not 1 <= int(word) <= len(sizes):
            raise ValueError(f"expected rows from 1 to {len(sizes)}, got {word.strip()!r}")
        picked.append(sizes[int(word) - 1])
    return picked


def step(call: Callable, case: object, mode: str) -> Callable[[], object]:
    """What one sample runs on a case's inputs: forward without a graph, or forward and backward."""
    leaves = [t.clone().requires_grad_(mode == "train") for t in case.inputs.values()]

    def infer() -> object:
        with torch.no_grad():
            return call(*leaves)

    def train() -> object:
        return torch.autograd.grad(call(*leaves), leaves, case.cotangents)

    return train if mode == "train" else infer


def milliseconds(
    calls: dict[str, Callable[[], object]], device: str, seconds: float
) -> dict[str, float]:
    """Median milliseconds of each call, all in turn: by events on a GPU, else by the clock."""
    if device == "cuda":
        return _by_events(calls, seconds)
    return {name: timing.median * 1e3 for name, timing in interleaved(calls, seconds).items()}


def _by_events(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    spent, rounds = 0.0, 0
    while rounds < FEWEST_ROUNDS or (spent < seconds * 1e3 and rounds < MOST_ON_A_GPU):
        for name, call in calls.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # Clears the caches, and keeps the GPU busy while the host prepares the launches.
            flush.zero_()
            begin.record()
            call()
            end.record()
            end.synchronize()
            samples[name].append(begin.elapsed_time(end))
            spent += samples[name][-1]
        rounds += 1
    return {name: median(times) for name, times in samples.items()}


def in_time(rows: Iterable, within: float | None) -> Iterator:
    """The rows, as far as time allows: none is begun that would not end ``within`` seconds if it
    took as long as the longest before it. Says how many were left."""
    began, longest = time.monotonic(), 0.0
    waiting = list(rows)
    for i, row in enumerate(waiting):
        start = time.monotonic()
        if within is not None and i and start - began + longest > within:
            print(
                f"{len(waiting) - i} of {len(waiting)} rows left: {within:g} s are up", flush=True
            )
            return
        yield row
        longest = max(longest, time.monotonic() - start)


def command(
    name: str,
    about: str,
    sizes: dict[str, list],
    columns: list[str],
    rows: Callable[[tuple, str, bool], Iterator[Row]],
    argv: list[str] | None,
    entry: Callable[[dict[str, object]], dict[str, object]] | None = None,
) -> int:
    """Run a benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments.

    Args:
        name: ``bench_<name>``, and the results' name.
        about: one line for --help.
        sizes: device to its sizes.
        columns: of the CSV, in order.
        rows: of a size, on a device, quick or not.
        argv: the command line; None: this process's.
        entry: a record as fastseq's table of measurements on GPUs has it, under ``name``; given,
            there is --table.
    """
    parser = argparse.ArgumentParser(prog=f"bench_{name}", description=about)
    parser.add_argument("--device", choices=sizes, default="cpu")
    parser.add_argument("--rows", default="all", help="sizes by number from 1, as 1,3 (all)")
    parser.add_argument("--quick", action="store_true", help="a tenth of a second a row, float32")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the CSV")
    parser.add_argument("--within", type=float, help="seconds: no row that would end later (all)")
    if entry:
        parser.add_argument("--table", type=Path, help="the table to write, such as fastseq's own")
    arguments = parser.parse_args(argv)
    device = arguments.device
    try:
        if entry and arguments.table and device != "cuda":
            raise ValueError("expected --table beside --device cuda only")
        chosen = select(sizes[device], arguments.rows)
        if device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("expected a GPU, got none: torch.cuda.is_available() is False")
        arguments.output.mkdir(parents=True, exist_ok=True)
        check_writable(arguments.output)
    except (ValueError, RuntimeError, OSError) as error:
        parser.exit(2, f"bench_{name}: {error}\n")
    ran_on = machine()
    if device == "cuda":
        ran_on["gpu"] = torch.cuda.get_device_name()
    else:
        ran_on["load"] = busy() or "idle"
    everything = arguments.rows == "all" and not arguments.quick
    path = arguments.output / f"{name}_{device}{'' if everything else '_quick'}.csv"
    found: dict[tuple, dict[str, object]] = {}
    every = itertools.chain.from_iterable(rows(size, device, arguments.quick) for size in chosen)
    for row in in_time(sorted(every, key=lambda row: row.rank), arguments.within):
        record = row.record(0.1 if arguments.quick else 0.5)
        print(record, flush=True)
        found[tuple(row.labels.items())] = record
        # Kept, should the machine's time be up before the last row.
        records = list(found.values())
        write_csv(path, columns, records, ran_on)
        if entry and arguments.table:
            write_part(arguments.table, ran_on["gpu"], name, [entry(r) for r in records])
    return 1 if any(record["status"] != "ok" for record in found.values()) else 0


def write_csv(
    path: Path, columns: list[str], records: Iterable[dict[str, object]], about: dict[str, str]
) -> None:
    """A table, what it is about in comments above it."""
    with atomic_write(path) as temporary, open(temporary, "w", newline="") as file:
        for key, value in about.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(records)
