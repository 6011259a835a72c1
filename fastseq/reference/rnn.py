"""Recurrent layers in plain PyTorch: the oracle the kernels are compared with, and their fallback.

Every function runs on any device in any floating dtype and is differentiable any number of times.
``CELLS`` is the table of cells. A cell is the equations of one step, as its paper prints them;
directions, packing, lengths, resets, zoneout and stacking are written once, for all cells.

Shapes: T time, B batch, I input, H hidden, P width of the hidden state (H, or less where weight_hr
projects it), G gate blocks, L layers, D directions, N rows of a packed sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["gru", "layer", "lstm", "recurrent", "rnn", "step"]

LAYER_NORM_EPS = 1e-5


def _lstm(x, states, weights):
    h, c = states
    w_ih, w_hh, b_ih, b_hh = weights
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _peephole_lstm(x, states, weights):
    h, c = states
    w_ih, w_hh, b_ih, b_hh, (p_i, p_f, p_o) = weights
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    i, f = (i + p_i * c).sigmoid(), (f + p_f * c).sigmoid()
    c = f * c + i * g.tanh()
    o = (o + p_o * c).sigmoid()
    return o * c.tanh(), c


def _layer_norm_lstm(x, states, weights):
    h, c = states
    w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, bias_c = weights
    gates = _normalised(F.linear(x, w_ih)) * gain_ih + _normalised(F.linear(h, w_hh)) * gain_hh
    for bias in (b_ih, b_hh):
        gates = gates if bias is None else gates + bias
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * (_normalised(c) * gain_c + bias_c).tanh(), c


def _normalised(x):
    # Written out: torch's own layer_norm differentiates wrongly from the third order on, and from
    # the second in nested forward mode. In float32 at least, as there: 1/sqrt(epsilon), cubed by
    # the derivative, overflows float16.
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance = wide.var(-1, correction=0, keepdim=True)
    normalised = (wide - wide.mean(-1, keepdim=True)) * (variance + LAYER_NORM_EPS).rsqrt()
    return normalised.to(x.dtype)


def _gru(x, states, weights):
    (h,) = states
    w_ih, w_hh, b_ih, b_hh = weights
    r_x, z_x, n_x = F.linear(x, w_ih, b_ih).chunk(3, -1)
    r_h, z_h, n_h = F.linear(h, w_hh, b_hh).chunk(3, -1)
    r, z = (r_x + r_h).sigmoid(), (z_x + z_h).sigmoid()
    n = (n_x + r * n_h).tanh()
    return ((1 - z) * n + z * h,)


def _rnn(activation):
    def rnn_step(x, states, weights):
        (h,) = states
        w_ih, w_hh, b_ih, b_hh = weights
        return (activation(F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)),)

    return rnn_step


@dataclass(frozen=True)
class Cell:
    """What sets one kind of recurrent cell apart from the others.

    ``gates`` is G: weight_ih is [G*H, I], weight_hh [G*H, P], the biases [G*H]. ``states`` is 1
    (h) or 2 (h and c; only these can be projected). ``step`` takes x [B, I], the states and
    (w_ih, w_hh, b_ih, b_hh, *extras) and returns the new states. ``extras`` names the weights
    beyond torch's four, in order, with their shape as a function of H.
    """

    gates: int
    states: int
    step: Callable[[Tensor, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, ...]]
    extras: dict[str, Callable[[int], tuple[int, ...]]] = field(default_factory=dict)


CELLS = {
    "lstm": Cell(4, 2, _lstm),
    "gru": Cell(3, 1, _gru),
    "rnn_tanh": Cell(1, 1, _rnn(torch.tanh)),
    "rnn_relu": Cell(1, 1, _rnn(torch.relu)),
    "peephole_lstm": Cell(4, 2, _peephole_lstm, {"weight_peephole": lambda H: (3, H)}),
    "layer_norm_lstm": Cell(
        4,
        2,
        _layer_norm_lstm,
        {
            "weight_ln_ih": lambda H: (4 * H,),
            "weight_ln_hh": lambda H: (4 * H,),
            "weight_ln_c": lambda H: (H,),
            "bias_ln_c": lambda H: (H,),
        },
    ),
}


def step(
    cell: str, x: Tensor, states: Sequence[Tensor], weights: Sequence[Tensor | None]
) -> tuple[Tensor, ...]:
    """One step of a cell.

    Args:
        cell: a key of ``CELLS``.
        x: inputs of the step, [B, I].
        states: (h,), or (h, c) for the LSTMs; h [B, P], c [B, H].
        weights: w_ih [G*H, I], w_hh [G*H, P], b_ih and b_hh [G*H] or None, then the cell's own:
            ``peephole_lstm`` weight_peephole [3, H], rows for i, f, o; ``layer_norm_lstm``
            weight_ln_ih [4H], weight_ln_hh [4H], weight_ln_c [H], bias_ln_c [H]; last, for any
            LSTM, optionally weight_hr [P, H], which projects the new h. Gate blocks in torch's
            order: i, f, g, o for the LSTMs; r, z, n for ``gru``.

    Returns:
        The states after the step, shaped as ``states``.

    Source: ``lstm`` Hochreiter and Schmidhuber 1997 with the forget gate of Gers, Schmidhuber and
    Cummins 2000, projected as by Sak, Senior and Beaufays 2014; ``gru`` Cho et al. 2014, the reset
    gate applied after the product with w_hh and its bias, as in torch; ``rnn_tanh`` Elman 1990;
    ``peephole_lstm`` Gers and Schmidhuber 2000, in the form of Graves 2013, equations 7-11;
    ``layer_norm_lstm`` Ba, Kiros and Hinton 2016, equations 20-22, epsilon 1e-5.
    """
    kind = CELLS[cell]
    count = 4 + len(kind.extras)
    h, *c = kind.step(x, states, weights[:count])
    for w_hr in weights[count:]:
        h = F.linear(h, w_hr)
    return h, *c


def layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor | None],
    *,
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    zoneout: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, ...]:
    """One layer of a cell in one direction.

    Args:
        cell: a key of ``CELLS``.
        x: inputs, [T, B, I]; with ``batch_sizes``, the packed rows [N, I].
        states: initial states, (h0,) or (h0, c0), h0 [B, P], c0 [B, H]; None for zeros.
        weights: as for :func:`step`.
        reverse: run from the last step to the first.
        batch_sizes: rows running at each step, positive, never increasing, summing to N.
        lengths: int64 [B] between 0 and T. Row b runs its first lengths[b] steps; what x holds
            beyond them is never read, y is zero there, and the final state is the one after the
            row's own last step (its initial state where the length is 0). The reverse direction
            starts at each row's own last step.
        resets: bool [T, B], packed [N]: the sequence of row b is cut before step t where
            ``resets[t, b]``; no state crosses a cut. Forwards, the state that enters step t is
            zero; at t = 0 the initial state is discarded. In reverse, the state that step t hands
            on to step t - 1 is zero; step 0 hands on the final state, so that a cut before step 0
            leaves y alone and makes the final state zero. So in both directions a sequence run in
            chunks, states handed from chunk to chunk, equals the whole. Beyond a row's length
            nothing is cut.
        zoneout: (keep_h,) or (keep_h, keep_c), None for a state without; values in [0, 1],
            broadcastable to [T, B, P] and [T, B, H] (packed [N, P] and [N, H]). A state becomes
            keep * old + (1 - keep) * new, h being computed from the new c before it is mixed.
            keep is a mask drawn by the caller in training, the zoneout probability in evaluation.

    Returns:
        y: the hidden state after each step, [T, B, P] or [N, P], zoneout applied.
        Then the final states, h [B, P] and, for the LSTMs, c [B, H].

    Raises:
        ValueError: an unknown cell, weights or zoneout of the wrong number, lengths or resets of
            the wrong shape or range, lengths together with batch_sizes.
        TypeError: lengths or resets of another dtype.

    Source: zoneout, Krueger et al. 2016, equations 2-4.
    """
    kind = _checked(cell, x, weights, batch_sizes, lengths, resets, zoneout)
    widths = (weights[1].shape[1], weights[0].shape[0] // kind.gates)[: kind.states]
    if states is None:
        rows = x.shape[1] if batch_sizes is None else next(iter(batch_sizes), 0)
        states = [x.new_zeros(rows, width) for width in widths]
    keeps = [
        None if keep is None else keep.expand(*x.shape[:-1], width)
        for keep, width in zip(zoneout or (None,) * kind.states, widths, strict=True)
    ]
    if lengths is not None:
        return _padded_layer(cell, x, states, weights, reverse, lengths, resets, keeps)

    def by_step(sequence: Tensor | None) -> Sequence[Tensor] | None:
        if sequence is None:
            return None
        return sequence.unbind(0) if batch_sizes is None else sequence.split(list(batch_sizes))

    inputs, cuts = by_step(x), by_step(resets)
    keeps = [by_step(keep) for keep in keeps]
    outputs = []
    for t in reversed(range(len(inputs))) if reverse else range(len(inputs)):
        running = len(inputs[t])
        before = [s[:running] for s in states]
        if cuts and not reverse:
            before = _cut(before, cuts[t])
        after = step(cell, inputs[t], before, weights)
        after = [
            new if keep is None else keep[t] * old + (1 - keep[t]) * new
            for keep, old, new in zip(keeps, before, after, strict=True)
        ]
        outputs.append(after[0])
        if cuts and reverse:
            after = _cut(after, cuts[t])
        # The rest has finished or, in reverse, not yet begun.
        states = [
            new if running == len(old) else torch.cat((new, old[running:]))
            for new, old in zip(after, states, strict=True)
        ]
    if not outputs:
        # A step of no rows: nothing to see, but every weight gets its gradient, zero.
        h, *_ = step(cell, x.reshape(0, x.shape[-1]), [s[:0] for s in states], weights)
        return h.view(*x.shape[:-1], widths[0]), *states
    if reverse:
        outputs.reverse()
    y = torch.stack(outputs) if batch_sizes is None else torch.cat(outputs)
    return y, *states


def _cut(states, cut):
    return [s.masked_fill(cut.unsqueeze(1), 0) for s in states]


def _padded_layer(cell, x, states, weights, reverse, lengths, resets, keeps):
    """:func:`layer` by ``lengths``: the rows packed, longest first, and unpacked again."""
    T, B = x.shape[:2]
    order = lengths.to(x.device).argsort(descending=True, stable=True)
    running = torch.arange(T, device=x.device).unsqueeze(1) < lengths.to(x.device)[order]

    def packed(sequence: Tensor | None) -> Tensor | None:
        return None if sequence is None else sequence[:, order][running]

    rows, *finals = layer(
        cell,
        packed(x),
        [s[order] for s in states],
        weights,
        reverse=reverse,
        batch_sizes=[n for n in running.sum(1).tolist() if n],
        resets=packed(resets),
        zoneout=[packed(keep) for keep in keeps],
    )
    y = rows.new_zeros(T, B, rows.shape[1]).index_put((running,), rows)
    back = order.argsort()
    return y[:, back], *(s[back] for s in finals)


def recurrent(
    cell: str,
    input: Tensor,
    hx: Tensor | tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Sequence[int] | Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Stacked, optionally bidirectional layers of a cell.

    Args:
        cell: a key of ``CELLS``.
        input: [T, B, I], [B, T, I] with ``batch_first``, or packed rows [N, I] with
            ``batch_sizes``.
        hx: initial hidden state [L*D, B, P]; for the LSTMs, the pair of it and the cell state
            [L*D, B, H]; None for zeros.
        params: for each layer and direction weight_ih [G*H, I or D*P], weight_hh [G*H, P], with
            ``has_biases`` bias_ih [G*H], bias_hh [G*H], then the cell's own and weight_hr, as for
            :func:`step`.
        has_biases: whether ``params`` holds biases.
        num_layers: L.
        dropout: probability of zeroing an element between layers, where ``train``.
        train: whether dropout is on.
        bidirectional: whether D is 2.
        batch_first: input, output and resets are [B, T, ...].
        batch_sizes: rows running at each step, positive, never increasing, summing to N.
        lengths: int64 [B], as for :func:`layer`.
        resets: bool [T, B], [B, T] with ``batch_first``, packed [N], as for :func:`layer`; the
            same in every layer and direction.

    Returns:
        output [T, B, D*P] (or [B, T, D*P], or packed [N, D*P]), h_n [L*D, B, P] and, for the
        LSTMs, c_n [L*D, B, H].

    Raises:
        ValueError, TypeError: as :func:`layer`; a number of params that does not fit.
    """
    directions = 2 if bidirectional else 1
    per_side = len(params) // (num_layers * directions)
    if len(params) != per_side * num_layers * directions:
        raise ValueError(
            f"fastseq.reference.rnn: expected as many params for each of {num_layers} layers and "
            f"{directions} directions, got {len(params)}"
        )
    if batch_sizes is not None:
        batch_sizes, batch_first = [int(rows) for rows in batch_sizes], False
    x = input.transpose(0, 1) if batch_first else input
    if batch_first and resets is not None:
        resets = resets.transpose(0, 1)
    if isinstance(hx, Tensor):
        hx = (hx,)
    finals = []
    for depth in range(num_layers):
        sides = []
        for direction in range(directions):
            side = depth * directions + direction
            weights: list[Tensor | None] = list(params[side * per_side : (side + 1) * per_side])
            if not has_biases:
                weights[2:2] = [None, None]
            y, *states = layer(
                cell,
                x,
                None if hx is None else [s[side] for s in hx],
                weights,
                reverse=direction == 1,
                batch_sizes=batch_sizes,
                lengths=lengths,
                resets=resets,
            )
            sides.append(y)
            finals.append(states)
        x = torch.cat(sides, -1) if bidirectional else sides[0]
        if dropout and train and depth + 1 < num_layers:
            x = F.dropout(x, dropout, training=True)
    if batch_first:
        x = x.transpose(0, 1)
    return x, *(torch.stack(states) for states in zip(*finals, strict=True))


