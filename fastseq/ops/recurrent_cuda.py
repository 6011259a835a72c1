"""``recurrent_fwd`` and ``recurrent_bwd`` on a GPU, around the kernels of csrc/cuda.

Products over all tokens (the sums of x, the gradients of x and of the weights) are torch's GEMMs,
once a layer; what goes from step to step is one call, ``fastseq::recurrent_cuda_fwd`` or
``_bwd``. Nothing waits for the device, and nothing depends on values that only it knows, so
that a call can be captured into a CUDA graph (a packed sequence aside: its batch_sizes are on the
host). Arguments and results are those of :mod:`fastseq.ops.recurrent`; float64, float32, float16
and bfloat16, the last two carrying c, and h for cells that read it, in float32.

``first`` [T] and ``lengths`` [B], int64 on the device, say where packed tokens begin and how many
steps each sequence runs; None where tokens are T*B, and where all run T. Gradients of sums come a
row a token, for each direction [the recurrent half of gate n of a GRU, the sums over x, the cell's
parameters], H wide each.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _native

__all__ = ["ANY_WAY", "STEP", "WHOLE", "backward", "forward", "way"]

ANY_WAY, STEP, WHOLE = range(3)
way = ANY_WAY
"""How a layer goes from step to step: a launch a step, or a launch in all. Tests and benchmarks
set it."""

_CELLS = tuple(_native.cells().values()) if _native.loaded() else ()


class _Tokens(NamedTuple):
    """Where what belongs to a token lies."""

    steps: int
    rows: int
    count: int
    first: Tensor | None
    lengths: Tensor | None

    def flat(self, t: Tensor | None, *width: int) -> Tensor | None:
        return None if t is None else t.reshape(self.count, *width).contiguous()

    @property
    def has_padding(self) -> bool:
        return self.first is None and self.lengths is not None

    def without_padding(self, t: Tensor) -> Tensor:
        """t [tokens, n], zero at tokens that no sequence has: what they hold is never read, not
        even as a factor of zero."""
        if not self.has_padding:
            return t
        steps = torch.arange(self.steps, device=t.device).unsqueeze(1)
        return t.masked_fill((steps >= self.lengths).view(-1, 1), 0)


def _tokens(x: Tensor, h0: Tensor | None, batch_sizes: Tensor | None, lengths: Tensor | None):
    if batch_sizes is None:
        steps, rows = x.shape[:2]
        if lengths is not None:
            lengths = lengths.to(x.device, torch.int64, non_blocking=True).contiguous()
        return _Tokens(steps, rows, steps * rows, None, lengths)
    rows = h0.shape[1]
    # Sequence b runs at the steps whose size is above b.
    each = torch.searchsorted(-batch_sizes, -torch.arange(rows))
    where = torch.cat((batch_sizes.cumsum(0) - batch_sizes, each)).to(x.device, non_blocking=True)
    steps = len(batch_sizes)
    return _Tokens(steps, rows, len(x), where[:steps], where[steps:])


class _Weights(NamedTuple):
    """Of one direction."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor | None
    b_hh: Tensor | None
    params: Tensor | None


def _by_direction(kind, weights, has_biases: bool, directions: int) -> list[_Weights]:
    per = len(weights) // directions
    sides = []
    for d in range(directions):
        w_ih, w_hh, *rest = (w.contiguous() for w in weights[d * per : (d + 1) * per])
        biases = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
        params = rest.pop(0) if kind.params else None
        if rest:
            raise NotImplementedError(
                f"fastseq.{kind.name}: expected no projection on a GPU; torch.nn.LSTM has one"
            )
        sides.append(_Weights(w_ih, w_hh, *biases, params))
    return sides


def _wants_apart(kind) -> bool:
    """Whether the last gate has its input and recurrent sums apart: kApart of csrc/cell."""
    return kind.reference == "gru"


def _place(x: Tensor):
    """The device's context and its current stream, as a number."""
    if not x.is_cuda:
        return contextlib.nullcontext(), 0
    index = x.device.index
    other = index != torch.cuda.current_device()
    context = torch.cuda.device(index) if other else contextlib.nullcontext()
    return context, torch._C._cuda_getCurrentRawStream(index)


def _or_zeros(state: Tensor | None, like: Tensor, shape, dtype) -> Tensor:
    """A copy of a state of its own, contiguous."""
    if state is None:
        return like.new_zeros(shape, dtype=dtype)
    return state.to(dtype, memory_format=torch.contiguous_format, copy=True)


