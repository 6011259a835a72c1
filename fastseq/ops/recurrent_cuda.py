"""``recurrent_fwd`` and ``recurrent_bwd`` on a GPU, around the kernels of csrc/cuda.

Products over all tokens (the sums of x, the gradients of x and of the weights) are torch's GEMMs,
once a layer; what goes from step to step is one call, ``fastseq::recurrent_cuda_fwd`` or
``_bwd``. Nothing waits for the device, and nothing depends on values that only it knows, so
that a call can be captured into a CUDA graph, which keeps what the host alone knew (a packed
sequence's batch_sizes, lengths given there). Arguments and results are those of
:mod:`fastseq.ops.recurrent`; float64, float32, float16 and bfloat16, the last two carrying c, and
h for cells that read it, in float32.

``first`` [T] and ``lengths`` [B], int64 on the device, say where packed tokens begin and how many
steps each sequence runs; None where tokens are T*B, and where all run T. Gradients of sums come a
row a token, for each direction [the recurrent half of gate n of a GRU, the sums over x, the cell's
parameters], H wide each.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops import measured_cuda
from fastseq.ops.projected_cuda import Among, Behind, Padding

__all__ = [
    "ANY_WAY",
    "GRID",
    "IF_IT_CAN",
    "NAMES",
    "NO_PROJECTION",
    "STEP",
    "WHOLE",
    "able",
    "backward",
    "beyond",
    "current_stream",
    "forward",
    "in_order",
    "on_device",
    "row_bytes",
    "send",
    "send_flags",
    "sum_biases",
    "wants_apart",
    "way",
    "ways",
    "without_a_grid",
]

ANY_WAY, STEP, WHOLE, GRID, IF_IT_CAN = range(5)
NAMES = ("any way", "step", "whole", "grid")
way = ANY_WAY
"""How a layer goes from step to step: launches a step, or one launch in all with the weights in a
block or in several. Tests and benchmarks set it."""

_BY_NAME = _native.cells() if _native.loaded() else {}
_CELLS = tuple(_BY_NAME.values())


NO_PROJECTION = [], [], None, None
"""What the ops take last, of layers that project nothing among their steps."""


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


def send(t: Tensor, device: torch.device) -> Tensor:
    """Integers [n], none negative, on the device. Those of the host go by way of pinned memory: a
    copy out of any other may wait for all that was launched before it. A graph that is being
    captured can't hold such a copy, for the memory is another's by the time it is replayed: there
    they go in the arguments of kernels."""
    if t.device == device or not t.is_cpu:
        return t.to(device, non_blocking=True)
    if torch.cuda.is_current_stream_capturing():
        return _in_arguments(t, device)
    return t.pin_memory().to(device, non_blocking=True)


def send_flags(flags: Tensor, device: torch.device) -> Tensor:
    """A bool [n] on the device. One of the host's goes in the arguments of kernels: nothing is
    copied, so nothing waits, and a captured graph keeps them."""
    if flags.device == device or not flags.is_cpu:
        return flags.to(device)
    return _in_arguments(flags.long(), device).bool()


def _in_arguments(t: Tensor, device: torch.device) -> Tensor:
    """Integers [n] of the host, none negative, as many as fit in each number that a kernel is
    called with."""
    numbers = t.tolist()
    bits = max(1, max(numbers, default=0).bit_length())
    each = _BITS // bits
    words = torch.empty(-(-len(numbers) // each), 1, dtype=torch.int64, device=device)
    for i, word in enumerate(words.unbind()):
        packed = numbers[i * each : (i + 1) * each]
        word.fill_(sum(number << place * bits for place, number in enumerate(packed)))
    places = torch.arange(0, each * bits, bits, device=device)
    found = (words >> places).bitwise_and_((1 << bits) - 1)
    return found.flatten()[: len(numbers)]


# Of an int64, its sign left out.
_BITS = 62


def _tokens(x: Tensor, h0: Tensor | None, batch_sizes: Tensor | None, lengths: Tensor | None):
    if batch_sizes is None:
        steps, rows = x.shape[:2]
        if lengths is not None:
            # In bounds whatever a GPU holds: nobody has looked, and kernels go by it.
            lengths = send(lengths, x.device).to(torch.int64).clamp(0, steps)
        return _Tokens(steps, rows, steps * rows, None, lengths)
    rows = h0.shape[1]
    # Sequence b runs at the steps whose size is above b.
    each = torch.searchsorted(-batch_sizes, -torch.arange(rows, device="cpu"))
    where = send(torch.cat((batch_sizes.cumsum(0) - batch_sizes, each)), x.device)
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

    def recurrent(self, behind: Behind | None) -> Tensor:
        """What the steps multiply h by."""
        return self.w_hh if behind is None else self.w_hh @ self.w_hr


def _by_direction(kind, weights, has_biases: bool, directions: int) -> list[_Weights]:
    per = len(weights) // directions
    sides = []
    for d in range(directions):
        w_ih, w_hh, *rest = (w.contiguous() for w in weights[d * per : (d + 1) * per])
        biases = (rest.pop(0), rest.pop(0)) if has_biases else (None, None)
        params = rest.pop(0) if kind.params else None
        sides.append(_Weights(w_ih, w_hh, *biases, params, rest.pop() if rest else None))
    return sides


def wants_apart(kind) -> bool:
    """Whether the last gate has its input and recurrent sums apart: kApart of csrc/cell."""
    return kind.reference == "gru"


def _normalises(kind) -> bool:
    """Whether sums over x and over h are normalised, each alone: biases are added behind that."""
    return kind.reference == "layer_norm_lstm"


def projects_among_steps(kind) -> bool:
    """Whether h, where it is projected, must be so at each step: see projected_cuda."""
    return bool(kind.masks) or _normalises(kind)


def _params(kind, side: _Weights) -> Tensor:
    """The cell's parameters, and behind them the biases that its kernels add."""
    if not _normalises(kind):
        return side.params
    shape = kind.gates, side.params.shape[1]
    if side.b_ih is None:
        return torch.cat((side.params, side.params.new_zeros(shape)))
    return torch.cat((side.params, (side.b_ih + side.b_hh).view(shape)))


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which the tensor's device is the current one, and products keep the dtypes that
    were chosen for the call: autocast must not choose again."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    lowered = (x.is_cuda or x.is_cpu) and torch.is_autocast_enabled(x.device.type)
    if not elsewhere and not lowered:
        return contextlib.nullcontext()
    inside = contextlib.ExitStack()
    if elsewhere:
        inside.enter_context(torch.cuda.device(x.device.index))
    if lowered:
        inside.enter_context(torch.autocast(x.device.type, enabled=False))
    return inside


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
    H, projected = sides[0].w_ih.shape[0] // kind.gates, sides[0].w_hr is not None
    among = projected and projects_among_steps(kind)
    stream = current_stream(x)
    with on_device(x):
        if among and batch_sizes is not None:
            padding = Padding(batch_sizes, h0.shape[1], lambda t: send(t, x.device))
            masks = [padding.padded(mask) for mask in masks]
            y, *rest = forward(
                cell, padding.padded(x), h0, c0, weights, has_biases, D, None, padding.lengths,
                padding.padded(resets), masks, save,
            )  # fmt: skip
            return [padding.packed(y), *rest]
        tokens = _tokens(x, h0, batch_sizes, lengths)
        inputs = tokens.flat(x, x.shape[-1])
        zx, b_hh = _input_sums(kind, inputs, sides)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        new = x.new_zeros if tokens.has_padding else x.new_empty
        behind = Behind(sides, tokens, resets, x, h0) if projected and not among else None
        if behind:
            behind.add_initial_sums(zx)
        P = sides[0].w_hr.shape[0] if among else H
        h = _or_zeros(None if behind else h0, x, (D, tokens.rows, P), x.dtype)
        c = _or_zeros(c0, x, (D, tokens.rows, H), wide) if kind.states == 2 else None
        # Behind what cells keep: h before projection, and what the steps themselves handed on.
        widths = [kind.saved * H, H * projected, P * among]
        saved = x.new_empty(D, tokens.count, sum(widths)) if save else None
        kept, raw, handed = _kept(saved, widths)
        y = new(tokens.count, D * P)
        flat = [tokens.flat(mask, H) for mask in (() if among else masks)]
        more = NO_PROJECTION
        if among:
            raw = new(D, tokens.count, H) if raw is None else raw.zero_()
            given = Among.of(sides, tokens, masks, x)
            flat, more = given.masks, (given.w_hr, given.keep, raw, handed)
        torch.ops.fastseq.recurrent_cuda_fwd(
            cell, wanted(kind, x, H, tokens, resets, D, save, sides[0].w_hr), stream, tokens.steps,
            zx,
            [side.recurrent(behind) for side in sides], b_hh,
            [_params(kind, side) for side in sides if kind.params], flat, tokens.first,
            tokens.lengths, tokens.flat(resets), h, c, y, kept, *more,
        )  # fmt: skip
        if behind:
            if save:
                raw.view(-1).copy_(y.view(-1))
            y, h = behind.project(y, h)
        out = [y.view(*x.shape[:-1], y.shape[1]), h]
        if kind.states == 2:
            out.append(c.to(x.dtype))
        if save:
            out.append(saved)
    return out


