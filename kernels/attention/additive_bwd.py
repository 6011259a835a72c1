"""Additive attention, backward: dq, dk and dv of e = scale v . tanh(q + k + extra).

With t the tanh and d_e the gradient of v . t:

    dq = v sum_s d_e (1 - t^2)    dk = v sum_q d_e (1 - t^2)    dv = sum_qs d_e t

One pass makes each t once. A program owns BLOCK_K columns of one row and walks the source, keeping
BLOCK_S keys and their gradient in registers while every query passes by; dq it adds to in global
memory, which no other program touches, so that nothing is atomic.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton.language as tl
from torch import Tensor

from .._lang import blocks, given, offset, power_of_two, tanh, until, which_tanh
from .._launch import Kernel, Launch, run_planned
from .launch import aligned, densely, options, scores_gradient, split, values_gradient, words

__all__ = ["additive_bwd", "additive_bwd_kernel"]


@Kernel
def additive_bwd_kernel(
    query,
    keys,
    v,
    extra,
    lengths,
    d_scores,
    d_query,
    d_keys,
    d_v,
    B: tl.int32,
    Q: tl.int32,
    S: tl.int32,
    K: tl.int32,
    parts: tl.int32,
    span: tl.int32,
    words: tl.int32,
    stride_qb: tl.int64,
    stride_qq: tl.int64,
    stride_kb: tl.int64,
    stride_ks: tl.int64,
    stride_eb: tl.int64,
    stride_es: tl.int64,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TANH: tl.constexpr,
):
    """d_scores: [B, Q, S] float32, zero where not attended; d_query: [P, B, Q, K] float32;
    d_keys: [B, S, K]; d_v: [P, B, K] float32, the parts to be
    summed."""
    columns = tl.cdiv(K, BLOCK_K)
    i_part = tl.program_id(0) % parts
    i_block = (tl.program_id(0) // parts) % columns
    i_b = tl.program_id(0) // parts // columns
    start = i_part * span
    end = tl.minimum(start + span, S)
    stop = until(lengths, words, i_b, end)
    o_k = i_block * BLOCK_K + tl.arange(0, BLOCK_K)
    inside = o_k < K
    weight = tl.load(v + o_k, mask=inside, other=0.0).to(tl.float32)
    p_query = query + offset(i_b, stride_qb) + o_k
    p_scores = d_scores + offset(i_b, Q) * S
    p_out = d_query + (offset(i_part, B) + i_b) * Q * K + o_k
    sum_v = tl.zeros([BLOCK_K], tl.float32)
    for s in range(start, end, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        here = (o_s < stop)[:, None] & inside[None, :]
        key = tl.load(
            keys + offset(i_b, stride_kb) + offset(o_s, stride_ks)[:, None] + o_k[None, :],
            mask=here,
            other=0.0,
        ).to(tl.float32)
        if given(extra):
            p_extra = extra + offset(i_b, stride_eb) + offset(o_s, stride_es)[:, None]
            key += tl.load(p_extra + o_k[None, :], mask=here, other=0.0).to(tl.float32)
        sum_k = tl.zeros([BLOCK_S, BLOCK_K], tl.float32)
        again = inside & (s + 0 * o_k > start)
        # The first block sets d_query, also where there is nothing to add to it.
        queries = tl.where((s < stop) | (s == start), Q, 0)
        for q in range(0, queries):
            one = tl.load(p_query + offset(q, stride_qq), mask=inside, other=0.0).to(tl.float32)
            d_e = tl.load(p_scores + offset(q, S) + o_s, mask=o_s < stop, other=0.0)
            t = tanh(key + one[None, :], TANH)
            sum_v += tl.sum(d_e[:, None] * t, 0)
            d_t = d_e[:, None] * (1.0 - t * t)
            sum_k += d_t
            p_one = p_out + offset(q, K)
            before = tl.load(p_one, mask=again, other=0.0)
            tl.store(p_one, before + weight * tl.sum(d_t, 0), mask=inside)
        o_out = ((offset(i_b, S) + o_s) * K)[:, None] + o_k[None, :]
        tl.store(
            d_keys + o_out,
            (sum_k * weight[None, :]).to(d_keys.dtype.element_ty),
            mask=(o_s < end)[:, None] & inside[None, :],
        )
        # The next block adds to what this one stored.
        tl.debug_barrier()
    tl.store(d_v + (offset(i_part, B) + i_b) * K + o_k, sum_v, mask=inside)


def additive_bwd(
    d_context: Tensor | None,
    d_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    extra: Tensor | None,
    lengths: Tensor | None,
    weights: Tensor,
    scale: float,
    need_scores: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``fastseq::additive_attention_bwd``; shapes are the operator's."""
    d_values = values_gradient(d_context, values, weights, need_values)
    if not need_scores:
        return query.new_empty(0), query.new_empty(0), d_values, query.new_empty(0)
    d_scores = scores_gradient(d_context, d_weights, values, weights, lengths, scale, torch.float32)
    inputs = (query, keys, v, extra, lengths)
    d_query, d_keys, d_v = run_planned("additive_bwd", _PLAN, inputs, d_scores)
    return d_query.to(query.dtype), d_keys, d_values, d_v.to(v.dtype)


def _plan(inputs: tuple) -> Callable:
    query, keys, v, extra, lengths = inputs
    B, Q, K = query.shape
    S = keys.shape[1]
    scored = (B, Q, S)
    fits = aligned(query, keys, v, extra)
    config = options("additive_bwd", query, fits)
    # A warp's columns, or half of them where there are no more.
    config["BLOCK_K"] = power_of_two(K, 64, config["BLOCK_K"])
    programs = B * blocks(K, config["BLOCK_K"])
    # A part more is a buffer more, and a launch that adds them up. One warp has a quarter of a
    # multiprocessor's special functions, two of which are a term.
    clocks = Q * config["BLOCK_K"] // 2 // config["num_warps"]
    parts, span = split(query.device, programs, S, config, clocks)
    gradient = Launch(
        additive_bwd_kernel[fits],
        query.device,
        programs * parts,
        (B, Q, S, K, parts, span, words(lengths)),
        (query, keys, extra),
        TANH=which_tanh(),
        **config,
    )

    def run(inputs: tuple, where: list, d_scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # The one tensor that no plan depends on.
        if d_scores.shape != scored:
            raise RuntimeError(
                f"fastseq.additive_attention_bwd: expected weights of shape {list(scored)}, "
                f"got {tuple(d_scores.shape)}"
            )
        new = inputs[0].new_empty
        d_query = new((parts, B, Q, K), dtype=torch.float32)
        d_v = new((parts * B, K), dtype=torch.float32)
        d_keys = new(B, S, K)
        gradient(inputs, where, (d_scores, d_query, d_keys, d_v))
        return d_query[0] if parts == 1 else d_query.sum(0), d_keys, d_v.sum(0)

    return run


_PLAN = densely("additive_attention_bwd", "query keys v extra lengths", _plan)