def forward(cell, x, h0, c0, weights, has_biases, directions, batch_sizes, lengths, resets, masks,
            save):  # fmt: skip
    kind, D = _CELLS[cell], directions
    sides = _by_direction(kind, weights, has_biases, D)
    H = sides[0].w_hh.shape[1]
    tokens = _tokens(x, h0, batch_sizes, lengths)
    context, stream = _place(x)
    with context:
        inputs = tokens.flat(x, x.shape[-1])
        zx, b_hh = _input_sums(kind, inputs, sides, H)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        h = _or_zeros(h0, x, (D, tokens.rows, H), x.dtype)
        c = _or_zeros(c0, x, (D, tokens.rows, H), wide) if kind.states == 2 else None
        new = x.new_zeros if tokens.has_padding else x.new_empty
        y = new(*x.shape[:-1], D * H)
        saved = x.new_empty(D, tokens.count, kind.saved * H) if save else None
        torch.ops.fastseq.recurrent_cuda_fwd(
            cell, way, stream, tokens.steps, zx, [side.w_hh for side in sides], b_hh,
            [side.params for side in sides if kind.params],
            [tokens.flat(mask, H) for mask in masks], tokens.first, tokens.lengths,
            tokens.flat(resets), h, c, y.view(tokens.count, D * H), saved,
        )  # fmt: skip
        out = [y, h]
        if kind.states == 2:
            out.append(c.to(x.dtype))
        if save:
            out.append(saved)
    return out


def _input_sums(kind, x: Tensor, sides: list[_Weights], H: int) -> tuple[Tensor, list[Tensor]]:
    """x W_ih^T and all biases [tokens, D*G*H], and the biases that must wait for the product with
    h: those of a gate whose sums stay apart."""
    w_ih = sides[0].w_ih if len(sides) == 1 else torch.cat([side.w_ih for side in sides])
    if sides[0].b_ih is None:
        return x @ w_ih.t(), []
    apart = [side.b_hh[2 * H :] for side in sides] if _wants_apart(kind) else []
    biases = []
    for side in sides:
        if apart:
            biases += [side.b_ih[: 2 * H] + side.b_hh[: 2 * H], side.b_ih[2 * H :]]
        else:
            biases.append(side.b_ih + side.b_hh)
    return torch.addmm(torch.cat(biases), x, w_ih.t()), apart


def backward(cell, dy, dh_n, dc_n, x, h0, c0, weights, has_biases, directions, batch_sizes,
             lengths, resets, masks, saved, need_dx, need_dw, need_db, need_dh0):  # fmt: skip
    kind, D = _CELLS[cell], directions
    sides = _by_direction(kind, weights, has_biases, D)
    H = sides[0].w_hh.shape[1]
    tokens = _tokens(x, h0, batch_sizes, lengths)
    apart = int(_wants_apart(kind))
    sums = kind.gates + apart
    context, stream = _place(x)
    with context:
        new = x.new_zeros if tokens.has_padding else x.new_empty
        dsums = new(tokens.count, D * (sums + kind.params) * H)
        hidden = new(D, tokens.count, H) if need_dw else None
        dh0 = x.new_empty(D, tokens.rows, H) if need_dh0 else None
        dc0 = torch.empty_like(dh0) if need_dh0 and kind.states == 2 else None
        h0, c0, dh_n, dc_n = (t if t is None else t.contiguous() for t in (h0, c0, dh_n, dc_n))
        torch.ops.fastseq.recurrent_cuda_bwd(
            cell, way, stream, tokens.steps, tokens.rows, saved.contiguous(),
            tokens.flat(dy, D * H), dh_n, dc_n, h0, c0, [side.w_hh for side in sides],
            [side.params for side in sides if kind.params],
            [tokens.flat(mask, H) for mask in masks], tokens.first, tokens.lengths,
            tokens.flat(resets), dsums, hidden, dh0, dc0,
        )  # fmt: skip
        out = [t for t in (dh0, dc0) if t is not None]
        x_rows = tokens.without_padding(tokens.flat(x, x.shape[-1])) if need_dw else None
        dx = None
        for d, side in enumerate(sides):
            rows = dsums.view(tokens.count, D, (sums + kind.params) * H)[:, d]
            of_x, of_h = rows[:, apart * H : sums * H], rows[:, : kind.gates * H]
            if need_dx:
                dx = of_x @ side.w_ih if dx is None else dx.addmm_(of_x, side.w_ih)
            grads = []
            if need_dw:
                grads = [of_x.t() @ x_rows, _in_order(of_h.t() @ hidden[d], apart * H)]
            if need_db and has_biases:
                db_ih = of_x.sum(0)
                db_hh = _in_order(of_h.sum(0), H) if apart else db_ih.clone()
                grads += [db_ih, db_hh]
            if need_dw and kind.params:
                grads.append(rows[:, sums * H :].sum(0).view(kind.params, H))
            out += grads
    return [dx.view(x.shape), *out] if need_dx else out


def _in_order(grad: Tensor, moved: int) -> Tensor:
    """Gradients whose first block, the last gate's, goes where it belongs."""
    return grad.roll(-moved, 0) if moved else grad