def _kept(saved: Tensor | None, widths: list[int]) -> list[Tensor | None]:
    """The parts of saved [D, tokens, ..], one behind the other, [D, tokens, width] each."""
    if saved is None:
        return [None] * len(widths)
    if not any(widths[1:]):
        return [saved, None, None]
    D, tokens, _ = saved.shape
    parts = saved.view(-1).split([D * tokens * width for width in widths])
    return [part.view(D, tokens, width) for part, width in zip(parts, widths, strict=True)]


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
    H, projected = sides[0].w_ih.shape[0] // kind.gates, sides[0].w_hr is not None
    among = projected and projects_among_steps(kind)
    # Blocks of a row: sums over h, then those over x, which share all but `apart` of them; then
    # parameters, then biases that are no part of any sum.
    apart = kind.gates if _normalises(kind) else int(wants_apart(kind))
    sums = kind.gates + apart
    own = kind.params + (kind.gates if _normalises(kind) else 0)
    stream = current_stream(x)
    with on_device(x):
        if among and batch_sizes is not None:
            padding = Padding(batch_sizes, h0.shape[1], lambda t: send(t, x.device))
            masks = [padding.padded(mask) for mask in masks]
            dx, *rest = backward(
                cell, padding.padded(dy), dh_n, dc_n, padding.padded(x), h0, c0, weights,
                has_biases, D, None, padding.lengths, padding.padded(resets), masks, saved, True,
                need_dw, need_db, need_dh0,
            )  # fmt: skip
            return [padding.packed(dx), *rest] if need_dx else rest
        tokens = _tokens(x, h0, batch_sizes, lengths)
        new = x.new_zeros if tokens.has_padding else x.new_empty
        P = sides[0].w_hr.shape[0] if among else H
        dsums = new(tokens.count, D * (sums + own) * H)
        hidden = new(D, tokens.count, P) if need_dw else None
        dh0 = x.new_empty(D, tokens.rows, P) if need_dh0 else None
        dc0 = x.new_empty(D, tokens.rows, H) if need_dh0 and kind.states == 2 else None
        h0, c0, dh_n, dc_n = (t if t is None else t.contiguous() for t in (h0, c0, dh_n, dc_n))
        dy = None if dy is None else tokens.flat(dy, dy.shape[-1])
        kept, raw, handed = _kept(saved.contiguous(), [kind.saved * H, H * projected, P * among])
        behind, dy_h, dh_h, h0_h = None, dy, dh_n, h0
        flat = [tokens.flat(mask, H) for mask in (() if among else masks)]
        more, dhanded = NO_PROJECTION, None
        if among:
            given, dhanded = Among.of(sides, tokens, masks, x), new(D, tokens.count, P)
            flat, more = given.masks, (given.w_hr, given.keep, handed, dhanded)
        elif projected:
            behind, h0_h = Behind(sides, tokens, resets, saved, h0), None
            before = raw.view(tokens.count, D, H)
            dy_h, dh_h = behind.gradients_of_steps(dy, dh_n, before, tokens.without_padding)
        torch.ops.fastseq.recurrent_cuda_bwd(
            cell, wanted(kind, x, H, tokens, resets, D, True, sides[0].w_hr), stream, tokens.steps,
            tokens.rows,
            kept, dy_h, dh_h, dc_n, h0_h, c0, [side.recurrent(behind) for side in sides],
            [_params(kind, side) for side in sides if kind.params], flat, tokens.first,
            tokens.lengths, tokens.flat(resets), dsums, hidden, dh0, dc0, *more,
        )  # fmt: skip
        x_rows = tokens.without_padding(tokens.flat(x, x.shape[-1])) if need_dw else None
        dx, of_sides, dh0_p = None, [], []
        for d, side in enumerate(sides):
            rows = dsums.view(tokens.count, D, (sums + own) * H)[:, d]
            of_x, of_h = rows[:, apart * H : sums * H], rows[:, : kind.gates * H]
            if need_dx:
                dx = of_x @ side.w_ih if dx is None else dx.addmm_(of_x, side.w_ih)
            if behind and need_dh0:
                dh0_p.append(behind.initial_gradient(d, of_h))
            grads, last = [], []
            if need_dw:
                dw_hh = in_order(_over_tokens(of_h, hidden[d]), apart * H)
                if behind:
                    dw_hh, *last = behind.weight_gradients(d, of_h, dw_hh)
                elif among:
                    last = [_over_tokens(dhanded[d], raw[d])]
                grads = [_over_tokens(of_x, x_rows), dw_hh]
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


