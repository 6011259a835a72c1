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


def _nearest(device: str, kind: Kind, B: int, H: int) -> dict | None:
    """The row of the kind whose H, then B, comes nearest; None where there is none."""

    def distance(row):
        return abs(math.log2(max(H, 1) / row["H"])), abs(math.log2(max(B, 1) / row["B"]))

    rows = [r for r in TABLE.get(device, ()) if all(r[k] == v for k, v in kind._asdict().items())]
    return min(rows, key=distance, default=None)


def _ours(row: dict) -> tuple[str, float]:
    """The way that took least, and its time."""
    return min(((way, row[way]) for way in WAYS if way in row), key=lambda pair: pair[1])


def fastest_way(device: str, kind: Kind, B: int, H: int) -> str | None:
    """Of csrc/cuda, at the nearest size measured; None where nothing was."""
    row = _nearest(device, kind, B, H)
    return None if row is None else _ours(row)[0]


def torchs_reason(
    device: str, kind: Kind, torchs_dtype: str, layers: int, B: int, H: int
) -> str | None:
    """Why a call is left to torch, on a GPU cuDNN; None where the kernels are to run it.

    Measured: whichever took less at the nearest size. Else cuDNN has what it has its persistent
    kernel for, and the kernels the rest.
    """
    row = _nearest(device, kind, B, H)
    if row is not None:
        theirs = row["torch"]
        for other in TABLE[device]:
            of_torch = kind._replace(dtype=torchs_dtype)._asdict()
            if all(other[k] == v for k, v in (of_torch | {k: row[k] for k in "TBH"}).items()):
                theirs = other["torch"]
        way, ours = _ours(row)
        if ours <= theirs:
            return None
        size = ", ".join(f"{k} {row[k]}" for k in "TBH")
        return f"cuDNN was measured faster at {size}: {theirs:.3g} ms, by `{way}` {ours:.3g} ms"
    persistent = kind.dtype == "f16" and kind.form == "plain" and layers == 1
    if persistent and H % 128 == 0 and B % 8 == 0 and 0 < B <= 128:
        return f"cuDNN has a persistent kernel for such a call, and none was measured on {device}"
    return None
