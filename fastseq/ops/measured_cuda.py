"""What was measured of recurrent layers on GPUs, and what follows for a call.

The table, measured_cuda.json, is data: device, by torch.cuda.get_device_name(), to rows of
``benchmarks.bench_recurrent_gpu``, which writes it. A row holds the kind of the call (cell, dtype,
form, mode), T, B and H, and milliseconds of torch's layer and of each way of csrc/cuda that serves.
A device comes into the table only once the kernels have kept their error budgets on it.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["PATH", "TABLE", "WAYS", "Kind", "dtypes", "fastest_way", "kind_of", "torchs_reason"]

PATH = Path(__file__).with_name("measured_cuda.json")
TABLE: dict[str, list[dict]] = json.loads(PATH.read_text())
WAYS = ("step", "whole", "grid")

_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


class Kind(NamedTuple):
    """Of a call, as far as the table tells them apart."""

    cell: str
    dtype: str  # "f32", "tf32" (float32 whose products may round so), "f16", "bf16", "f64"
    form: str  # "plain", "both" (directions), "stacked", "packed"
    mode: str  # "train" or "inf"


def dtypes(dtype: torch.dtype) -> tuple[str, str]:
    """What torch's layer and what our products make of it, under the user's switches."""
    if dtype != torch.float32:
        return (_NAMES[dtype],) * 2
    torchs = torch.backends.cudnn.rnn.fp32_precision == "tf32"
    ours = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return ("tf32" if torchs else "f32"), ("tf32" if ours else "f32")


def kind_of(cell: str, dtype: str, layers: int, directions: int, packed: bool, train: bool) -> Kind:
    form = (
        "packed" if packed else "stacked" if layers > 1 else "both" if directions > 1 else "plain"
    )
    return Kind(cell, dtype, form, "train" if train else "inf")


@functools.cache
def device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


class _Found(NamedTuple):
    """The row of a kind that comes nearest to a size, H first."""

    size: str
    torch: float
    way: str
    ours: float


# What was found, by what was asked for, and in which table: looking takes longer than launching.
_found: dict[tuple, _Found | None] = {}
_found_in: list[dict] = []


def _nearest(device: str, kind: Kind, torchs_dtype: str, B: int, H: int) -> _Found | None:
    if not _found_in or _found_in[0] is not TABLE or len(_found) > 4096:
        _found.clear()
        _found_in[:] = [TABLE]
    asked = device, kind, torchs_dtype, B, H
    if asked not in _found:
        _found[asked] = _look(*asked)
    return _found[asked]


def _look(device: str, kind: Kind, torchs_dtype: str, B: int, H: int) -> _Found | None:
    def of(kind: Kind) -> list[dict]:
        wanted = kind._asdict().items()
        return [row for row in TABLE.get(device, ()) if all(row[k] == v for k, v in wanted)]

    def distance(row: dict) -> tuple[float, float]:
        return abs(math.log2(max(H, 1) / row["H"])), abs(math.log2(max(B, 1) / row["B"]))

    row = min(of(kind), key=distance, default=None)
    if row is None:
        return None
    size = {k: row[k] for k in "TBH"}
    # torch's side under its own switch of precision, where that was measured at the same size.
    theirs = [r for r in of(kind._replace(dtype=torchs_dtype)) if size.items() <= r.items()]
    way, ours = min(((way, row[way]) for way in WAYS if way in row), key=lambda pair: pair[1])
    said = ", ".join(f"{k} {n}" for k, n in size.items())
    return _Found(said, (theirs or [row])[0]["torch"], way, ours)


def fastest_way(device: str, kind: Kind, B: int, H: int) -> str | None:
    """Of csrc/cuda, at the nearest size measured; None where nothing was."""
    found = _nearest(device, kind, kind.dtype, B, H)
    return None if found is None else found.way


def torchs_reason(
    device: str, kind: Kind, torchs_dtype: str, layers: int, B: int, H: int
) -> str | None:
    """Why a call is left to torch, on a GPU cuDNN; None where the kernels are to run it.

    Measured: whichever took less at the nearest size. Else cuDNN has what it has its persistent
    kernel for, and the kernels the rest.
    """
    found = _nearest(device, kind, torchs_dtype, B, H)
    if found is not None:
        if found.ours <= found.torch:
            return None
        times = f"{found.torch:.3g} ms, by `{found.way}` {found.ours:.3g} ms"
        return f"cuDNN was measured faster at {found.size}: {times}"
    persistent = kind.dtype == "f16" and kind.form == "plain" and layers == 1
    if persistent and H % 128 == 0 and B % 8 == 0 and 0 < B <= 128:
        return f"cuDNN has a persistent kernel for such a call, and none was measured on {device}"
    return None