def _over_tokens(a: Tensor, b: Tensor) -> Tensor:
    """a^T b of a [tokens, m] and b [tokens, n], in pieces as long as they take little memory: one
    sum over all tokens errs more than the reference's, step by step. (Of halves what counts is the
    rounding of the result, and there must be one.)"""
    m, n, piece = a.shape[1], b.shape[1], len(a) // _PIECES
    if a.element_size() < 4 or piece < _LEAST_PIECE or m * n * _PIECES > _MOST_IN_PIECES:
        return a.t() @ b
    whole = piece * _PIECES
    parts = (t[:whole].unflatten(0, (_PIECES, piece)) for t in (a, b))
    found = torch.bmm(next(parts).mT, next(parts)).sum(0)
    return found if whole == len(a) else found.addmm_(a[whole:].t(), b[whole:])


_PIECES, _LEAST_PIECE, _MOST_IN_PIECES = 8, 16, 1 << 22


def beyond(lengths: bool, resets: bool, zoneout: bool) -> str:
    """What a call has that torch's layers do not take, as the table of measurements says it."""
    return " ".join(
        name for name, has in zip(_BEYOND, (lengths, resets, zoneout), strict=True) if has
    )


_BEYOND = ("lengths", "resets", "zoneout")


def wanted(kind, x: Tensor, H: int, tokens: _Tokens, resets: Tensor | None, directions: int,
           train: bool, w_hr: Tensor | None) -> int:  # fmt: skip
    """The way to go, for the op: ``way``, or what was fastest where something was measured."""
    if way != ANY_WAY or not measured_cuda.TABLE or not x.is_cuda:
        return way
    _, dtype = measured_cuda.dtypes(x.dtype)
    packed, mode = tokens.first is not None, "train" if train else "inf"
    more = beyond(tokens.has_padding, resets is not None, bool(kind.masks))
    like = measured_cuda.Kind(
        kind.reference, dtype, 1, directions, packed, w_hr is not None, mode, more
    )  # fmt: skip
    P = 0 if w_hr is None else w_hr.shape[0]
    size = measured_cuda.Size(tokens.steps, tokens.rows, x.shape[-1], H, P)
    return _measured(x.device, like, size)


