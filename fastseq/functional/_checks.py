"""What is wrong with the arguments of a recurrent function, in one line."""

from __future__ import annotations

import numbers
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq.reference.rnn import CELLS

__all__ = ["NO_ZONEOUT", "Options", "check", "check_zoneout"]

# Integers: torch.compile makes inputs of a module's floats, and has to start again for them.
NO_ZONEOUT = (0, 0)


class Options(NamedTuple):
    """What a recurrent function takes beside input, states and parameters."""

    has_biases: bool = True
    num_layers: int = 1
    dropout: float = 0.0
    train: bool = False
    bidirectional: bool = False
    batch_first: bool = False
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    recompute: bool = False
    zoneout: float | tuple[float, float] = NO_ZONEOUT


def check(cell, input, hx, params, options: Options) -> Options:
    """Raise ValueError or TypeError for what doesn't fit; return options with zoneout as a pair."""
    has_biases, num_layers, dropout, _, bidirectional, batch_first, batch_sizes = options[:7]
    lengths, resets = options.lengths, options.resets
    _check_kinds(cell, input, hx, params, batch_sizes)
    if num_layers < 1:
        raise ValueError(f"fastseq.{cell}: expected num_layers of at least 1, got {num_layers}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"fastseq.{cell}: expected dropout between 0 and 1, got {dropout}")
    sides = num_layers * (2 if bidirectional else 1)
    names = param_names(cell, len(params), has_biases, num_layers, bidirectional)
    if len(names) != len(params) or len(params) % sides:
        raise ValueError(
            f"fastseq.{cell}: expected {len(names)} params ({names[0]}, ..., {names[-1]}), "
            f"got {len(params)}"
        )
    _check_dtypes(cell, input, hx, params, names)
    _check_shapes(cell, input, hx, params, names, num_layers, bidirectional, batch_first,
                  batch_sizes)  # fmt: skip
    _check_steps(cell, input, batch_first, batch_sizes)
    if lengths is not None:
        _check_lengths(cell, lengths, input, batch_first, batch_sizes)
    if resets is not None:
        _check_resets(cell, resets, input)
    return options._replace(zoneout=check_zoneout(cell, options.zoneout))


def param_names(cell, count, has_biases, num_layers, bidirectional) -> list[str]:
    """Of ``params``, in their order: torch's names, weight_hr where the count asks for it."""
    sides = ("", "_reverse") if bidirectional else ("",)
    kinds = ["weight_ih", "weight_hh", *(("bias_ih", "bias_hh") if has_biases else ())]
    kinds += CELLS[cell].extras
    if CELLS[cell].states == 2 and count == (len(kinds) + 1) * num_layers * len(sides):
        kinds.append("weight_hr")
    return [f"{k}_l{layer}{side}" for layer in range(num_layers) for side in sides for k in kinds]


def check_zoneout(cell, zoneout) -> tuple[float, float]:
    """The probabilities for h and for c."""
    pair = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)
    if not all(isinstance(p, (int, float, numbers.Real)) for p in pair):
        raise TypeError(
            f"fastseq.{cell}: expected zoneout as a number or a pair of numbers, got {zoneout!r}"
        )
    if len(pair) != 2 or not all(0 <= p <= 1 for p in pair):
        raise ValueError(
            f"fastseq.{cell}: expected zoneout between 0 and 1, one or a pair, got {zoneout}"
        )
    if any(pair) and cell not in ("lstm", "gru"):
        raise NotImplementedError(f"fastseq.{cell}: zoneout is there for lstm and gru only")
    return pair


def _check_kinds(cell, input, hx, params, batch_sizes):
    def expect(what, kind, got):
        raise TypeError(f"fastseq.{cell}: expected {what} to be {kind}, got {type(got).__name__}")

    if not isinstance(input, Tensor):
        expect("input", "a tensor", input)
    if CELLS[cell].states == 1:
        if hx is not None and not isinstance(hx, Tensor):
            expect("hx", "a tensor or None", hx)
    else:
        if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
            expect("hx", "a pair (h0, c0) or None", hx)
        if not all(isinstance(t, Tensor) for t in (hx or ())):
            expect("hx", "a pair of tensors", hx)
    if isinstance(params, Tensor) or not all(isinstance(p, Tensor) for p in params):
        expect("params", "a flat sequence of tensors", params)
    if batch_sizes is not None and not isinstance(batch_sizes, Tensor):
        expect("batch_sizes", "an int64 tensor or None", batch_sizes)


def _states(hx):
    if isinstance(hx, Tensor):
        return {"hx": hx}
    return dict(zip(("hx[0]", "hx[1]"), hx or (), strict=False))


def _check_dtypes(cell, input, hx, params, names):
    if torch.is_autocast_enabled(input.device.type):
        return
    for name, tensor in _states(hx).items():
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"fastseq.{cell}: expected {name} of dtype {input.dtype}, got {tensor.dtype}"
            )
    for name, tensor in zip(names, params, strict=True):
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"fastseq.{cell}: expected {name} of the input's dtype {input.dtype}, "
                f"got {tensor.dtype}; convert one with .to()"
            )


