"""``recurrent_fwd`` and ``recurrent_bwd`` on a GPU, around the kernels of csrc/cuda.

Products over all tokens (the sums of x, the gradients of x and of the weights) are torch's GEMMs,
once a layer; what goes from step to step is one call, ``fastseq::recurrent_cuda_fwd`` or
``_bwd``. Nothing waits for the device, and nothing depends on values that only it knows, so
that a call can be captured into a CUDA graph (a packed sequence aside: its batch_sizes are on the
host). Arguments and results are those of :mod:`fastseq.ops.recurrent`; float64, float32, float16
and bfloat16, the last two carrying c, and h for cells that read it, in float32. Projected layers
run their steps before projection, by the product of both weights.

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

__all__ = [
    "ANY_WAY",
    "GRID",
    "STEP",
    "WHOLE",
    "backward",
    "current_stream",
    "forward",
    "in_order",
    "on_device",
    "sum_biases",
    "wants_apart",
    "way",
]

ANY_WAY, STEP, WHOLE, GRID = range(4)
way = ANY_WAY
"""How a layer goes from step to step: launches a step, or one launch in all with the weights in a
block or in several. Tests and benchmarks set it."""

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
    w_hr: Tensor | None

    def recurrent(self) -> Tensor:
        """What the steps multiply h by. Where y = W_hr h is what is handed on, they run on h itself
        by W_hh W_hr: any way of running serves, and projecting can wait for the end."""
        return self.w_hh if self.w_hr is None else self.w_hh @ self.w_hr


def _by_direction(kind, weights, has_biases: bool, directions: int) -> list[_Weights]:
    per = len(weights) // directions
    sides = []
    for d in range(directions):
        w_ih, w_hh, *rest = (w.contiguous() for w in weights[d * per : (d + 1) * per])
        biases = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
        params = rest.pop(0) if kind.params else None
        if rest and (kind.masks or _normalises(kind)):
            what = "zoneout" if kind.masks else "layer normalisation"
            raise NotImplementedError(
                f"fastseq.{kind.name}: expected no projection beside {what} on a GPU; "
                "use_backend('torch') has both"
            )
        sides.append(_Weights(w_ih, w_hh, *biases, params, rest.pop() if rest else None))
    return sides


class _Ends(NamedTuple):
    """Where the sequences begin and end, on a direction's walk."""

    first: Tensor  # each one's first token, [rows]
    last: Tensor
    enters: Tensor  # whether its initial state reaches a step, [rows, 1]
    leaves: Tensor  # whether its final one comes of a step
    empty: Tensor  # whether it has no steps


def _ends(tokens: _Tokens, resets: Tensor | None, reverse: bool, like: Tensor) -> _Ends:
    rows = torch.arange(tokens.rows, device=like.device)
    latest = rows.new_full((tokens.rows,), tokens.steps - 1)
    empty = rows < 0
    if tokens.lengths is not None:
        latest, empty = (tokens.lengths - 1).clamp(min=0), tokens.lengths == 0
    latest = rows + (latest * tokens.rows if tokens.first is None else tokens.first[latest])
    some = ~empty.unsqueeze(1)
    # A reset at step 0 stands before the first step, and behind the last of a walk back.
    uncut = some if resets is None else some & ~resets.reshape(-1, 1)[: tokens.rows]
    if reverse:
        return _Ends(latest, rows, some, uncut, ~some)
    return _Ends(rows, latest, uncut, some, ~some)


def wants_apart(kind) -> bool:
    """Whether the last gate has its input and recurrent sums apart: kApart of csrc/cell."""
    return kind.reference == "gru"


def _normalises(kind) -> bool:
    """Whether sums over x and over h are normalised, each alone: biases are added behind that."""
    return kind.reference == "layer_norm_lstm"


def _params(kind, side: _Weights) -> Tensor:
    """The cell's parameters, and behind them the biases that its kernels add."""
    if not _normalises(kind):
        return side.params
    shape = kind.gates, side.params.shape[1]
    if side.b_ih is None:
        return torch.cat((side.params, side.params.new_zeros(shape)))
    return torch.cat((side.params, (side.b_ih + side.b_hh).view(shape)))


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which the tensor's device is the current one."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(x.device.index)


