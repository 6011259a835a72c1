"""Recurrent layers, stacked and in both directions, as functions.

Shapes: T time, B batch, I input, H hidden, P width of the hidden state (H, or less where weight_hr
projects it), G gate blocks, L layers, D directions, N rows of a packed sequence.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import backends
from fastseq.functional._checks import NO_ZONEOUT, Options, check
from fastseq.ops import recurrent as _op
from fastseq.ops.stack_states import stack_states
from fastseq.reference import rnn as _reference

__all__ = ["gru", "layer_norm_lstm", "lstm", "peephole_lstm", "rnn_relu", "rnn_tanh"]


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
    zoneout: float | tuple[float, float] = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory over a whole sequence; arguments in the order of torch.lstm.

    Args:
        input: [T, B, I], [B, T, I] with ``batch_first``, or the rows [N, I] of a PackedSequence
            with ``batch_sizes``; floating, any strides.
        hx: initial hidden state [L*D, B, P] and cell state [L*D, B, H], in the input's dtype; None
            for zeros.
        params: for each layer and direction weight_ih [G*H, I or D*P], weight_hh [G*H, P] and, with
            ``has_biases``, bias_ih [G*H], bias_hh [G*H], then weight_hr [P, H] if h is projected;
            G = 4, gate blocks in the order i, f, g, o.
        has_biases: whether ``params`` holds biases.
        num_layers: L.
        dropout: probability of zeroing an element between layers, where ``train``; torch's own
            random stream.
        train: whether dropout and zoneout are drawn; else zoneout is its expectation.
        bidirectional: whether D is 2.
        batch_first: input and output are [B, T, ...], and so are resets.
        batch_sizes: of a PackedSequence: int64 [T] on the CPU, never increasing.
        lengths: int64 [B] between 0 and T, on the CPU or beside input (where its values are not
            checked). Row b runs its first lengths[b] steps: what input holds beyond them is never
            read, the output is zero there, the final state is the one after the row's own last
            step, and the reverse direction starts there.
        resets: bool [T, B] ([N] packed): where True, no state crosses from step t - 1 to step t, as
            if the sequence were split there; see :func:`fastseq.reference.rnn.layer`.
        recompute: keep nothing for the backward pass but input and output; it runs forward again.
            (A compiled graph decides for itself what to keep.)
        zoneout: probability that an element of the states keeps its value of the step before: one
            for both, or those of h and of c.

    Returns:
        output [T, B, D*P] (or [B, T, D*P], or packed [N, D*P]), h_n [L*D, B, P], c_n [L*D, B, H].

    Raises:
        ValueError: a shape or a number of parameters that does not fit, a value out of range.
        TypeError: an argument of the wrong kind or dtype.

    Source: Hochreiter and Schmidhuber 1997; forget gate, Gers, Schmidhuber and Cummins 2000;
    projection, Sak, Senior and Beaufays 2014; zoneout, Krueger et al. 2016.
    """
    options = Options(has_biases, num_layers, dropout, train, bidirectional, batch_first,
                      batch_sizes, lengths, resets, recompute, zoneout)  # fmt: skip
    return call("lstm", input, hx, params, options)


