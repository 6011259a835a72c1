"""What was measured on GPUs, and what follows for a call.

The table, measured_cuda.json, is data: device, by torch.cuda.get_device_name(), to rows of
``benchmarks.bench_recurrent_gpu`` ("recurrent") and ``benchmarks.bench_decoder`` ("decoder"), which
write it. A row holds the fields of a kind, sizes, ``torch``: milliseconds of torch's side by the
dtype of its products, and those of each way of csrc/cuda that serves ("step", ..) or of the
decoder's loop ("ours": as a CUDA graph, "replayed", and "uncaptured"); or, in place of all times,
what was ``wrong`` with ours, or why it is ``unmeasured``. A device comes into the table only once
the kernels have kept their error budgets on it.

Nothing is taken to be faster than torch that was not measured: a kind that a device's rows do not
have, or none of a size like the call's, is torch's; so is whatever was wrong. What torch has no
layer for (:func:`is_torchs`) is compared with the plain reference in the same way, and where it was
not measured goes by `step`: the products that the reference would make, and one launch a step where
that has several.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Collection, Hashable
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = [
    "PATH",
    "TABLE",
    "WAYS",
    "DecoderKind",
    "Kind",
    "Size",
    "decoders_reason",
    "dtypes",
    "fastest_way",
    "is_torchs",
    "never_slower",
    "torchs_reason",
    "unproved",
]

PATH = Path(__file__).with_name("measured_cuda.json")
TABLE: dict[str, dict[str, list[dict]]] = json.loads(PATH.read_text())
WAYS = ("step", "whole", "grid")

_NAMES = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float64: "f64"}


class Kind(NamedTuple):
    """Of a recurrent call, as far as the table tells them apart."""

    cell: str
    dtype: str  # "f32", "tf32" (float32 whose products may round so), "f16", "bf16", "f64"
    layers: int
    directions: int
    packed: bool
    projected: bool
    mode: str  # "train" or "inf"
    beyond: str = ""  # of "lengths resets zoneout", what it has


class Size(NamedTuple):
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0  # what h is projected to; 0: it is not


# Which of WAYS can run such a call on the device, both its passes.
Able = Callable[[Kind, Size], Collection[str]]


class DecoderKind(NamedTuple):
    """Of a decoder with attention."""

    cell: str
    order: str = "before"  # attention "before" the cell or "after" it, or after it and "feeding"
    score: str = "additive"  # or "dot"
    layers: int = 1
    tokens: str = "given"  # or "chosen", some of them, by the step before
    dtype: str = "f32"
    mode: str = "train"


def is_torchs(kind: Kind) -> bool:
    """Whether torch has a layer for it; else its code for it is the plain reference."""
    return kind.cell in ("lstm", "gru", "rnn_tanh", "rnn_relu") and not kind.beyond


def dtypes(dtype: torch.dtype) -> tuple[str, str]:
    """What torch's layer and what our products make of it, under the user's switches."""
    if dtype != torch.float32:
        return (_NAMES[dtype],) * 2
    torchs = torch.backends.cudnn.rnn.fp32_precision == "tf32"
    ours = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return ("tf32" if torchs else "f32"), ("tf32" if ours else "f32")


@functools.cache
def device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def _rows(device: str, part: str) -> list[dict]:
    return TABLE.get(device, {}).get(part, [])


# What was found, by what was asked for, and in which table: looking takes longer than launching.
_found: dict[tuple, object] = {}
_found_in: list[dict] = []


def _remembered(look: Callable, *asked: Hashable):
    if not _found_in or _found_in[0] is not TABLE or len(_found) > 4096:
        _found.clear()
        _found_in[:] = [TABLE]
    key = look, *asked
    found = _found.get(key, _found)
    if found is _found:
        # (Another thread may clear what is remembered at any time.)
        found = _found[key] = look(*asked)
    return found


def _is_of(row: dict, kind: NamedTuple) -> bool:
    return all(row[field] == value for field, value in kind._asdict().items())


def unproved(index: int, cell: str, dtype: str, part: str = "recurrent") -> str | None:
    """Why kernels can't be anybody's default on a device, by its index; None where they can."""
    if not TABLE:
        return "not yet measured on a device"
    return _remembered(_unproved, device_name(index), cell, dtype, part)


def _unproved(device: str, cell: str, dtype: str, part: str) -> str | None:
    if device not in TABLE:
        return f"not yet measured on {device}"
    for row in _rows(device, part):
        if "wrong" in row and (row["cell"], row["dtype"]) == (cell, dtype):
            return f"wrong when it was measured on {device}: {row['wrong']}"
    return None


# All that torch.compiler.assume_constant_result does, which imports the compiler to do it.
unproved._dynamo_marked_constant = True


def cudnn_algorithm(kind: Kind, size: Size) -> tuple[str, ...]:
    """What torch has cuDNN do, forward and in training backward: "small", "persistent" or
    "standard"; nothing where torch has no layer. Calls of different algorithms say nothing about
    each other's times.

    Source: get_algo in aten/src/ATen/native/cudnn/RNN.cpp, for devices that have all three.
    """
    if not is_torchs(kind):
        return ()
    gated = kind.cell in ("lstm", "gru")
    # Units up to which the weights fit one multiprocessor, forward and backward.
    most = (192, 128) if gated else (384, 256)
    persistent = (
        (kind.dtype, kind.layers, kind.directions) == ("f16", 1, 1)
        and kind.cell != "gru"
        and size.H <= 1024
        and size.H % 128 == size.I % 128 == size.B % 8 == 0
        and size.B <= 128
        and (gated or size.B < 96 or size.H < 896)
    )
    found = []
    for units in most[: 1 + (kind.mode == "train")]:
        if kind.packed or kind.projected:
            found.append("standard")
        elif size.H <= units and kind.dtype != "f64":
            found.append("small")
        else:
            found.append("persistent" if persistent else "standard")
    return tuple(found)


# By what factor a call's sizes may differ from a row's, and its steps fall short.
_LIKE = {"B": 4, "H": 2, "P": 2, "S": 4, "K": 2, "C": 2}
_SHORTER = 4
# Of torch's time, what ours may have taken where that was of other rows or units than the call's.
_ELSEWHERE = 0.9


def _torch_was(ours: float, theirs: float, exact: bool) -> str | None:
    """What torch was that ours does not serve for; None where it does. exact: whether rows and
    units measured were the call's."""
    if ours <= theirs * (1 if exact else _ELSEWHERE):
        return None
    return "faster" if ours > theirs else "less than 10 % slower"