def current_stream(x: Tensor) -> int:
    """The current stream of the tensor's device, as a number."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0


def sum_biases(kind, b_ih: Tensor | None, b_hh: Tensor | None):
    """A layer's biases [G*H] as far as they can be added beforehand, and, in a list, that of a gate
    whose sums stay apart: it must wait for the product with h."""
    if b_ih is None:
        return None, []
    if not wants_apart(kind):
        return b_ih + b_hh, []
    H = b_ih.shape[0] // kind.gates
    return torch.cat((b_ih[: 2 * H] + b_hh[: 2 * H], b_ih[2 * H :])), [b_hh[2 * H :]]


def _or_zeros(state: Tensor | None, like: Tensor, shape, dtype) -> Tensor:
    """A copy of a state of its own, contiguous."""
    if state is None:
        return like.new_zeros(shape, dtype=dtype)
    return state.to(dtype, memory_format=torch.contiguous_format, copy=True)


def forward(cell, x, h0, c0, weights, has_biases, directions, batch_sizes, lengths, resets, masks,
            save):  # fmt: skip
    kind, D = _CELLS[cell], directions
    sides = _by_direction(kind, weights, has_biases, D)
    H = sides[0].w_ih.shape[0] // kind.gates
    projected = sides[0].w_hr is not None
    tokens = _tokens(x, h0, batch_sizes, lengths)
    stream = current_stream(x)
    with on_device(x):
        inputs = tokens.flat(x, x.shape[-1])
        zx, b_hh = _input_sums(kind, inputs, sides)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        ends = []
        if projected and tokens.steps:
            ends = [_ends(tokens, resets, d == 1, x) for d in range(D)]
            _add_initial_sums(zx, h0, sides, ends)
        h = _or_zeros(None if projected else h0, x, (D, tokens.rows, H), x.dtype)
        c = _or_zeros(c0, x, (D, tokens.rows, H), wide) if kind.states == 2 else None
        new = x.new_zeros if tokens.has_padding else x.new_empty
        width = kind.saved * H
        # Of a projected layer h is kept too, behind the rest.
        saved = x.new_empty(D, tokens.count, width + H * projected) if save else None
        y = new(tokens.count, D * H)
        torch.ops.fastseq.recurrent_cuda_fwd(
            cell, way, stream, tokens.steps, zx, [side.recurrent() for side in sides], b_hh,
            [_params(kind, side) for side in sides if kind.params],
            [tokens.flat(mask, H) for mask in masks], tokens.first, tokens.lengths,
            tokens.flat(resets), h, c, y, _kept_by_cells(saved, width),
        )  # fmt: skip
        if projected:
            if save:
                saved.view(-1)[D * tokens.count * width :] = y.view(-1)
            y, h = _project(y, h, h0, sides, ends)
        out = [y.view(*x.shape[:-1], y.shape[1]), h]
        if kind.states == 2:
            out.append(c.to(x.dtype))
        if save:
            out.append(saved)
    return out


def _kept_by_cells(saved: Tensor | None, width: int) -> Tensor | None:
    """The part of saved [D, tokens, ..] that the kernels know, [D, tokens, width]."""
    if saved is None or saved.shape[2] == width:
        return saved
    D, tokens, _ = saved.shape
    return saved.view(-1)[: D * tokens * width].view(D, tokens, width)


def _add_initial_sums(zx, h0, sides: list[_Weights], ends: list[_Ends]) -> None:
    """A projected layer's steps begin at zero: what h0 adds to the first sums goes in there."""
    if h0 is None:
        return
    for d, (side, each) in enumerate(zip(sides, ends, strict=True)):
        sums = (h0[d] @ side.w_hh.t()).masked_fill_(~each.enters, 0)
        of_side = zx.view(zx.shape[0], len(sides), -1)[:, d]
        of_side[each.first] = of_side[each.first] + sums