def _check_shapes(cell, input, hx, params, names, num_layers, bidirectional, batch_first,
                  batch_sizes):  # fmt: skip
    kind = CELLS[cell]

    def expect(what, symbols, shape, tensor):
        if list(tensor.shape) != list(shape):
            raise ValueError(
                f"fastseq.{cell}: expected {what} of shape {symbols} = {list(shape)}, "
                f"got {list(tensor.shape)}"
            )

    layout = "[N, I]" if batch_sizes is not None else "[B, T, I]" if batch_first else "[T, B, I]"
    if input.dim() != (2 if batch_sizes is not None else 3):
        raise ValueError(
            f"fastseq.{cell}: expected input of shape {layout}, got {list(input.shape)}"
        )
    G, gates = kind.gates, "" if kind.gates == 1 else f"{kind.gates}*"
    projection = next(
        (p for n, p in zip(names, params, strict=True) if n.startswith("weight_hr")), None
    )
    widths = params[1] if projection is None else projection
    if widths.dim() != 2:
        raise ValueError(
            f"fastseq.{cell}: expected {names[1]} of shape [{gates}H, H], got {list(widths.shape)}"
        )
    H = widths.shape[1]
    P, p = (H, "H") if projection is None else (projection.shape[0], "P")
    inputs, D = input.shape[-1], 2 if bidirectional else 1
    for name, tensor in zip(names, params, strict=True):
        own = next((shape for kind, shape in kind.extras.items() if name.startswith(kind)), None)
        if own is not None:
            expect(name, "[..., H]", own(H), tensor)
        elif name.startswith("bias"):
            expect(name, f"[{gates}H]", [G * H], tensor)
        elif name.startswith("weight_hh"):
            expect(name, f"[{gates}H, {p}]", [G * H, P], tensor)
        elif name.startswith("weight_hr"):
            expect(name, "[P, H]", [P, H], tensor)
        elif name.startswith("weight_ih_l0"):
            expect(name, f"[{gates}H, I]", [G * H, inputs], tensor)
        else:
            expect(name, f"[{gates}H, D*{p}]", [G * H, D * P], tensor)
    if batch_sizes is None:
        batch = input.shape[0 if batch_first else 1]
    else:
        _check_batch_sizes(cell, batch_sizes, input.shape[0])
        batch = int(batch_sizes[0]) if len(batch_sizes) else 0
    for (name, state), (symbol, width) in zip(
        _states(hx).items(), ((p, P), ("H", H)), strict=False
    ):
        expect(name, f"[L*D, B, {symbol}]", [num_layers * D, batch, width], state)


def _check_steps(cell, input, batch_first, batch_sizes):
    # In torch's words and kind; a compiled graph takes what comes.
    steps = input.shape[1 if batch_first else 0] if batch_sizes is None else len(batch_sizes)
    if not torch.compiler.is_compiling() and steps == 0:
        raise RuntimeError(
            f"fastseq.{cell}: expected sequence length to be larger than 0 in RNN, got input of "
            f"shape {list(input.shape)}"
        )


def _check_batch_sizes(cell, batch_sizes, rows):
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise TypeError(
            f"fastseq.{cell}: expected batch_sizes as int64 [T] on the CPU, got "
            f"{batch_sizes.dtype} {list(batch_sizes.shape)} on {batch_sizes.device}"
        )
    if torch.compiler.is_compiling():
        return
    sizes = batch_sizes.tolist()
    falling = all(a >= b >= 1 for a, b in zip(sizes, sizes[1:], strict=False))
    if not falling or sum(sizes) != rows or (sizes and sizes[0] < 1):
        raise ValueError(
            f"fastseq.{cell}: expected batch_sizes to be positive, never increasing and to sum to "
            f"the {rows} rows of input, got {sizes if len(sizes) < 20 else [*sizes[:20], '...']}"
        )


def _check_lengths(cell, lengths, input, batch_first, batch_sizes):
    if batch_sizes is not None:
        raise ValueError(f"fastseq.{cell}: expected lengths or batch_sizes, got both")
    batch, steps = input.shape[:2] if batch_first else (input.shape[1], input.shape[0])
    placed = isinstance(lengths, Tensor) and (lengths.is_cpu or lengths.device == input.device)
    if not placed or lengths.dtype != torch.int64:
        got = f"{lengths.dtype} on {lengths.device}" if isinstance(lengths, Tensor) else lengths
        raise TypeError(f"fastseq.{cell}: expected lengths as int64 [B] on the CPU, got {got}")
    if list(lengths.shape) != [batch]:
        raise ValueError(
            f"fastseq.{cell}: expected lengths of shape [B] = [{batch}], got {list(lengths.shape)}"
        )
    # A look at what a GPU holds would wait for it.
    if torch.compiler.is_compiling() or not batch or not lengths.is_cpu:
        return
    low, high = (int(v) for v in torch.aminmax(lengths))
    if low < 0 or high > steps:
        raise ValueError(
            f"fastseq.{cell}: expected lengths between 0 and T = {steps}, "
            f"got {low if low < 0 else high}"
        )


def _check_resets(cell, resets, input):
    if not isinstance(resets, Tensor) or resets.dtype != torch.bool:
        got = resets.dtype if isinstance(resets, Tensor) else type(resets).__name__
        raise TypeError(f"fastseq.{cell}: expected resets as a bool tensor, got {got}")
    if resets.shape != input.shape[:-1] or resets.device != input.device:
        raise ValueError(
            f"fastseq.{cell}: expected resets of shape {list(input.shape[:-1])} on {input.device}, "
            f"got {list(resets.shape)} on {resets.device}"
        )
