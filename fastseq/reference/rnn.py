"""Recurrent layers in plain PyTorch: the oracle the kernels are compared with, and their fallback.

Every function runs on any device in any floating dtype and is differentiable any number of times.
Shapes: T time, B batch, I input, H hidden, L layers, D directions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["lstm", "lstm_layer"]


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    reverse: bool = False,
    batch_sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer in one direction.

    Args:
        x: inputs, [T, B, I]; with ``batch_sizes``, the packed rows [N, I].
        h0, c0: initial hidden and cell state, [B, H].
        w_ih: input weights, [4H, I], gate blocks in the order i, f, g, o.
        w_hh: recurrent weights, [4H, H], same order.
        b_ih, b_hh: biases, [4H], or None.
        reverse: run from the last step to the first.
        batch_sizes: rows still running at each step, never increasing, summing to N.

    Returns:
        y: the hidden state after each step, [T, B, H] or [N, H].
        h_n, c_n: the state after each row's last step, [B, H].

    Source: Hochreiter and Schmidhuber 1997, with the forget gate of Gers et al. 2000;
    the equations are those of torch.nn.LSTM.
    """
    steps = x.unbind(0) if batch_sizes is None else x.split(list(batch_sizes))
    h, c = h0, c0
    outputs: list[Tensor] = []
    finished: list[tuple[Tensor, Tensor]] = []
    for x_t in reversed(steps) if reverse else steps:
        rows = x_t.shape[0]
        if rows < h.shape[0]:
            if not reverse:
                finished.append((h[rows:], c[rows:]))
            h, c = h[:rows], c[:rows]
        elif rows > h.shape[0]:
            started = slice(h.shape[0], rows)
            h, c = torch.cat((h, h0[started])), torch.cat((c, c0[started]))
        if reverse and not outputs and rows < h0.shape[0]:
            h, c = h0[:rows], c0[:rows]
        gates = F.linear(x_t, w_ih, b_ih) + F.linear(h, w_hh, b_hh)
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    if reverse:
        outputs.reverse()
    for h_end, c_end in reversed(finished):
        h, c = torch.cat((h, h_end)), torch.cat((c, c_end))
    if batch_sizes is not None:
        return torch.cat(outputs), h, c
    y = torch.stack(outputs) if outputs else x.new_empty(0, *h0.shape)
    return y, h, c


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
    batch_sizes: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Stacked, optionally bidirectional LSTM; arguments as :func:`fastseq.functional.lstm`."""
    directions = 2 if bidirectional else 1
    per_cell = 4 if has_biases else 2
    hidden = params[1].shape[1]
    x = input.transpose(0, 1) if batch_first and batch_sizes is None else input
    batch = x.shape[1] if batch_sizes is None else batch_sizes[0]
    if hx is None:
        zeros = x.new_zeros(num_layers * directions, batch, hidden)
        hx = (zeros, zeros)
    h_n, c_n = [], []
    for layer in range(num_layers):
        sides = []
        for direction in range(directions):
            cell = layer * directions + direction
            weights = params[cell * per_cell : (cell + 1) * per_cell]
            y, h, c = lstm_layer(
                x,
                hx[0][cell],
                hx[1][cell],
                weights[0],
                weights[1],
                weights[2] if has_biases else None,
                weights[3] if has_biases else None,
                reverse=direction == 1,
                batch_sizes=batch_sizes,
            )
            sides.append(y)
            h_n.append(h)
            c_n.append(c)
        x = torch.cat(sides, -1) if bidirectional else sides[0]
        if dropout and train and layer + 1 < num_layers:
            x = F.dropout(x, dropout, training=True)
    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
    return x, torch.stack(h_n), torch.stack(c_n)
