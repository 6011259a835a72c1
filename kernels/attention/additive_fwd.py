"""Additive attention, forward: e = scale v . tanh(q + k + extra), softmax, context."""

from __future__ import annotations

import functools

import triton.language as tl
from torch import Tensor

from .._lang import attended, given, offset, tanh, until
from .._launch import Kernel, run_planned
from .launch import densely, plan_forward
from .softmax import attend

__all__ = ["additive_fwd", "additive_fwd_kernel"]


@Kernel
def additive_fwd_kernel(
    query,
    keys,
    values,
    v,
    extra,
    mask,
    lengths,
    scores,
    weights,
    context,
    partial,
    peaks,
    scale: tl.float32,
    B: tl.int32,
    Q: tl.int32,
    S: tl.int32,
    K: tl.int32,
    C: tl.int32,
    parts: tl.int32,
    span: tl.int32,
    words: tl.int32,
    stride_qb: tl.int64,
    stride_qq: tl.int64,
    stride_kb: tl.int64,
    stride_ks: tl.int64,
    stride_vb: tl.int64,
    stride_vs: tl.int64,
    stride_mb: tl.int64,
    stride_mq: tl.int64,
    stride_eb: tl.int64,
    stride_es: tl.int64,
    BLOCK_Q: tl.constexpr,
    SUB_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANGE_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TANH: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Queries BLOCK_Q of a row over ``span`` positions, scored SUB_Q by BLOCK_S at a time.

    The terms of a tile, [SUB_Q, BLOCK_S, BLOCK_K], are summed in registers over all of K and
    across threads once. RANGE_S, BLOCK_C: tile of the values.
    """
    blocks = tl.cdiv(Q, BLOCK_Q)
    i_part = tl.program_id(0) % parts
    i_block = (tl.program_id(0) // parts) % blocks
    i_b = tl.program_id(0) // parts // blocks
    start = i_part * span
    end = tl.minimum(start + span, S)
    stop = until(lengths, words, i_b, end)
    first = i_block * BLOCK_Q
    last = tl.minimum(first + BLOCK_Q, Q)

    i_k = tl.arange(0, BLOCK_K)
    p_keys = keys + offset(i_b, stride_kb)
    for s in range(start, stop, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        for q in range(first, last, SUB_Q):
            i_q = q + tl.arange(0, SUB_Q)
            rows = (i_q < Q)[:, None]
            p_query = query + offset(i_b, stride_qb) + offset(i_q, stride_qq)[:, None]
            sums = tl.zeros([SUB_Q, BLOCK_S, BLOCK_K], tl.float32)
            for k in range(0, K, BLOCK_K):
                o_k = k + i_k
                inside = (o_s < stop)[:, None] & (o_k < K)[None, :]
                key = tl.load(
                    p_keys + offset(o_s, stride_ks)[:, None] + o_k[None, :], mask=inside, other=0.0
                ).to(tl.float32)
                if given(extra):
                    p_extra = extra + offset(i_b, stride_eb) + offset(o_s, stride_es)[:, None]
                    key += tl.load(p_extra + o_k[None, :], mask=inside, other=0.0).to(tl.float32)
                one = tl.load(p_query + o_k[None, :], mask=rows & (o_k < K)[None, :], other=0.0).to(
                    tl.float32
                )
                weight = tl.load(v + o_k, mask=o_k < K, other=0.0).to(tl.float32)
                terms = tanh(one[:, None, :] + key[None, :, :], TANH)
                sums += terms * weight[None, None, :]
            o_mask = offset(i_b, stride_mb) + offset(i_q, stride_mq)[:, None] + o_s[None, :]
            here = attended(mask, o_mask, stop, o_s, rows)
            e = tl.where(here, tl.sum(sums, 2) * scale, float("-inf"))
            p_out = scores + ((offset(i_b, Q) + i_q) * S)[:, None] + o_s[None, :]
            tl.store(p_out, e, mask=rows & (o_s < stop)[None, :])
    tl.debug_barrier()
    attend(
        scores,
        values,
        weights,
        context,
        partial,
        peaks,
        i_b,
        first + tl.arange(0, BLOCK_Q),
        i_part,
        start,
        stop,
        end,
        B,
        Q,
        S,
        C,
        parts,
        stride_vb,
        stride_vs,
        BLOCK_Q,
        RANGE_S,
        BLOCK_C,
        PRECISION,
        UPCAST,
    )


def additive_fwd(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    extra: Tensor | None,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``fastseq::additive_attention_fwd``; shapes are the operator's."""
    inputs = (query, keys, values, v, extra, mask, lengths)
    return run_planned("additive_fwd", _PLAN, inputs, scale)


_PLAN = densely(
    "additive_attention_fwd",
    "query keys values v extra mask lengths",
    functools.partial(plan_forward, "additive_fwd", additive_fwd_kernel),
)