def _measured(device: torch.device, like: measured_cuda.Kind, size: measured_cuda.Size) -> int:
    """What was fastest of what can run the call."""
    name = measured_cuda.device_name(device.index)
    found = measured_cuda.fastest_way(name, like, size, able(limits(device)))
    return ANY_WAY if found is None else NAMES.index(found) | IF_IT_CAN


def able(limits: tuple[int, int]) -> measured_cuda.Able:
    """Which ways can run a call, both its passes, on a device of such :func:`limits`, by what the
    table of measurements knows of the call; launches nothing."""
    return lambda kind, size: _able(limits, kind, size.B, size.H)


@functools.lru_cache(4096)
def _able(limits: tuple[int, int], like: measured_cuda.Kind, B: int, H: int) -> tuple[str, ...]:
    masked = "zoneout" in like.beyond
    kind = _BY_NAME[f"zoneout_{like.cell}" if masked else like.cell]
    if like.projected and projects_among_steps(kind):
        return (NAMES[STEP],)
    bytes = {"f64": 8, "f16": 2, "bf16": 2}.get(like.dtype, 4)

    def runs(way: int) -> bool:
        given = kind.number, bytes, way, H, B, like.directions
        passes = (False, True) if like.mode == "train" else (False,)
        return all(_native.cuda_way(*given, backward, *limits) == way for backward in passes)

    return tuple(NAMES[way] for way in (STEP, WHOLE, GRID) if runs(way))


