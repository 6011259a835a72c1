"""``fastseq::attention_decoder_fwd`` and ``_bwd``: a recurrent decoder with attention.

The schemas and CPU kernels are in csrc/ops/decoder.cpp; here are shapes (for tracing) and autograd.
Arguments are those of :func:`fastseq.functional.attention_decoder`, flat: inputs x [B, T, E], or
tokens [B, T] and table [V, E] with ``forced`` [T or T + 1], bool; h0 and c0 [L, B, H];
``w_c`` [A, C+H] where attention comes after the cell, ``v`` [K] where the score is additive;
``x_factor`` [B, T, E] and ``read_factor`` [B, T, F or F+E], input_factor and output_factor there.

Forward returns [features [B, T, F], weights [B, T, S], h_n, c_n (cells with two states), tokens
(given any), saved (with ``save``)]. Backward returns [dx (need_dx), dh0, dc0 (cells with two
states), dfeed0 (``feeds``), dkeys and dv (need_keys), dvalues (need_values), then (need_weights)
those of ``weights``, w_q, w_c and b_c, as far as there are any].
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops import by_reference, decoder_cuda
from fastseq.ops.recurrent import CELLS
from fastseq.reference.decoder import attention_decoder as _reference

__all__ = ["DECODER_CELLS", "Settings", "run"]

# Those whose step needs no more than its sums.
DECODER_CELLS = {name: cell for name, cell in CELLS.items() if not cell.params and not cell.masks}
_BY_NUMBER = {cell.number: cell for cell in DECODER_CELLS.values()}


class Settings(NamedTuple):
    """What the op takes that has no gradient."""

    cell: int
    tokens: Tensor | None
    forced: Tensor | None
    mask: Tensor | None
    has_biases: bool
    feeds: bool
    residual: bool
    scale: float
    w_out: Tensor | None
    b_out: Tensor | None
    x_factor: Tensor | None
    read_factor: Tensor | None
    end_token: int


# The tensors that have one, before the layers' weights; any but h0, keys, values may be None.
_TENSORS = ("x", "table", "h0", "c0", "keys", "values", "w_q", "v", "w_c", "b_c", "feed0")


def run(settings: Settings, *tensors: Tensor | None) -> list[Tensor]:
    """[features, weights, h_n, c_n (two states), tokens (given any)], differentiable.

    Args:
        settings: what has no gradient.
        tensors: those of ``_TENSORS``, then the layers' weights.
    """
    if torch.compiler.is_compiling():
        return _call_op(settings, tensors, torch.is_grad_enabled())
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        return list(_apply(settings, *tensors))
    with torch._C._AutoDispatchBelowAutograd():
        return _call_op(settings, tensors, False)


def _call_op(settings, tensors, save):
    x, table, h0, c0, keys, values, w_q, v, w_c, b_c, feed0, *weights = tensors
    return attention_decoder_fwd(
        settings.cell, x, settings.tokens, table, settings.forced, h0, c0, keys, values,
        settings.mask, weights, settings.has_biases, w_q, v, w_c, b_c, feed0, settings.feeds,
        settings.residual, settings.scale, settings.w_out, settings.b_out, settings.x_factor,
        settings.read_factor, settings.end_token, save,
    )  # fmt: skip


class _Decoder(torch.autograd.Function):
    """Autograd of the op; torch.library.register_autograd would do the same, more slowly."""

    @staticmethod
    def forward(ctx, settings, *tensors):
        with torch._C._AutoDispatchBelowAutograd():
            *out, saved = _call_op(settings, tensors, True)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        fed = None
        if settings.tokens is not None:
            fed = out[-1]
            ctx.mark_non_differentiable(fed)
        ctx.save_for_backward(out[0], out[1], saved, fed, *tensors)
        return tuple(out)

    @staticmethod
    def backward(ctx, dfeatures, dweights, dh_n, *rest):
        settings = ctx.settings
        features, attended, saved, fed, *tensors = ctx.saved_tensors
        x, table, h0, c0, keys, values, w_q, v, w_c, b_c, feed0, *weights = tensors
        need = dict(zip(_TENSORS, ctx.needs_input_grad[1:], strict=False))
        need_each = ctx.needs_input_grad[1 + len(_TENSORS) :]
        dc_n = rest[0] if c0 is not None else None
        cotangents = (dfeatures, dweights, dh_n, *([dc_n] if c0 is not None else []))
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * (1 + len(tensors))
        if by_reference.wanted(*cotangents):
            reference = functools.partial(_by_reference, settings, fed)
            need = ctx.needs_input_grad[1:]
            return None, *by_reference.gradients(reference, tensors, need, cotangents)
        need_keys = need["keys"] or need["v"]
        need_weights = any(need_each) or need["w_q"] or need["w_c"] or need["b_c"]
        need_dx = need["x"] or need["table"]
        with torch._C._AutoDispatchBelowAutograd():
            grads = iter(
                attention_decoder_bwd(
                    settings.cell,
                    dfeatures,
                    dweights,
                    dh_n,
                    dc_n,
                    features,
                    attended,
                    saved,
                    h0,
                    c0,
                    keys,
                    values,
                    settings.mask,
                    weights,
                    settings.has_biases,
                    w_q,
                    v,
                    w_c,
                    b_c,
                    settings.feeds,
                    settings.residual,
                    settings.scale,
                    need_dx,
                    need_keys,
                    need["values"],
                    need_weights,
                )  # fmt: skip
            )

        def found(there: bool) -> Tensor | None:
            return next(grads) if there else None

        out = {"x": found(need_dx), "h0": found(True), "c0": found(c0 is not None)}
        out["feed0"] = found(settings.feeds)
        out["keys"] = found(need_keys)
        out["v"] = found(need_keys and v is not None)
        out["values"] = found(need["values"])
        each = [found(need_weights) for _ in weights]
        out["w_q"] = found(need_weights and w_q is not None)
        out["w_c"] = found(need_weights and w_c is not None)
        out["b_c"] = found(need_weights and b_c is not None)
        if need["table"]:
            T = features.shape[1]
            rows = fed[:, :T].reshape(-1)
            dx = out["x"] if settings.x_factor is None else out["x"] * settings.x_factor
            out["table"] = torch.zeros_like(table).index_add_(0, rows, dx.flatten(0, 1))
        return None, *(out.get(name) if need[name] else None for name in _TENSORS), *each


def _by_reference(settings, fed, x, table, h0, c0, keys, values, w_q, v, w_c, b_c, feed0, *weights):
    """Features, weights and final states."""
    features, states, attended, _ = _reference(
        x if fed is None else fed[:, : settings.tokens.shape[1]],
        (h0,) if c0 is None else (h0, c0),
        keys,
        values,
        weights,
        cell=_BY_NUMBER[settings.cell].name,
        has_biases=settings.has_biases,
        query_weight=w_q,
        v=v,
        combine=None if w_c is None else (w_c, b_c),
        input_feeding=settings.feeds,
        feed=feed0,
        residual=settings.residual,
        scale=settings.scale,
        mask=settings.mask,
        embedding=table,
        input_factor=settings.x_factor,
    )
    return features, attended, *states


# Function.apply less its search for torch.func transforms: under one, the reference runs.
_apply = super(torch.autograd.Function, _Decoder).apply


def _fwd_fake(
    cell, x, tokens, table, forced, h0, c0, keys, values, mask, weights, has_biases, w_q, v, w_c,
    b_c, feed0, feeds, residual, scale, w_out, b_out, x_factor, read_factor, end_token, save,
):  # fmt: skip
    T = (x if tokens is None else tokens).shape[1]
    (L, B, H), S, C = h0.shape, keys.shape[1], values.shape[2]
    width = H + C if w_c is None else w_c.shape[0]
    out = [h0.new_empty(B, T, width), h0.new_empty(B, T, S), h0.new_empty(L, B, H)]
    if c0 is not None:
        out.append(h0.new_empty(L, B, H))
    if tokens is not None:
        columns = T if forced is None else forced.shape[0]
        out.append(tokens.new_empty(B, columns))
    if save:
        out.append(
            h0.new_empty(_saved_size(cell, T, h0, keys, values, weights, w_q, w_c, residual))
        )
    return out


def _saved_size(cell, T, h0, *rest):
    parts = decoder_cuda.saved_parts(_BY_NUMBER[cell], T, h0, *rest)
    return sum(steps * h0.shape[1] * width for steps, width in parts.values())


def _bwd_fake(
    cell, dfeatures, dweights, dh_n, dc_n, features, attended, saved, h0, c0, keys, values, mask,
    weights, has_biases, w_q, v, w_c, b_c, feeds, residual, scale, need_dx, need_keys, need_values,
    need_weights,
):  # fmt: skip
    (B, T, _), C = features.shape, values.shape[2]
    out = []
    if need_dx:
        beside = C if w_c is None else w_c.shape[0] if feeds else 0
        out.append(h0.new_empty(B, T, weights[0].shape[1] - beside))
    out.append(h0.new_empty(h0.shape))
    if c0 is not None:
        out.append(h0.new_empty(h0.shape))
    if feeds:
        out.append(h0.new_empty(B, w_c.shape[0]))
    if need_keys:
        out.append(h0.new_empty(keys.shape))
        if v is not None:
            out.append(h0.new_empty(v.shape))
    if need_values:
        out.append(h0.new_empty(values.shape))
    if need_weights:
        out += [h0.new_empty(w.shape) for w in (*weights, w_q, w_c, b_c) if w is not None]
    return out


def _fwd_autograd(cell, x, tokens, table, forced, h0, c0, keys, values, mask, weights, *rest):
    """What the registered op does at the autograd key."""
    has_biases, w_q, v, w_c, b_c, feed0, *options, save = rest
    settings = Settings(cell, tokens, forced, mask, has_biases, *options)
    tensors = (x, table, h0, c0, keys, values, w_q, v, w_c, b_c, feed0, *weights)
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*tensors):
        if not save:
            raise RuntimeError(
                "fastseq.attention_decoder_fwd: expected save=True for inputs that require grad"
            )
        out = _apply(settings, *tensors)
        return [*out, out[0].grad_fn.saved_tensors[2]]
    with torch._C._AutoDispatchBelowAutograd():
        return _call_op(settings, tensors, save)


if _native.loaded():
    attention_decoder_fwd = torch.ops.fastseq.attention_decoder_fwd.default
    attention_decoder_bwd = torch.ops.fastseq.attention_decoder_bwd.default
    torch.library.register_fake("fastseq::attention_decoder_fwd")(_fwd_fake)
    torch.library.register_fake("fastseq::attention_decoder_bwd")(_bwd_fake)
    _library = torch.library.Library("fastseq", "IMPL")
    _library.impl("attention_decoder_fwd", _fwd_autograd, "Autograd")
    _library.impl("attention_decoder_fwd", decoder_cuda.forward, "CUDA")
    _library.impl("attention_decoder_bwd", decoder_cuda.backward, "CUDA")
else:
    attention_decoder_fwd = attention_decoder_bwd = None
