"""Timing: interleaved, adaptive, honest about the machine it ran on.

A machine that others share changes its speed from second to second, by more than two sides differ.
They are therefore compared within a round, where their samples stand next to each other in time:
a ratio is the median over the rounds of one side's sample by the other's, not the ratio of two
medians, each of which may come from another moment. That does nothing against what strikes single
samples: on two virtual cores ratios of 7 rounds moved by 5 to 17 % (standard deviation, of medians
as of pairs), of 14 rounds by 4 to 10 %.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import torch

from fastseq import _native, backends

__all__ = ["Samples", "busy", "interleaved", "machine", "matmul_precision", "peak_gflops"]

# A sample shorter than this would measure the clock and the interpreter's jitter.
SAMPLE_SECONDS = 5e-3
# OpenMP's workers spin for up to 20 ms after a parallel region before they sleep, and take half a
# core from whoever runs next on its hyper-thread: one side must not be timed under the other's.
SETTLE_SECONDS = 25e-3
# What wakes its workers and fills its caches (about 1 ms) in less than a part in a hundred of its
# time needs no call beforehand.
LONG_SECONDS = 0.1
FEWEST_ROUNDS, MOST_ROUNDS = 7, 1000


@dataclass(frozen=True)
class Samples:
    """One a round, in the order of the rounds: seconds a call, or how two calls compare."""

    values: tuple[float, ...]

    def _quartile(self, place: int) -> float:
        return quantiles(self.values, n=4, method="inclusive")[place]

    @property
    def low(self) -> float:
        return self._quartile(0)

    @property
    def median(self) -> float:
        return self._quartile(1)

    @property
    def high(self) -> float:
        return self._quartile(2)

    @property
    def spread(self) -> float:
        """Distance between the quartiles as a part of the median."""
        return (self.high - self.low) / self.median

    def scaled(self, calls: int) -> Samples:
        """Of so many such calls one after the other."""
        return Samples(tuple(calls * value for value in self.values))

    def over(self, other: Samples) -> Samples:
        """These by the other's of the same rounds."""
        return Samples(tuple(a / b for a, b in zip(self.values, other.values, strict=True)))


@contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Inside, torch's switch of float32 products stands at ``name``."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _seconds(call: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


def interleaved(calls: dict[str, Callable[[], object]], seconds: float) -> dict[str, Samples]:
    """Time every call in turn, round after round, so that all meet the same machine.

    Args:
        calls: what to time, by name.
        seconds: time to spend in all, warm-up included; each call gets at least 7 samples.

    Returns:
        Samples for each name, over the same rounds.
    """
    start = time.perf_counter()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _without_garbage_collection():
        repeat, warm = {}, {}
        for name, call in calls.items():
            once = _seconds(call, 1)
            once = min(once, *(_seconds(call, 1) for _ in range(1 if once > LONG_SECONDS else 2)))
            repeat[name] = max(1, math.ceil(SAMPLE_SECONDS / once))
            warm[name] = once <= LONG_SECONDS
            if warm[name]:
                _seconds(call, repeat[name])
        order = list(calls)
        for round_number in range(MOST_ROUNDS):
            if round_number >= FEWEST_ROUNDS and time.perf_counter() - start > seconds:
                break
            # What runs first finds the caches of the last; take turns at that too.
            for name in order if round_number % 2 else reversed(order):
                time.sleep(SETTLE_SECONDS)
                if warm[name]:
                    # Wakes this side's own workers and fills its caches.
                    _seconds(calls[name], 1)
                samples[name].append(_seconds(calls[name], repeat[name]))
    return {name: Samples(tuple(times)) for name, times in samples.items()}


def peak_gflops(seconds: float = 0.1) -> float:
    """The rate of float32 FMAs on registers alone, on all threads of torch's pool at once, GFLOP/s.

    With the instruction set in use. What threads reach together changes where they share a core, or
    the machine with others, so it is to be measured beside what it is compared with. NaN without
    the native library.
    """
    if not _native.loaded():
        return math.nan
    measure = _native.library().fastseq_peak_flops_f32
    measure.restype, measure.argtypes = ctypes.c_double, (ctypes.c_char_p, ctypes.c_double)
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads) as pool:  # ctypes lets go of the interpreter meanwhile
        rates = pool.map(measure, [_native.isa().encode()] * threads, [seconds] * threads)
        return sum(rates) / 1e9


def busy(seconds: float = 0.5) -> str | None:
    """Why timings taken now would mislead, or None.

    Another process shows in the load average, or as loops of Python that take longer than the
    shortest of them: a core taken away for a time slice stretches a loop many times over.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    loops, until = [], time.perf_counter() + seconds
    while time.perf_counter() < until:
        loops.append(_seconds(lambda: sum(range(1000)), 20))
    lost = 1 - min(loops) * len(loops) / sum(loops)
    if load > 0.5:
        return f"the load average is {load:.2f}; an idle machine stands below 0.5"
    if lost > 0.15:
        return f"{lost:.0%} of the time of an idle loop went elsewhere"
    return None


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, str]:
    """What a reader needs in order to compare: processor, threads, versions, instruction set."""
    return {
        "cpu": _cpu_model(),
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "isa": _native.isa() if _native.loaded() else f"none: {_native.why_not_loaded()}",
        "matmul precision": backends.float32_matmul_precision(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