def gru(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
    zoneout: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent units over a whole sequence; arguments as :func:`lstm`.

    G = 3, gate blocks in the order r, z, n; the reset gate acts after the product, as in torch.
    ``hx`` is h0 [L*D, B, H] alone, ``zoneout`` one probability, and there is no projection.

    Returns:
        output, h_n.

    Source: Cho et al. 2014.
    """
    options = Options(has_biases, num_layers, dropout, train, bidirectional, batch_first,
                      batch_sizes, lengths, resets, recompute, zoneout)  # fmt: skip
    return call("gru", input, hx, params, options)


def rnn_tanh(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """A simple recurrent network, h = tanh(W x + b + U h + c); arguments as :func:`gru`.

    G = 1, and there is no zoneout.

    Source: Elman 1990.
    """
    options = Options(has_biases, num_layers, dropout, train, bidirectional, batch_first,
                      batch_sizes, lengths, resets, recompute)  # fmt: skip
    return call("rnn_tanh", input, hx, params, options)


def rnn_relu(
    input: Tensor,
    hx: Tensor | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """A simple recurrent network, h = max(W x + b + U h + c, 0); arguments as :func:`rnn_tanh`."""
    options = Options(has_biases, num_layers, dropout, train, bidirectional, batch_first,
                      batch_sizes, lengths, resets, recompute)  # fmt: skip
    return call("rnn_relu", input, hx, params, options)


def peephole_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """An LSTM whose gates see the cell state; arguments as :func:`lstm`.

    After the biases ``params`` holds weight_peephole [3, H], rows for i, f and o; there is no
    zoneout.

    Source: Gers and Schmidhuber 2000; Graves 2013, equations 7 to 11.
    """
    options = Options(has_biases, num_layers, dropout, train, bidirectional, batch_first,
                      batch_sizes, lengths, resets, recompute)  # fmt: skip
    return call("peephole_lstm", input, hx, params, options)


def layer_norm_lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
    *,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """An LSTM that normalises its sums and its cell state; arguments as :func:`lstm`.

    After the biases ``params`` holds weight_ln_ih [4H], weight_ln_hh [4H], weight_ln_c [H] and
    bias_ln_c [H]; there is no zoneout.

    Source: Ba, Kiros and Hinton 2016, equations 20 to 22.
    """
    options = Options(has_biases, num_layers, dropout, train, bidirectional, batch_first,
                      batch_sizes, lengths, resets, recompute)  # fmt: skip
    return call("layer_norm_lstm", input, hx, params, options)


# What torch computes itself, under the same names.
_TORCH = {name: getattr(torch, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


def call(cell, input, hx, params, options):
    """:func:`lstm` and the others: checked, then by the kernel, torch or the reference."""
    options = check(cell, input, hx, params, options)
    left = backends.recurrent_obstacle(cell, input, params) or backends.torch_is_faster(
        cell, input, False, params, options, hx
    )
    if left is None:
        return stack(cell, input, hx, params, options)
    plain = options.lengths is None and options.resets is None and options.zoneout == NO_ZONEOUT
    if plain and cell in _TORCH and not backends.transform_obstacle():
        return _by_torch(cell, input, hx, params, options)
    return stack(cell, input, hx, params, options, kernel=False)


def _by_torch(cell, input, hx, params, options):
    if hx is None:
        hx = zero_states(cell, input, params, options)
        hx = hx[0] if len(hx) == 1 else tuple(hx)
    has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes = options[:7]
    rest = (list(params), has_biases, num_layers, dropout, train, bidirectional)
    if batch_sizes is not None:
        return _TORCH[cell](input, batch_sizes, hx, *rest)
    return _TORCH[cell](input, hx, *rest, batch_first)


def zero_states(cell, input, params, options):
    """Initial states of zeros, [L*D, B, P] and, for cells with two, [L*D, B, H]."""
    kind = _reference.CELLS[cell]
    sizes = options.batch_sizes
    if sizes is not None:
        batch = int(sizes[0]) if len(sizes) else 0
    else:
        batch = input.shape[0 if options.batch_first else 1]
    cells = options.num_layers * (2 if options.bidirectional else 1)
    widths = (params[1].shape[1], params[0].shape[0] // kind.gates)[: kind.states]
    return [input.new_zeros(cells, batch, width) for width in widths]


def stack(cell, input, hx, params, options, *, kernel=True):
    """:func:`lstm` and the others once arguments are checked: layer by layer, by the kernel or by
    the reference."""
    (has_biases, num_layers, dropout, train, bidirectional, batch_first, batch_sizes, lengths,
     resets, recompute, zoneout) = options  # fmt: skip
    x = input
    by_row = batch_first and batch_sizes is None
    if by_row:
        x = x.transpose(0, 1)
        resets = resets if resets is None else resets.transpose(0, 1)
    if hx is None:
        states = ()
        if batch_sizes is not None:
            states = zero_states(cell, input, params, options)
    else:
        states = (hx,) if isinstance(hx, Tensor) else hx
    rounded = None
    if kernel and x.is_cuda:
        # (Its kernels widen halves themselves.)
        if torch.is_autocast_enabled("cuda"):
            lower = backends.gpu_dtype(x)
            x, states, params = (
                x.to(lower),
                [s.to(lower) for s in states],
                [p.to(lower) for p in params],
            )
    elif kernel:
        if torch.is_autocast_enabled("cpu"):
            rounded = backends.autocast_dtype(cell, x, batch_sizes)
        elif x.dtype not in (torch.float32, torch.float64):
            rounded = x.dtype
    if rounded is not None:
        # Sums and states in float32; what goes in and comes out is rounded once.
        x, states, params = x.float(), [s.float() for s in states], [p.float() for p in params]
    directions = 2 if bidirectional else 1
    run = _layer_by_kernel if kernel else _layer_by_reference
    if num_layers == 1 and zoneout == NO_ZONEOUT:
        x, *final = run(cell, x, states, params, has_biases, directions, batch_sizes, lengths,
                        resets, (), recompute)  # fmt: skip
    else:
        per_layer = len(params) // num_layers
        finals = []
        for layer in range(num_layers):
            weights = params[layer * per_layer : (layer + 1) * per_layer]
            cells = slice(layer * directions, (layer + 1) * directions)
            initial = [state[cells] for state in states]
            masks = _zoneout_masks(cell, x, weights, directions, zoneout, train)
            x, *final = run(cell, x, initial, weights, has_biases, directions, batch_sizes,
                            lengths, resets, masks, recompute)  # fmt: skip
            finals.append(final)
            if dropout and train and layer + 1 < num_layers:
                x = torch.nn.functional.dropout(x, dropout, training=True)
        join = stack_states if torch.compiler.is_compiling() else torch.cat
        final = [join(states) for states in zip(*finals, strict=True)]
    if rounded is not None:
        x, final = x.to(rounded), [state.to(rounded) for state in final]
    return x.transpose(0, 1) if by_row else x, *final


def _zoneout_masks(cell, x, weights, directions, zoneout, train):
    """What each direction keeps of h and of c: draws in training, else the probabilities."""
    if not any(zoneout):
        return ()
    kind = _reference.CELLS[cell]
    widths = (weights[1].shape[1], weights[0].shape[0] // kind.gates)[: kind.states]
    masks = []
    for p, width in zip(zoneout[: kind.states] * directions, widths * directions, strict=True):
        if train:
            drawn = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
            masks.append(drawn.bernoulli_(p))
        else:
            constant = torch.full((width,), p, dtype=x.dtype, device=x.device)
            masks.append(constant.expand(*x.shape[:-1], width))
    return tuple(masks)


def as_matrix(cell, weights, has_biases, sides):
    """A cell's own weights as the op takes them: of each side, a direction of a layer, one matrix,
    H wide."""
    kind = _reference.CELLS[cell]
    if len(kind.extras) < 2:
        return weights
    per_side, H = len(weights) // sides, weights[0].shape[0] // kind.gates
    first = 4 if has_biases else 2
    matrices = []
    for i in range(sides):
        side = weights[i * per_side : (i + 1) * per_side]
        own = zip(side[first:], kind.extras.values(), strict=False)
        own = [w.reshape(math.prod(shape(1)), H) for w, shape in own]
        matrices += [*side[:first], torch.cat(own), *side[first + len(kind.extras) :]]
    return matrices


def _layer_by_kernel(cell, x, states, weights, has_biases, directions, batch_sizes, lengths,
                     resets, masks, recompute):  # fmt: skip
    number = _op.CELLS[f"zoneout_{cell}" if masks else cell].number
    settings = _op.Settings(
        number, has_biases, directions, batch_sizes, lengths, resets, masks, recompute
    )
    h0, c0 = (*states, None, None)[:2]
    weights = as_matrix(cell, weights, has_biases, directions)
    if not torch.compiler.is_compiling():
        return _op.run(settings, x, h0, c0, weights)
    tensors = [t for t in (x, h0, c0, *weights) if t is not None]
    save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    cell, has_biases, directions, *rest, _ = settings
    out = _op.recurrent_fwd(cell, x, h0, c0, weights, has_biases, directions, *rest, save)
    return out[:-1] if save else out


def _layer_by_reference(cell, x, states, weights, has_biases, directions, batch_sizes, lengths,
                        resets, masks, _recompute):  # fmt: skip
    kind = _reference.CELLS[cell]
    per_side = len(weights) // directions
    sides = []
    for d in range(directions):
        side = list(weights[d * per_side : (d + 1) * per_side])
        if not has_biases:
            side[2:2] = [None, None]
        sides.append(
            _reference.layer(
                cell,
                x,
                [state[d] for state in states] or None,
                side,
                reverse=d == 1,
                batch_sizes=None if batch_sizes is None else batch_sizes.tolist(),
                lengths=lengths,
                resets=resets,
                zoneout=masks[d * kind.states : (d + 1) * kind.states] or None,
            )
        )
    y, *finals = zip(*sides, strict=True)
    return torch.cat(y, -1), *(torch.stack(states) for states in finals)
