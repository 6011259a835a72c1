"""``fastseq::lstm_fwd`` and ``fastseq::lstm_bwd``: one LSTM layer over a whole sequence.

The schemas and CPU kernels are in csrc/ops/lstm.cpp; here are shapes (for tracing) and autograd.
x [T, B, I], or packed [N, I] with ``batch_sizes`` [T]; h0, c0 [D, B, H], None for zeros unless
packed; weights as those of
torch.nn.LSTM, gate order i, f, g, o; ``_r`` the reverse direction's, None unless D = 2. With
``save`` the forward pass also returns what the backward pass needs: activated gates
[D, N, 4H], cell states [D, N, H] (N = T * B tokens where nothing is packed).
"""

from __future__ import annotations

import torch

from fastseq import _native
from fastseq.reference import rnn

__all__ = ["lstm_bwd", "lstm_fwd", "lstm_fwd_autograd"]


def _sizes(x, h0, w_hh, w_ih_r, batch_sizes) -> tuple[int, int, int, int]:
    """Tokens, D, B, H."""
    D, H = (1 if w_ih_r is None else 2), w_hh.shape[1]
    if batch_sizes is None:
        return x.shape[0] * x.shape[1], D, x.shape[1], H
    return x.shape[0], D, h0.shape[1], H


def _fwd_fake(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_ih_r, w_hh_r, b_ih_r, b_hh_r, batch_sizes, save):
    tokens, D, B, H = _sizes(x, h0, w_hh, w_ih_r, batch_sizes)
    saved = D if save else 0
    return (
        x.new_empty(*x.shape[:-1], D * H),
        x.new_empty(D, B, H),
        x.new_empty(D, B, H),
        x.new_empty(saved, tokens, 4 * H),
        x.new_empty(saved, tokens, H),
    )


def _bwd_fake(
    dy,
    dh_n,
    dc_n,
    x,
    h0,
    c0,
    w_ih,
    w_hh,
    w_ih_r,
    w_hh_r,
    batch_sizes,
    gates,
    cells,
    need_dx,
    need_dw,
    need_db,
    need_dh0,
):
    _, D, B, H = _sizes(x, h0, w_hh, w_ih_r, batch_sizes)
    nothing = x.new_empty

    def direction(here):
        return (
            x.new_empty(4 * H, x.shape[-1]) if need_dw and here else nothing(0),
            x.new_empty(4 * H, H) if need_dw and here else nothing(0),
            x.new_empty(4 * H) if need_db and here else nothing(0),
        )

    dx = x.new_empty(x.shape) if need_dx else nothing(0)
    states = [x.new_empty(D, B, H) if need_dh0 else nothing(0) for _ in range(2)]
    return dx, *states, *direction(True), *direction(D == 2)


class _Lstm(torch.autograd.Function):
    """Autograd of the op. torch.library.register_autograd would do the same and, filling in schema
    defaults at every call, cost more than the rest of a small LSTM."""

    @staticmethod
    def forward(ctx, *inputs):
        if not inputs[-1]:
            raise RuntimeError("fastseq.lstm_fwd: expected save=True for inputs that require grad")
        with torch._C._AutoDispatchBelowAutograd():
            output = lstm_fwd(*inputs)
        gates, cells = output[3:]
        ctx.mark_non_differentiable(gates, cells)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:-1], gates, cells)
        return output

    @staticmethod
    def backward(ctx, dy, dh_n, dc_n, _gates, _cells):
        return _backward(ctx, dy, dh_n, dc_n)


# Function.apply less its search for torch.func transforms: under one, torch's own code runs.
_apply = super(torch.autograd.Function, _Lstm).apply


def lstm_fwd_autograd(*inputs):
    """``lstm_fwd`` with autograd where an input asks for it, else straight to the kernel."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
        return _apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return lstm_fwd(*inputs)


def _backward(ctx, dy, dh_n, dc_n):
    *inputs, batch_sizes, gates, cells = ctx.saved_tensors
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_ih_r, w_hh_r, b_ih_r, b_hh_r = inputs
    need = ctx.needs_input_grad
    if dy is None and dh_n is None and dc_n is None:
        return (None,) * 13
    if torch.is_grad_enabled():
        return _backward_twice(inputs, batch_sizes, (dy, dh_n, dc_n), need)
    need_dw = any(need[3:5]) or any(need[7:9])
    need_db = any(need[5:7]) or any(need[9:11])
    dx, dh0, dc0, dw_ih, dw_hh, db, dw_ih_r, dw_hh_r, db_r = lstm_bwd(
        dy,
        dh_n,
        dc_n,
        x,
        h0,
        c0,
        w_ih,
        w_hh,
        w_ih_r,
        w_hh_r,
        batch_sizes,
        gates,
        cells,
        need[0],
        need_dw,
        need_db,
        need[1] or need[2],
    )
    grads = (dx, dh0, dc0, dw_ih, dw_hh, db, db, dw_ih_r, dw_hh_r, db_r, db_r, None, None)
    return tuple(g if wanted else None for g, wanted in zip(grads, need, strict=True))


def _backward_twice(inputs, batch_sizes, cotangents, need):
    """The same gradients, themselves differentiable: by autograd through the reference."""
    # Views of their own: gradients must stop at this call's inputs, which may share a past.
    inputs = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
    x, h0, c0, *weights = inputs
    sizes = None if batch_sizes is None else batch_sizes.tolist()
    _, D, B, H = _sizes(x, h0, weights[1], weights[4], batch_sizes)
    initial = [x.new_zeros(D, B, H) if state is None else state for state in (h0, c0)]
    sides = [
        rnn.layer(
            "lstm",
            x,
            [state[d] for state in initial],
            weights[4 * d : 4 * d + 4],
            reverse=d == 1,
            batch_sizes=sizes,
        )
        for d in range(D)
    ]
    y, h_n, c_n = zip(*sides, strict=True)
    outputs = (torch.cat(y, -1), torch.stack(h_n), torch.stack(c_n))
    pairs = [(o, g) for o, g in zip(outputs, cotangents, strict=True) if g is not None]
    wanted = [i for i, tensor in enumerate(inputs) if tensor is not None and need[i]]
    found = torch.autograd.grad(
        [o for o, _ in pairs],
        [inputs[i] for i in wanted],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    grads = [None] * 13
    for i, grad in zip(wanted, found, strict=True):
        grads[i] = grad
    return tuple(grads)


if _native.loaded():
    lstm_fwd = torch.ops.fastseq.lstm_fwd.default
    lstm_bwd = torch.ops.fastseq.lstm_bwd.default
    torch.library.register_fake("fastseq::lstm_fwd")(_fwd_fake)
    torch.library.register_fake("fastseq::lstm_bwd")(_bwd_fake)
    _library = torch.library.Library("fastseq", "IMPL")
    _library.impl("lstm_fwd", lstm_fwd_autograd, "Autograd")
else:
    lstm_fwd = lstm_bwd = None
