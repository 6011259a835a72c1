"""``fastseq::recurrent_fwd`` and ``fastseq::recurrent_bwd``: one recurrent layer, a whole sequence.

The schemas and CPU kernels are in csrc/ops/recurrent.cpp; here are shapes (for tracing) and
autograd.
``cell`` is a number: ``CELLS[name].number``. x [T, B, I], or packed [N, I] with ``batch_sizes``
[T]; h0 [D, B, P] and c0 [D, B, H], None for zeros unless packed; ``weights`` of each direction in
turn: w_ih [G*H, I], w_hh [G*H, P], with ``has_biases`` b_ih and b_hh [G*H], the cell's own
parameters as one matrix [.., H], w_hr [P, H] where h is projected; gate blocks in torch's order.
``lengths`` [B], ``resets`` [T, B] and ``masks`` (the zoneout of each direction, [T, B, P] of h and
[T, B, H] of c) as in :func:`fastseq.reference.rnn.layer`.

Forward returns [y, h_n, c_n (cells with two states), saved (with ``save``)]; backward returns
[dx (need_dx), dh0, dc0 (need_dh0; cells with two states), then for each direction the gradients of
its weights, biases where need_db, all others where need_dw].

A single step of one direction, without lengths, resets and masks, may come as x [B, I], h0 [B, P]
and c0 [B, H]: then states and gradients have these shapes, and there is no y.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops import by_reference, recurrent_cuda
from fastseq.reference.rnn import CELLS as _CELLS
from fastseq.reference.rnn import layer

__all__ = [
    "CELLS",
    "Settings",
    "eager",
    "recurrent_bwd",
    "recurrent_fwd",
    "run",
    "settings_of",
    "takes_step",
]

CELLS = _native.cells() if _native.loaded() else {}
_BY_NUMBER = {cell.number: cell for cell in CELLS.values()}


class Settings(NamedTuple):
    """What an op takes beside x, the states and the weights."""

    cell: int
    has_biases: bool
    directions: int
    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    masks: tuple[Tensor, ...] = ()
    recompute: bool = False
    """Keep nothing for the backward pass but what the op was given: it runs forward again."""


def run(settings: Settings, x, h0, c0, weights) -> list[Tensor]:
    """y (unless x is [B, I]), h_n and, of cells with two states, c_n; differentiable. Straight to
    the kernel: what :func:`recurrent_fwd` does less the dispatcher's way to autograd, which costs
    as much as a small layer."""
    if eager is not None:
        out = eager.run(settings, x, h0, c0, weights)
        if out is not None:
            return out
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, h0, c0, *weights):
        return _apply(settings, x, h0, c0, *weights)
    return _run_forward(settings, x, h0, c0, weights, save=False)


def takes_step(x: Tensor) -> bool:
    """Whether :func:`run` can be called with x [B, I] and states as they are."""
    return (
        (x.dtype is torch.float32 or x.dtype is torch.float64)
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def settings_of(
    cell: str, has_biases: bool, directions: int = 1, recompute: bool = False
) -> Settings:
    """Of a call of the cell of that name with nothing out of the ordinary."""
    return Settings(CELLS[cell].number, has_biases, directions, recompute=recompute)


def _run_forward(settings, x, h0, c0, weights, save):
    cell, has_biases, directions, *rest, _ = settings
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(cell, x, h0, c0, weights, has_biases, directions, *rest, save)


def _fwd_fake(
    cell,
    x,
    h0,
    c0,
    weights,
    has_biases,
    directions,
    batch_sizes,
    lengths,
    resets,
    masks,
    save,
):
    kind, D = _BY_NUMBER[cell], directions
    P, H = weights[1].shape[1], weights[0].shape[0] // kind.gates
    step = _is_step(x, batch_sizes)
    rows = _state_rows(x, h0, D, batch_sizes)
    tokens = x.shape[0] if step or batch_sizes is not None else x.shape[0] * x.shape[1]
    out = [] if step else [x.new_empty(*x.shape[:-1], D * P)]
    out.append(x.new_empty(*rows, P))
    if kind.states == 2:
        out.append(x.new_empty(*rows, H))
    if save:
        projected = len(weights) // D == 3 + 2 * has_biases + bool(kind.params)
        more = 0 if not projected else H if x.is_cuda else P
        if projected and x.is_cuda and recurrent_cuda.projects_among_steps(kind):
            more += P
            tokens = (x.shape[0] if batch_sizes is None else batch_sizes.shape[0]) * rows[-1]
        out.append(x.new_empty(D, tokens, kind.saved * H + more))
    return out


def _bwd_fake(
    cell,
    dy,
    dh_n,
    dc_n,
    x,
    h0,
    c0,
    weights,
    has_biases,
    directions,
    batch_sizes,
    lengths,
    resets,
    masks,
    saved,
    need_dx,
    need_dw,
    need_db,
    need_dh0,
):
    kind, D = _BY_NUMBER[cell], directions
    P, H = weights[1].shape[1], weights[0].shape[0] // kind.gates
    rows = _state_rows(x, h0, D, batch_sizes)
    out = [x.new_empty(x.shape)] if need_dx else []
    if need_dh0:
        out.append(x.new_empty(*rows, P))
        if kind.states == 2:
            out.append(x.new_empty(*rows, H))
    for i, weight in enumerate(weights):
        if need_db if _is_bias(i, len(weights) // D, has_biases) else need_dw:
            out.append(x.new_empty(weight.shape))
    return out


def _is_step(x, batch_sizes) -> bool:
    return batch_sizes is None and x.dim() == 2


def _state_rows(x, h0, directions, batch_sizes) -> tuple[int, ...]:
    """The shape of a state but for its width."""
    if _is_step(x, batch_sizes):
        return (x.shape[0],)
    return directions, x.shape[1] if batch_sizes is None else h0.shape[1]


def _is_bias(i: int, per_direction: int, has_biases: bool) -> bool:
    return has_biases and i % per_direction in (2, 3)


class _Recurrent(torch.autograd.Function):
    """Autograd of the op. torch.library.register_autograd would do the same and, filling in schema
    defaults at every call, cost more than the rest of a small layer."""

    @staticmethod
    def forward(ctx, settings, x, h0, c0, *weights):
        out = _run_forward(settings, x, h0, c0, weights, save=not settings.recompute)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        saved = None if settings.recompute else out.pop()
        ctx.save_for_backward(saved, x, h0, c0, *weights)
        return tuple(out)

    @staticmethod
    def backward(ctx, dy, dh_n=None, dc_n=None):
        settings = ctx.settings
        saved, x, h0, c0, *weights = ctx.saved_tensors
        _, need_dx, need_h0, need_c0, *need = ctx.needs_input_grad
        if dy is None and dh_n is None and dc_n is None:
            return (None,) * (4 + len(weights))
        if by_reference.wanted(dy, dh_n, dc_n):
            return None, *_gradients_by_reference(
                settings, ctx.needs_input_grad[1:], (x, h0, c0, *weights), (dy, dh_n, dc_n)
            )
        if _is_step(x, settings.batch_sizes):
            dy, dh_n, dc_n = None, dy, dh_n
        if saved is None:
            saved = _run_forward(settings, x, h0, c0, weights, save=True)[-1]
        cell, has_biases, directions, *rest, _ = settings
        need_dw, need_db = True, has_biases
        if not all(need):
            biases = [_is_bias(i, len(need) // directions, has_biases) for i in range(len(need))]
            need_dw = any(n and not b for n, b in zip(need, biases, strict=True))
            need_db = any(n and b for n, b in zip(need, biases, strict=True))
        need_dh0 = need_h0 or need_c0
        with torch._C._AutoDispatchBelowAutograd():
            grads = _backward(
                cell, dy, dh_n, dc_n, x, h0, c0, weights, has_biases, directions, *rest, saved,
                need_dx, need_dw, need_db, need_dh0,
            )  # fmt: skip
        if need_dx and not need_dh0 and len(grads) == 1 + len(weights):
            dx, *dw = grads
            dh0 = dc0 = None
        else:
            found = iter(grads)
            dx = next(found) if need_dx else None
            dh0 = next(found) if need_dh0 else None
            dc0 = next(found) if need_dh0 and _BY_NUMBER[cell].states == 2 else None
            dw = list(found)
        if len(dw) < len(weights):
            found = iter(dw)
            dw = [next(found) if (need_db if b else need_dw) else None for b in biases]
        # Weights that want none are sent theirs all the same: autograd drops it.
        return None, dx, dh0 if need_h0 else None, dc0 if need_c0 else None, *dw


# Function.apply less its search for torch.func transforms: under one, torch's own code runs.
_apply = super(torch.autograd.Function, _Recurrent).apply


def _fwd_autograd(cell, x, h0, c0, weights, has_biases, directions, *rest):
    """What the registered op does at the autograd key."""
    *rest, masks, save = rest
    # AOTInductor's packages hand an empty list over as None.
    rest.append(masks or [])
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, h0, c0, *weights):
        if not save:
            raise RuntimeError(
                "fastseq.recurrent_fwd: expected save=True for inputs that require grad"
            )
        out = _apply(Settings(cell, has_biases, directions, *rest), x, h0, c0, *weights)
        return [*out, out[0].grad_fn.saved_tensors[0]]
    with torch._C._AutoDispatchBelowAutograd():
        return recurrent_fwd(cell, x, h0, c0, weights, has_biases, directions, *rest, save)


def _by_reference(settings, x, h0, c0, *weights):
    """y (unless x is [B, I]) and the final states."""
    step = _is_step(x, settings.batch_sizes)
    if step:
        x, h0, c0 = (t if t is None else t.unsqueeze(0) for t in (x, h0, c0))
    kind, D = _BY_NUMBER[settings.cell], settings.directions
    P, H = weights[1].shape[1], weights[0].shape[0] // kind.gates
    rows = x.shape[1] if settings.batch_sizes is None else h0.shape[1]
    initial = [x.new_zeros(D, rows, P) if h0 is None else h0]
    if kind.states == 2:
        initial.append(x.new_zeros(D, rows, H) if c0 is None else c0)
    sizes = None if settings.batch_sizes is None else settings.batch_sizes.tolist()
    per, extras = len(weights) // D, _CELLS[kind.reference].extras
    sides = []
    for d in range(D):
        side = list(weights[d * per : (d + 1) * per])
        if not settings.has_biases:
            side[2:2] = [None, None]
        if len(extras) > 1:
            parts = side[4].split([math.prod(shape(1)) for shape in extras.values()])
            side[4:5] = [
                part.reshape(shape(H)) for part, shape in zip(parts, extras.values(), strict=True)
            ]
        sides.append(
            layer(
                kind.reference,
                x,
                [state[d] for state in initial],
                side,
                reverse=d == 1,
                batch_sizes=sizes,
                lengths=settings.lengths,
                resets=settings.resets,
                zoneout=settings.masks[d * kind.masks : (d + 1) * kind.masks] or None,
            )
        )
    y, *finals = zip(*sides, strict=True)
    if step:
        return [states[0] for states in finals]
    return torch.cat(y, -1), *(torch.stack(states) for states in finals)


def _gradients_by_reference(settings, need, inputs, cotangents):
    reference = functools.partial(_by_reference, Settings(*settings))
    return by_reference.gradients(reference, inputs, need, cotangents)


eager = _native.eager
if eager is not None:
    eager.on_backward_by_reference(_gradients_by_reference)
if _native.loaded():
    recurrent_fwd = torch.ops.fastseq.recurrent_fwd.default
    recurrent_bwd = torch.ops.fastseq.recurrent_bwd.default
    # The ops themselves, less a Python frame.
    _forward, _backward = recurrent_fwd._op, recurrent_bwd._op
    torch.library.register_fake("fastseq::recurrent_fwd")(_fwd_fake)
    torch.library.register_fake("fastseq::recurrent_bwd")(_bwd_fake)
    _library = torch.library.Library("fastseq", "IMPL")
    _library.impl("recurrent_fwd", _fwd_autograd, "Autograd")
    _library.impl("recurrent_fwd", recurrent_cuda.forward, "CUDA")
    _library.impl("recurrent_bwd", recurrent_cuda.backward, "CUDA")
else:
    recurrent_fwd = recurrent_bwd = _forward = _backward = None