def _project(y, h, h0, sides: list[_Weights], ends: list[_Ends]) -> tuple[Tensor, Tensor]:
    """y [tokens, D*P] and the final states [D, rows, P] from those before projection."""
    by_side = y.chunk(len(sides), 1)
    y = torch.cat([t @ s.w_hr.t() for t, s in zip(by_side, sides, strict=True)], 1)
    final = torch.stack([t @ s.w_hr.t() for t, s in zip(h, sides, strict=True)])
    if h0 is not None:
        if not ends:
            return y, h0.clone()
        for d, each in enumerate(ends):
            final[d] = torch.where(each.empty, h0[d], final[d])
    return y, final


def _input_sums(kind, x: Tensor, sides: list[_Weights]) -> tuple[Tensor, list[Tensor]]:
    """x W_ih^T and biases [tokens, D*G*H], and those biases that :func:`sum_biases` leaves out."""
    w_ih = sides[0].w_ih if len(sides) == 1 else torch.cat([side.w_ih for side in sides])
    if _normalises(kind):
        return x @ w_ih.t(), []
    biases, apart = zip(*(sum_biases(kind, side.b_ih, side.b_hh) for side in sides), strict=True)
    if biases[0] is None:
        return x @ w_ih.t(), []
    return torch.addmm(torch.cat(biases), x, w_ih.t()), [bias for each in apart for bias in each]


def backward(cell, dy, dh_n, dc_n, x, h0, c0, weights, has_biases, directions, batch_sizes,
             lengths, resets, masks, saved, need_dx, need_dw, need_db, need_dh0):  # fmt: skip
    kind, D = _CELLS[cell], directions
    sides = _by_direction(kind, weights, has_biases, D)
    H = sides[0].w_ih.shape[0] // kind.gates
    tokens = _tokens(x, h0, batch_sizes, lengths)
    # Blocks of a row: sums over h, then those over x, which share all but `apart` of them; then
    # parameters, then biases that are no part of any sum.
    apart = kind.gates if _normalises(kind) else int(wants_apart(kind))
    sums = kind.gates + apart
    own = kind.params + (kind.gates if _normalises(kind) else 0)
    stream = current_stream(x)
    with on_device(x):
        new = x.new_zeros if tokens.has_padding else x.new_empty
        dsums = new(tokens.count, D * (sums + own) * H)
        hidden = new(D, tokens.count, H) if need_dw else None
        dh0 = x.new_empty(D, tokens.rows, H) if need_dh0 else None
        dc0 = torch.empty_like(dh0) if need_dh0 and kind.states == 2 else None
        h0, c0, dh_n, dc_n = (t if t is None else t.contiguous() for t in (h0, c0, dh_n, dc_n))
        dy = None if dy is None else tokens.flat(dy, dy.shape[-1])
        projection, of_steps = None, (dy, dh_n, h0)
        if sides[0].w_hr is not None:
            projection = _Projection(sides, tokens, resets, dy, dh_n, h0, saved)
            of_steps = projection.of_steps()
        dy_h, dh_h, h0_h = of_steps
        torch.ops.fastseq.recurrent_cuda_bwd(
            cell, way, stream, tokens.steps, tokens.rows,
            _kept_by_cells(saved.contiguous(), kind.saved * H), dy_h, dh_h, dc_n, h0_h, c0,
            [side.recurrent() for side in sides],
            [_params(kind, side) for side in sides if kind.params],
            [tokens.flat(mask, H) for mask in masks], tokens.first, tokens.lengths,
            tokens.flat(resets), dsums, hidden, dh0, dc0,
        )  # fmt: skip
        x_rows = tokens.without_padding(tokens.flat(x, x.shape[-1])) if need_dw else None
        dx, of_sides, dh0_p = None, [], []
        for d, side in enumerate(sides):
            rows = dsums.view(tokens.count, D, (sums + own) * H)[:, d]
            of_x, of_h = rows[:, apart * H : sums * H], rows[:, : kind.gates * H]
            if need_dx:
                dx = of_x @ side.w_ih if dx is None else dx.addmm_(of_x, side.w_ih)
            if projection and need_dh0:
                dh0_p.append(projection.initial_gradient(d, of_h))
            grads, last = [], []
            if need_dw:
                dw_hh = in_order(of_h.t() @ hidden[d], apart * H)
                if projection:
                    dw_hh, *last = projection.weight_gradients(d, of_h, dw_hh)
                grads = [of_x.t() @ x_rows, dw_hh]
            if need_db and has_biases:
                db_ih = (rows[:, (sums + kind.params) * H :] if _normalises(kind) else of_x).sum(0)
                db_hh = in_order(of_h.sum(0), H) if wants_apart(kind) else db_ih.clone()
                grads += [db_ih, db_hh]
            if need_dw and kind.params:
                of_params = rows[:, sums * H : (sums + kind.params) * H]
                grads.append(of_params.sum(0).view(kind.params, H))
            of_sides += [*grads, *last]
        dh0 = torch.stack(dh0_p) if dh0_p else dh0
        out = [t for t in (dh0, dc0) if t is not None] + of_sides
    return [dx.view(x.shape), *out] if need_dx else out


