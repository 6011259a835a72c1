"""The attention operators in plain PyTorch, on any device: lean in memory, every dtype.

A tile of the terms tanh(q + k), a few MiB at most, is all that is ever held of B x Q x S x K; the
backward pass makes it anew. Half dtypes are summed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastseq.reference.scores import attended

__all__ = ["additive_bwd", "additive_fwd", "dot_bwd", "dot_fwd"]

# Elements of a tile of terms: 1 MiB in float32, half of a core's second-level cache.
_TILE = 1 << 18


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _tiles(B: int, Q: int, terms: int) -> Iterator[tuple[slice, slice]]:
    """Rows and queries of each tile, for ``terms`` = S * K terms a query."""
    fit = max(1, _TILE // max(1, terms))
    rows, queries = min(B, fit), min(Q, max(1, fit // max(1, B)))
    for b in range(0, B, max(1, rows)):
        for i in range(0, Q, max(1, queries)):
            yield slice(b, b + rows), slice(i, i + queries)


def _attend(
    scores: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Context and weights in the values' dtype; ``scores`` [B, Q, S] is overwritten."""
    where = attended(keys, lengths, mask)
    if where is not None:
        scores.masked_fill_(~where, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    if where is not None:
        weights.masked_fill_(~where, 0.0)
    context = torch.bmm(weights, _wide(values))
    return context.to(values.dtype), weights.to(values.dtype)


def _scores_bwd(
    d_context: Tensor | None,
    d_weights: Tensor | None,
    values: Tensor,
    weights: Tensor,
    scale: float,
) -> Tensor:
    """Gradient of the scores before ``scale``, [B, Q, S]; zero wherever the weights are."""
    if d_context is None:
        d_p = _wide(d_weights)
    else:
        d_p = torch.bmm(_wide(d_context), _wide(values).mT)
        if d_weights is not None:
            d_p += _wide(d_weights)
    p = _wide(weights)
    mean = (p * d_p).sum(-1, keepdim=True)
    return (d_p - mean) * p * scale


def _values_bwd(d_context: Tensor | None, values: Tensor, weights: Tensor) -> Tensor:
    if d_context is None:
        return torch.zeros_like(values, memory_format=torch.contiguous_format)
    return torch.bmm(_wide(weights).mT, _wide(d_context)).to(values.dtype)


def additive_fwd(query, keys, values, v, extra, mask, lengths, scale):
    B, Q, K = query.shape
    S = keys.shape[1]
    q, k, wide_v = (_wide(t).contiguous() for t in (query, keys, v))
    if extra is not None:
        k = k + _wide(extra)
    scores = q.new_empty(B, Q, S)
    for rows, queries in _tiles(B, Q, S * K):
        terms = q[rows, queries].unsqueeze(2) + k[rows].unsqueeze(1)
        scores[rows, queries] = terms.tanh_() @ wide_v
    return _attend(scores.mul_(scale), keys, values, mask, lengths)


def additive_bwd(
    d_context,
    d_weights,
    query,
    keys,
    values,
    v,
    extra,
    lengths,
    weights,
    scale,
    need_scores,
    need_values,
):
    B, Q, K = query.shape
    S = keys.shape[1]
    none = query.new_empty(0)
    d_values = _values_bwd(d_context, values, weights) if need_values else none
    if not need_scores:
        return none, none.clone(), d_values, none.clone()
    d_e = _scores_bwd(d_context, d_weights, values, weights, scale)
    q, k, wide_v = (_wide(t).contiguous() for t in (query, keys, v))
    if extra is not None:
        k = k + _wide(extra)
    d_q, d_k, d_v = q.new_empty(B, Q, K), q.new_zeros(B, S, K), q.new_zeros(K)
    for rows, queries in _tiles(B, Q, S * K):
        terms = (q[rows, queries].unsqueeze(2) + k[rows].unsqueeze(1)).tanh_()
        d_tile = d_e[rows, queries]
        d_v += d_tile.reshape(-1) @ terms.view(d_tile.numel(), K)
        d_terms = torch.ops.aten.tanh_backward(d_tile.unsqueeze(3), terms)
        d_q[rows, queries] = d_terms.sum(2)
        d_k[rows] += d_terms.sum(1)
    d_q *= wide_v
    d_k *= wide_v
    return d_q.to(query.dtype), d_k.to(keys.dtype), d_values, d_v.to(v.dtype)


def dot_fwd(query, keys, values, mask, lengths, scale):
    scores = torch.bmm(_wide(query), _wide(keys).mT).mul_(scale)
    return _attend(scores, keys, values, mask, lengths)


def dot_bwd(
    d_context,
    d_weights,
    query,
    keys,
    values,
    lengths,
    weights,
    scale,
    need_scores,
    need_values,
):
    none = query.new_empty(0)
    d_values = _values_bwd(d_context, values, weights) if need_values else none
    if not need_scores:
        return none, none.clone(), d_values
    d_e = _scores_bwd(d_context, d_weights, values, weights, scale)
    d_q = torch.bmm(d_e, _wide(keys)).to(query.dtype)
    d_k = torch.bmm(d_e.mT, _wide(query)).to(keys.dtype)
    return d_q, d_k, d_values