def lstm(
    input: Tensor, hx: tuple[Tensor, Tensor] | None, params: Sequence[Tensor], *args, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory; arguments as :func:`recurrent`, in the order of torch.lstm."""
    return recurrent("lstm", input, hx, params, *args, **options)


def gru(
    input: Tensor, hx: Tensor | None, params: Sequence[Tensor], *args, **options
) -> tuple[Tensor, Tensor]:
    """Gated recurrent units; arguments as :func:`recurrent`, in the order of torch.gru."""
    return recurrent("gru", input, hx, params, *args, **options)


def rnn(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    *args,
    nonlinearity: str = "tanh",
    **options,
) -> tuple[Tensor, Tensor]:
    """Elman network, ``nonlinearity`` "tanh" or "relu"; other arguments as :func:`recurrent`."""
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(
            f"fastseq.reference.rnn: expected nonlinearity 'tanh' or 'relu', got {nonlinearity!r}"
        )
    return recurrent(f"rnn_{nonlinearity}", input, hx, params, *args, **options)


def _checked(cell, x, weights, batch_sizes, lengths, resets, zoneout) -> Cell:
    """The cell's entry, once all that would pass in silence, or fail far from its cause, is out."""

    def expect(true, what, got, error=ValueError):
        if not true:
            raise error(f"fastseq.reference.rnn: expected {what}, got {got}")

    expect(cell in CELLS, f"cell to be one of {', '.join(CELLS)}", repr(cell))
    kind = CELLS[cell]
    names = ["w_ih", "w_hh", "b_ih", "b_hh", *kind.extras]
    counts = {len(names), len(names) + kind.states - 1}
    optional = " and optionally weight_hr" if kind.states == 2 else ""
    expect(len(weights) in counts, f"{', '.join(names)}{optional}", f"{len(weights)} weights")
    layout, dims = ("[T, B, I]", 3) if batch_sizes is None else ("[N, I]", 2)
    expect(x.dim() == dims, f"x of shape {layout}", list(x.shape))
    if lengths is not None:
        expect(batch_sizes is None, "lengths or batch_sizes", "both")
        T, B = x.shape[:2]
        got = lengths.tolist()
        expect(lengths.dtype == torch.int64, "lengths of int64", lengths.dtype, TypeError)
        expect(lengths.shape == (B,), f"lengths of shape [B] = [{B}]", list(lengths.shape))
        expect(all(0 <= n <= T for n in got), f"lengths from 0 to T = {T}", got)
    if resets is not None:
        symbols, shape = layout.replace(", I", ""), list(x.shape[:-1])
        got = list(resets.shape)
        expect(resets.dtype == torch.bool, "resets of bool", resets.dtype, TypeError)
        expect(got == shape, f"resets of shape {symbols} = {shape}", got)
    if zoneout is not None:
        what = f"one keep, or None, for each of {kind.states} states in zoneout"
        expect(len(zoneout) == kind.states, what, len(zoneout))
    return kind