class _Found(NamedTuple):
    """The row of a kind that comes nearest to a size, H first."""

    size: Size
    torch: dict[str, float]  # by the dtype of its products
    ours: dict[str, float]  # by way


def _nearest(device: str, kind: Kind, size: Size) -> _Found | None:
    # Lengths differ from batch to batch.
    return _remembered(_look, device, kind, size._replace(T=1 << max(size.T, 1).bit_length() - 1))


def _size(row: dict) -> Size:
    return Size(*(row[letter] for letter in Size._fields))


def _is_like(row: dict, letter: str, size: int) -> bool:
    if letter == "T":
        return size * _SHORTER >= row["T"]
    return _distance(row, letter, size) <= math.log2(_LIKE[letter])


def _distance(row: dict, letter: str, size: int) -> float:
    return abs(math.log2(max(size, 0.5) / row[letter]))


def _timed(device: str, part: str, kind: NamedTuple, **sizes: int) -> list[dict]:
    """Rows of a kind with such sizes, as far as they are given, that have times."""
    return [
        row
        for row in _rows(device, part)
        if "torch" in row
        and _is_of(row, kind)
        and all(_is_like(row, letter, size) for letter, size in sizes.items())
    ]


def _look(device: str, kind: Kind, size: Size) -> _Found | None:
    algorithm = cudnn_algorithm(kind, size)
    sizes = {letter: getattr(size, letter) for letter in ("TBHP" if kind.projected else "TBH")}
    like = (
        row
        for row in _timed(device, "recurrent", kind, **sizes)
        if cudnn_algorithm(kind, _size(row)) == algorithm
    )

    def distance(row: dict) -> tuple[float, float]:
        return _distance(row, "H", size.H), _distance(row, "B", size.B)

    row = min(like, key=distance, default=None)
    if row is None:
        return None
    return _Found(_size(row), row["torch"], {way: row[way] for way in WAYS if way in row})