class _Projection:
    """The backward pass of a projected layer, around that of its steps on h by W_hh W_hr."""

    def __init__(self, sides, tokens, resets, dy, dh_n, h0, saved):
        self.sides, self.dh_n, self.h0 = sides, dh_n, h0
        D, H = len(sides), sides[0].w_hr.shape[1]
        self.dy = None if dy is None else tokens.without_padding(dy).chunk(D, 1)
        self.h = saved.reshape(-1)[-tokens.count * D * H :].view(tokens.count, D, H)
        self.ends = None
        if tokens.steps:
            self.ends = [_ends(tokens, resets, d == 1, saved) for d in range(D)]

    def of_steps(self) -> tuple[Tensor | None, Tensor | None, None]:
        """dy and dh_n before projection; the steps' own initial h is zero."""
        by = [side.w_hr for side in self.sides]
        dy = dh_n = None
        if self.dy is not None:
            dy = torch.cat([g @ w for g, w in zip(self.dy, by, strict=True)], 1)
        if self.dh_n is not None:
            dh_n = torch.stack([g @ w for g, w in zip(self.dh_n, by, strict=True)])
        return dy, dh_n, None

    def _first_sums(self, d: int, of_h: Tensor) -> Tensor:
        """Gradients of the sums that h0 took part in, [rows, G*H]."""
        each = self.ends[d]
        return of_h[each.first].masked_fill_(~each.enters, 0)

    def initial_gradient(self, d: int, of_h: Tensor) -> Tensor:
        """dh0, [rows, P]."""
        if self.ends is None:
            return torch.zeros_like(self.h0[d]) if self.dh_n is None else self.dh_n[d]
        dh0 = self._first_sums(d, of_h) @ self.sides[d].w_hh
        return dh0 if self.dh_n is None else torch.where(self.ends[d].empty, self.dh_n[d], dh0)

    def weight_gradients(self, d: int, of_h: Tensor, dw: Tensor) -> tuple[Tensor, Tensor]:
        """Those of w_hh and w_hr, from that of their product."""
        side = self.sides[d]
        dw_hh, dw_hr = dw @ side.w_hr.t(), side.w_hh.t() @ dw
        if self.ends is None:
            return dw_hh, dw_hr
        if self.h0 is not None:
            dw_hh.addmm_(self._first_sums(d, of_h).t(), self.h0[d])
        if self.dy is not None:
            dw_hr.addmm_(self.dy[d].t(), self.h[:, d])
        if self.dh_n is not None:
            each = self.ends[d]
            final = self.h[each.last, d].masked_fill_(~each.leaves, 0)
            dw_hr.addmm_(self.dh_n[d].t(), final)
        return dw_hh, dw_hr


def in_order(grad: Tensor, moved: int) -> Tensor:
    """Gradients whose first block, the last gate's, goes where it belongs."""
    return grad.roll(-moved, 0) if moved else grad