def limits(device: torch.device) -> tuple[int, int]:
    """A device's multiprocessors, and the bytes of shared memory that a block may have."""
    found = torch.cuda.get_device_properties(device)
    return found.multi_processor_count, found.shared_memory_per_block_optin


def row_bytes(H: int, dtype: torch.dtype) -> int:
    """Shared memory that a block needs for a row of a cell that normalises: ten of its H units, and
    two rounds of its threads' sums (csrc/cuda/recurrent/normalised.h)."""
    return (256 + 10 * H) * (8 if dtype == torch.float64 else 4)


def ways(kind, dtype: torch.dtype, size: measured_cuda.Size, directions: int,
         device: torch.device, like: measured_cuda.Kind | None = None,
         among: bool = False) -> tuple:  # fmt: skip
    """How the two passes of a layer go from step to step, by name; launches nothing.

    Args:
        kind, dtype, size, directions, device: of the call.
        like: the same as the table of measurements knows it; None: by the plans alone.
        among: whether h is projected among the steps.
    """
    chosen = STEP if among else way
    if chosen == ANY_WAY and like is not None:
        chosen = _measured(device, like, size)
    return tuple(NAMES[taken] for taken in _passes(chosen, kind, dtype, size, directions, device))


def without_a_grid(kind, dtype: torch.dtype, size: measured_cuda.Size, directions: int,
                   device: torch.device) -> tuple:  # fmt: skip
    """The same as :func:`ways`, should the device refuse to run all blocks of a grid at once."""
    whole = _passes(WHOLE, kind, dtype, size, directions, device)
    return tuple(NAMES[WHOLE if taken == WHOLE else STEP] for taken in whole)


def _passes(chosen, kind, dtype, size, directions, device) -> list[int]:
    given = kind.number, dtype.itemsize, chosen, size.H, size.B, directions
    return [_native.cuda_way(*given, backward, *limits(device)) for backward in (False, True)]


def in_order(grad: Tensor, moved: int) -> Tensor:
    """Gradients whose first block, the last gate's, goes where it belongs."""
    return grad.roll(-moved, 0) if moved else grad
