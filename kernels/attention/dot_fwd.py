"""Dot attention, forward: e = scale q . k, softmax, context."""

from __future__ import annotations

import functools

import triton.language as tl
from torch import Tensor

from .._lang import attended, offset, until
from .._launch import Kernel, run_planned
from .launch import densely, plan_forward
from .softmax import attend, product

__all__ = ["dot_fwd", "dot_fwd_kernel"]


@Kernel
def dot_fwd_kernel(
    query,
    keys,
    values,
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
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Queries BLOCK_Q of a row over ``span`` positions, BLOCK_S at a time."""
    blocks = tl.cdiv(Q, BLOCK_Q)
    i_part = tl.program_id(0) % parts
    i_b = tl.program_id(0) // parts // blocks
    i_q = (tl.program_id(0) // parts) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    start = i_part * span
    end = tl.minimum(start + span, S)
    stop = until(lengths, words, i_b, end)
    rows = (i_q < Q)[:, None]
    i_k = tl.arange(0, BLOCK_K)
    p_query = query + offset(i_b, stride_qb) + offset(i_q, stride_qq)[:, None]
    p_keys = keys + offset(i_b, stride_kb)
    for s in range(start, stop, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        e = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
        if BLOCK_Q == 1:
            sums = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
        for k in range(0, K, BLOCK_K):
            o_k = k + i_k
            q = tl.load(p_query + o_k[None, :], mask=rows & (o_k < K)[None, :], other=0.0)
            key = tl.load(
                p_keys + offset(o_s, stride_ks)[:, None] + o_k[None, :],
                mask=(o_s < stop)[:, None] & (o_k < K)[None, :],
                other=0.0,
            )
            if BLOCK_Q == 1:
                sums += tl.sum(q.to(tl.float32), 0)[None, :] * key.to(tl.float32)
            else:
                e += product(q, tl.trans(key), PRECISION, UPCAST)
        if BLOCK_Q == 1:
            e += tl.sum(sums, 1)[None, :]
        o_mask = offset(i_b, stride_mb) + offset(i_q, stride_mq)[:, None] + o_s[None, :]
        here = attended(mask, o_mask, stop, o_s, rows)
        p_out = scores + ((offset(i_b, Q) + i_q) * S)[:, None] + o_s[None, :]
        tl.store(p_out, tl.where(here, e * scale, float("-inf")), mask=rows & (o_s < stop)[None, :])
    tl.debug_barrier()
    attend(
        scores,
        values,
        weights,
        context,
        partial,
        peaks,
        i_b,
        i_q,
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
        BLOCK_S,
        BLOCK_C,
        PRECISION,
        UPCAST,
    )


def dot_fwd(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The operator ``fastseq::dot_attention_fwd``; shapes are the operator's."""
    return run_planned("dot_fwd", _PLAN, (query, keys, values, mask, lengths), scale)


_PLAN = densely(
    "dot_attention_fwd",
    "query keys values mask lengths",
    functools.partial(plan_forward, "dot_fwd", dot_fwd_kernel),
)
