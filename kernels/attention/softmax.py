"""What follows the scores, whichever they are: softmax, weights, context; and its gradient.

One program has BLOCK_Q queries of a row, over a range of the source (all of it, or one of several
parts whose results a second kernel merges exactly). Scores lie in a float32 buffer [B, Q, S] of
global memory, which the program fills, reads again for the running maximum and sum, and again for
the context: K/2 times fewer bytes than the keys, in the cache, and no limit on C or S.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .._lang import given, offset, until
from .._launch import Kernel

__all__ = ["attend", "merge_kernel", "product", "scores_bwd_kernel"]


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """a [Q, N] @ b [N, C], summed in float32; ``a`` is taken to b's dtype."""
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a.to(b.dtype), b, input_precision=PRECISION)


@triton.jit
def share(e, top, factor):
    """Weights of the scores e [Q, S] before or after the division, with the queries' maxima and
    factors [Q]. Where nothing is attended they are zero, also in a row of NaN."""
    return tl.where(e == float("-inf"), 0.0, tl.exp(e - top[:, None]) * factor[:, None])


@triton.jit
def attend(
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
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Softmax and context of the queries i_q of row i_b over the positions start..stop.

    scores: [B, Q, S] float32, -inf where not attended, written by this program; may be weights.
    parts: where it is 1, a program sees the whole source, and writes weights and context. Otherwise
        it leaves its part for :func:`merge_kernel`: ``partial`` [P, B, Q, C], the context not yet
        divided by the sum, and ``peaks`` [2, B, Q, P], the maximum and the sum.
    """
    whole = parts == 1
    rows = (i_q < Q)[:, None]
    o_q = offset(offset(i_b, Q) + i_q, 1)
    p_scores = scores + (o_q * S)[:, None]
    i_s = tl.arange(0, BLOCK_S)
    i_c = tl.arange(0, BLOCK_C)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for s in range(start, stop, BLOCK_S):
        o_s = s + i_s
        e = tl.load(p_scores + o_s[None, :], mask=rows & (o_s < stop), other=float("-inf"))
        higher = tl.maximum(top, tl.max(e, 1))
        # A row that has seen nothing yet: -inf - -inf would be NaN.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.sum(tl.exp(e - safe[:, None]), 1)
        top = higher
    top = tl.where(top == float("-inf"), 0.0, top)
    # Not total > 0: a NaN has to stay one.
    inverse = tl.where(total == 0.0, 0.0, 1.0 / total)
    factor = tl.where(whole, inverse, 1.0)

    p_values = values + offset(i_b, stride_vb)
    for c in range(0, C, BLOCK_C):
        o_c = c + i_c
        if BLOCK_Q == 1:
            # A sum over positions inside the thread; one across threads at the end.
            sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        else:
            sums = tl.zeros([BLOCK_Q, BLOCK_C], tl.float32)
        for s in range(start, stop, BLOCK_S):
            o_s = s + i_s
            e = tl.load(p_scores + o_s[None, :], mask=rows & (o_s < stop), other=float("-inf"))
            p = share(e, top, factor)
            tile = tl.load(
                p_values + offset(o_s, stride_vs)[:, None] + o_c[None, :],
                mask=(o_s < stop)[:, None] & (o_c < C)[None, :],
                other=0.0,
            )
            if BLOCK_Q == 1:
                sums += tl.sum(p, 0)[:, None] * tile.to(tl.float32)
            else:
                sums += product(p, tile, PRECISION, UPCAST)
        if BLOCK_Q == 1:
            found = tl.sum(sums, 0)[None, :]
        else:
            found = sums
        inside = rows & (o_c < C)[None, :]
        if whole:
            o_out = (o_q * C)[:, None] + o_c[None, :]
            tl.store(context + o_out, found.to(context.dtype.element_ty), mask=inside)
        else:
            o_out = ((offset(i_part, B) * Q + o_q) * C)[:, None] + o_c[None, :]
            tl.store(partial + o_out, found, mask=inside)

    if whole:
        # Weights may take the place of scores that another thread still reads above.
        tl.debug_barrier()
        for s in range(start, end, BLOCK_S):
            o_s = s + i_s
            e = tl.load(p_scores + o_s[None, :], mask=rows & (o_s < stop), other=float("-inf"))
            p = share(e, top, inverse)
            p_out = weights + (o_q * S)[:, None] + o_s[None, :]
            tl.store(p_out, p.to(weights.dtype.element_ty), mask=rows & (o_s < end))
    else:
        o_peak = o_q * parts + i_part
        tl.store(peaks + o_peak, top, mask=i_q < Q)
        tl.store(peaks + offset(B, Q) * parts + o_peak, total, mask=i_q < Q)


@Kernel
def merge_kernel(
    scores,
    lengths,
    weights,
    context,
    partial,
    peaks,
    B: tl.int32,
    Q: tl.int32,
    S: tl.int32,
    C: tl.int32,
    parts: tl.int32,
    words: tl.int32,
    LANES: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """One query: the exact softmax over all parts of the source. LANES: no fewer than parts."""
    row = tl.cast(tl.program_id(0), tl.int64)
    rows = tl.cast(B, tl.int64) * Q
    length = until(lengths, words, row // Q, S)
    lane = tl.arange(0, LANES)
    mine = lane < parts
    o_peak = row * parts + lane
    total = tl.load(peaks + rows * parts + o_peak, mask=mine, other=0.0)
    top = tl.load(peaks + o_peak, mask=mine, other=float("-inf"))
    # A part that saw nothing has sum 0 and no say in the maximum.
    top = tl.where(total == 0.0, float("-inf"), top)
    high = tl.max(top, 0)
    high = tl.where(high == float("-inf"), 0.0, high)
    scaled = tl.exp(top - high)
    whole = tl.sum(total * scaled, 0)
    inverse = tl.where(whole == 0.0, 0.0, 1.0 / whole)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        tile = tl.load(
            partial + ((lane * rows + row) * C)[:, None] + o_c[None, :],
            mask=mine[:, None] & (o_c < C)[None, :],
            other=0.0,
        )
        found = tl.sum(tile * scaled[:, None], 0) * inverse
        tl.store(context + row * C + o_c, found.to(context.dtype.element_ty), mask=o_c < C)
    for s in range(0, S, BLOCK_S):
        o_s = s + tl.arange(0, BLOCK_S)
        e = tl.load(scores + row * S + o_s, mask=o_s < length, other=float("-inf"))
        p = tl.where(e == float("-inf"), 0.0, tl.exp(e - high) * inverse)
        tl.store(weights + row * S + o_s, p.to(weights.dtype.element_ty), mask=o_s < S)


@Kernel
def scores_bwd_kernel(
    d_context,
    d_weights,
    values,
    weights,
    lengths,
    d_p,
    d_scores,
    scale: tl.float32,
    B: tl.int32,
    Q: tl.int32,
    S: tl.int32,
    C: tl.int32,
    parts: tl.int32,
    span: tl.int32,
    words: tl.int32,
    stride_vb: tl.int64,
    stride_vs: tl.int64,
    BLOCK_Q: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """d_scores = scale p (d_p - sum p d_p), with d_p = d_context values^T + d_weights.

    d_p: [B, Q, S] float32, scratch; may be d_scores. Everything but values is
    contiguous. Positions from a row's length on are set to zero. The mean is taken off twice: the
    result sums to zero over s, and what a first mean has lost is common to all positions.
    parts: where it is not 1, a program only writes d_p, over ``span`` positions; a launch of one
        part and a span of 0 does the rest.
    """
    blocks = tl.cdiv(Q, BLOCK_Q)
    i_part = tl.program_id(0) % parts
    i_b = tl.program_id(0) // parts // blocks
    i_q = (tl.program_id(0) // parts) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    start = i_part * span
    stop = until(lengths, words, i_b, S)
    rows = (i_q < Q)[:, None]
    o_q = offset(offset(i_b, Q) + i_q, 1)
    i_s = tl.arange(0, BLOCK_S)
    i_c = tl.arange(0, BLOCK_C)
    o_rows = (o_q * S)[:, None]
    columns = tl.where(given(d_context), C, 0)
    weights_stop = tl.where(given(d_weights), stop, 0)
    for s in range(start, tl.minimum(start + span, stop), BLOCK_S):
        o_s = s + i_s
        here = rows & (o_s < stop)[None, :]
        found = tl.zeros([BLOCK_Q, BLOCK_S], tl.float32)
        if BLOCK_Q == 1:
            sums = tl.zeros([BLOCK_S, BLOCK_C], tl.float32)
        for c in range(0, columns, BLOCK_C):
            o_c = c + i_c
            upstream = tl.load(
                d_context + (o_q * C)[:, None] + o_c[None, :],
                mask=rows & (o_c < C)[None, :],
                other=0.0,
            )
            p_tile = values + offset(i_b, stride_vb) + offset(o_s, stride_vs)[:, None]
            tile = tl.load(
                p_tile + o_c[None, :],
                mask=(o_s < stop)[:, None] & (o_c < C)[None, :],
                other=0.0,
            )
            if BLOCK_Q == 1:
                one = tl.sum(upstream.to(tl.float32), 0)
                sums += one[None, :] * tile.to(tl.float32)
            else:
                found += product(upstream, tl.trans(tile), PRECISION, UPCAST)
        if BLOCK_Q == 1:
            found += tl.sum(sums, 1)[None, :]
        o_here = o_rows + o_s[None, :]
        asked = rows & (o_s < weights_stop)[None, :]
        found += tl.load(d_weights + o_here, mask=asked, other=0.0).to(tl.float32)
        tl.store(d_p + o_here, found, mask=here)
    tl.debug_barrier()
    last = tl.where(parts == 1, stop, 0)
    mean = tl.zeros([BLOCK_Q], tl.float32)
    rest = tl.zeros([BLOCK_Q], tl.float32)
    for _ in range(0, 2):
        mean = rest
        rest = tl.zeros([BLOCK_Q], tl.float32)
        for s in range(0, last, BLOCK_S):
            o_s = s + i_s
            here = rows & (o_s < stop)[None, :]
            found = tl.load(d_p + o_rows + o_s[None, :], mask=here, other=0.0)
            p = tl.load(weights + o_rows + o_s[None, :], mask=here, other=0.0).to(tl.float32)
            rest += tl.sum(p * (found - mean[:, None]), 1)
    tl.debug_barrier()
    for s in range(0, tl.where(parts == 1, S, 0), BLOCK_S):
        o_s = s + i_s
        here = rows & (o_s < stop)[None, :]
        found = tl.load(d_p + o_rows + o_s[None, :], mask=here, other=0.0)
        p = tl.load(weights + o_rows + o_s[None, :], mask=here, other=0.0).to(tl.float32)
        d_e = tl.where(here, (found - mean[:, None] - rest[:, None]) * p * scale, 0.0)
        p_out = d_scores + o_rows + o_s[None, :]
        tl.store(p_out, d_e.to(d_scores.dtype.element_ty), mask=rows & (o_s < S)[None, :])