def fastest_way(device: str, kind: Kind, size: Size, able: Able) -> str | None:
    """Of csrc/cuda, at the nearest size measured of a single layer, among those that can run the
    call; None where none was measured, but `step` of what torch has no layer for."""
    kind = kind._replace(layers=1)
    found = _nearest(device, kind, size)
    ours = [] if found is None else [way for way in found.ours if way in able(kind, size)]
    if not ours:
        return None if is_torchs(kind) or device not in TABLE else "step"
    return min(ours, key=found.ours.get)


def torchs_reason(
    device: str, kind: Kind, torchs_dtype: str, size: Size, able: Able, sampled: bool = False
) -> str | None:
    """Why a call is left to torch, on a GPU cuDNN; None where the kernels took less time, by the
    way they would go, at the nearest size measured of its kind, or as much: 10 % less where B or H
    differ from that size's, or where ``size`` is ``sampled``, but one of those a call may have."""
    found, way = _nearest(device, kind, size), fastest_way(device, kind, size, able)
    known = is_torchs(kind)
    if found is None and not known:
        return None
    ours = None if found is None else found.ours.get(way)
    theirs = None if found is None else found.torch.get(torchs_dtype if known else kind.dtype)
    if ours is None or theirs is None:
        return f"no call of such a kind and size was measured on {device}"
    at = found.size
    was = _torch_was(ours, theirs, not sampled and (at.B, at.H) == (size.B, size.H))
    if was is None:
        return None
    name = "cuDNN" if known else "plain PyTorch"
    said = ", ".join(f"{letter} {getattr(at, letter)}" for letter in "TBH")
    return f"{name} was measured {was} at {said}: {theirs:.3g} ms, by `{way}` {ours:.3g} ms"


def never_slower(
    device: str, kind: Kind, torchs_dtype: str, H: int, able: Able, P: int = 0
) -> bool:
    """Whether the kernels were faster than torch, as :func:`torchs_reason` has it of rows that are
    not the call's, at any size measured with so many units (projected to P), and there is one: of a
    call whose other sizes are not known."""
    widths = {"H": H} | ({"P": P} if kind.projected else {})
    measured = list(map(_size, _timed(device, "recurrent", kind, **widths)))
    sizes = {*measured, *(size._replace(**widths) for size in measured)}
    reasons = [torchs_reason(device, kind, torchs_dtype, size, able, True) for size in sizes]
    return bool(reasons) and not any(reasons)


def decoders_reason(
    index: int, kind: tuple[str, ...], H: int, B: int | None = None, S: int | None = None,
    T: int | None = None, K: int | None = None, C: int | None = None,
) -> str | None:  # fmt: skip
    """Why a decoder is left to torch; None where ours took less, or as much, at every size measured
    that is like its own, and there is one; 10 % less where B or H differ from that size's.

    Args:
        index: of the device.
        kind: the fields of a :class:`DecoderKind`.
        H, B, S, T, K, C: the decoder's: units, rows, positions, steps, width of keys and of values;
            None where a compiled graph does not know them.
    """
    sizes = H, B, S, T, K, C
    return _remembered(_slowest_decoder, device_name(index), DecoderKind(*kind), *sizes)


decoders_reason._dynamo_marked_constant = True


def _slowest_decoder(device: str, kind: DecoderKind, *sizes: int | None) -> str | None:
    known = {x: size for x, size in zip("HBSTKC", sizes, strict=True) if size is not None}
    rows = _timed(device, "decoder", kind, **known)
    if not rows:
        return f"no decoder of such a kind and size was measured on {device}"
    for row in rows:
        exact = known.get("B") == row["B"] and known["H"] == row["H"]
        size = ", ".join(f"{letter} {row[letter]}" for letter in "BTSH")
        # A loop of many shapes has a graph of its own for few of them, ours or torch's.
        for way, theirs in (
            ("replayed", min(row["torch"].values())), ("uncaptured", row["torch"]["eager"])
        ):  # fmt: skip
            ours = row["ours"][way]
            was = _torch_was(ours, theirs, exact)
            if was is not None:
                times = f"{theirs:.3g} ms, the kernels' loop {way} {ours:.3g} ms"
                return f"torch was measured {was} at {size}: {times}"
    return None
