"""``fastseq::additive_attention_fwd``, ``dot_attention_fwd`` and their ``_bwd``.

query [B, Q, K], keys [B, S, K], values [B, S, C], one floating dtype; for the additive score v [K]
and, inside the tanh, extra [B, S, K] or None. mask: bool [B, 1 or Q, S] or None; lengths: integers
[B] or None. Forward returns context [B, Q, C] and weights [B, Q, S], which is all the backward
pass needs besides the arguments: the gradient of ``extra`` is that of ``keys``, and where the
weights are zero so is everything behind them.

``KERNELS`` says what runs on which device: a faster kernel takes the place of a slower one there.
On the CPU that is csrc/ops/attention.cpp, or plain PyTorch where the native library is not loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq import _native
from fastseq.kernels import attention as kernels
from fastseq.ops import attention_plain, by_reference
from fastseq.reference import scores

__all__ = ["KERNELS", "additive_attention", "dot_attention", "plain_because"]


def plain_because(query: Tensor, *rest: Tensor) -> str | None:
    """Why the operators run in plain PyTorch on tensors like these; None where a kernel does."""
    if query.is_cuda:
        return kernels.obstacle(query, *rest)
    return "meta tensors hold nothing to compute" if query.is_meta else _native.why_not_loaded()


def _gpu(name: str):
    """Fastseq's Triton kernel ``name`` where it can run, else plain PyTorch."""
    plain = getattr(attention_plain, name)

    # The backward operators' first tensors are the cotangents.
    first = 0 if name.endswith("fwd") else 2

    def call(*arguments):
        query, keys, values = arguments[first : first + 3]
        run = plain if kernels.obstacle(query, keys, values) else kernels.kernel(name)
        return run(*arguments)

    return call


def _without_autocast(kernel, device: str):
    """The products inside keep the dtype that was chosen for the call."""

    def call(*arguments):
        if not torch.is_autocast_enabled(device):
            return kernel(*arguments)
        with torch.autocast(device, enabled=False):
            return kernel(*arguments)

    return call


_STAGES = ("additive_fwd", "additive_bwd", "dot_fwd", "dot_bwd")
# Dispatch key -> stage -> implementation, all of one schema a stage.
KERNELS = {"CUDA": {stage: _gpu(stage) for stage in _STAGES}}
if not _native.loaded():
    KERNELS["CPU"] = {stage: getattr(attention_plain, stage) for stage in _STAGES}

_TENSORS = {
    "additive": "Tensor query, Tensor keys, Tensor values, Tensor v, Tensor? extra",
    "dot": "Tensor query, Tensor keys, Tensor values",
}
_GRADIENTS = {
    "additive": "Tensor d_query, Tensor d_keys, Tensor d_values, Tensor d_v",
    "dot": "Tensor d_query, Tensor d_keys, Tensor d_values",
}

# A fragment: the native library may define other operators of this namespace.
_library = torch.library.Library("fastseq", "FRAGMENT")
for _score, _tensors in _TENSORS.items():
    _library.define(
        f"{_score}_attention_fwd({_tensors}, Tensor? mask, Tensor? lengths, float scale) "
        "-> (Tensor context, Tensor weights)"
    )
    _library.define(
        f"{_score}_attention_bwd(Tensor? d_context, Tensor? d_weights, {_tensors}, "
        "Tensor? lengths, Tensor weights, float scale, bool need_scores, bool need_values) "
        f"-> ({_GRADIENTS[_score]})"
    )
    for _key, _stages in KERNELS.items():
        for _stage in ("fwd", "bwd"):
            _kernel = _without_autocast(_stages[f"{_score}_{_stage}"], _key.lower())
            _library.impl(f"{_score}_attention_{_stage}", _kernel, _key)


def _fwd_fake(query, keys, values, *rest):
    B, Q, _ = query.shape
    return query.new_empty(B, Q, values.shape[2]), query.new_empty(B, Q, keys.shape[1])


def _bwd_fake(d_context, d_weights, query, keys, values, *rest):
    *rest, need_scores, need_values = rest

    def like(tensor, needed):
        return query.new_empty(tensor.shape if needed else 0)

    grads = like(query, need_scores), like(keys, need_scores), like(values, need_values)
    # The additive score has v and extra before lengths, weights, scale.
    return (*grads, like(rest[0], need_scores)) if len(rest) == 5 else grads


def _differentiable(score: str, reference):
    """The forward op with its gradient, as a function of the op's arguments."""
    fwd = getattr(torch.ops.fastseq, f"{score}_attention_fwd").default
    bwd = getattr(torch.ops.fastseq, f"{score}_attention_bwd").default
    torch.library.register_fake(f"fastseq::{score}_attention_fwd")(_fwd_fake)
    torch.library.register_fake(f"fastseq::{score}_attention_bwd")(_bwd_fake)
    additive = score == "additive"

    class Attention(torch.autograd.Function):
        """torch.library.register_autograd would do the same, more slowly."""

        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                context, weights = fwd(*inputs)
            ctx.set_materialize_grads(False)
            ctx.scale = inputs[-1]
            ctx.save_for_backward(*inputs[:-1], weights)
            return context, weights

        @staticmethod
        def backward(ctx, d_context, d_weights):
            *tensors, mask, lengths, weights = ctx.saved_tensors
            need = ctx.needs_input_grad
            nothing = (None, None, None)
            if d_context is None and d_weights is None:
                return (*[None] * len(tensors), *nothing)
            if by_reference.wanted(d_context, d_weights):

                def outputs(query, keys, values, *rest):
                    more = dict(zip(("v", "extra"), rest, strict=False))
                    return reference(
                        query, keys, values, **more, mask=mask, lengths=lengths, scale=ctx.scale
                    )

                cotangents = (d_context, d_weights)
                return *by_reference.gradients(outputs, tensors, need, cotangents), *nothing
            need_scores = any(need[i] for i in range(len(tensors)) if i != 2)
            grads = bwd(
                d_context, d_weights, *tensors, lengths, weights, ctx.scale, need_scores, need[2]
            )
            if additive:
                grads = (*grads, grads[1])
            return (*(g if n else None for g, n in zip(grads, need, strict=False)), *nothing)

    # Function.apply less its search for torch.func transforms: under one, the reference runs.
    apply = super(torch.autograd.Function, Attention).apply

    def call(*inputs):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs):
            return apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return fwd(*inputs)

    _library.impl(f"{score}_attention_fwd", call, "Autograd")
    # A compiled graph holds the operator itself.
    return lambda *inputs: (fwd if torch.compiler.is_compiling() else call)(*inputs)


additive_attention = _differentiable("additive", scores.additive_attention)
dot_attention = _differentiable("dot", scores.dot_attention)
