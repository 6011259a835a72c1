"""Attention scores in plain PyTorch: the oracle the kernels are compared with, and their fallback.

Every function runs on any device in any floating dtype and is differentiable any number of times;
each holds its scores' terms, [B, Q, S, K], in memory, which is what the kernels are there to avoid.
Arguments, shapes and meaning are those of the same names in :mod:`fastseq.functional`.

Shapes: B batch, Q queries, S source length, H query width, E key width before projection,
K width of the score, C width of the values and so of the context.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "additive_attention",
    "attend",
    "attended",
    "concat_attention",
    "dot_attention",
    "general_attention",
    "location_attention",
    "location_features",
    "normalized",
]


def _one_query_too(function: Callable) -> Callable:
    """Let ``query`` be [B, H] as well as [B, Q, H]; the results then lack Q."""

    @wraps(function)
    def call(query: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if query.dim() == 3:
            return function(query, *args, **kwargs)
        context, weights = function(query.unsqueeze(1), *args, **kwargs)
        return context.squeeze(1), weights.squeeze(1)

    return call


def attended(keys: Tensor, lengths: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """Where a query may look, as bool [B, 1 or Q, S]; None: everywhere.

    Args:
        keys: [B, S, K]; only its shape and device are used.
        lengths: [B], integers; positions from ``lengths[b]`` on are not attended.
        mask: bool, [B, S] or [B, Q, S], True = attend; given both, both have to allow a position.
    """
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(1)
    if lengths is None:
        return mask
    positions = torch.arange(keys.shape[1], device=keys.device)
    within = (positions < lengths.unsqueeze(1)).unsqueeze(1)
    return within if mask is None else within & mask


def attend(scores: Tensor, values: Tensor, where: Tensor | None) -> tuple[Tensor, Tensor]:
    """Softmax of the scores, and the average of the values under it.

    Args:
        scores: [B, Q, S].
        values: [B, S, C]; finite where not attended too.
        where: from :func:`attended`.

    Returns:
        context [B, Q, C] and weights [B, Q, S]; both zero, with zero gradients, for a query that
        attends to nothing.
    """
    if where is None:
        weights = F.softmax(scores, dim=-1)
    else:
        # The smallest finite number, not -inf: a row without any True would give NaN, and NaN
        # gradients inside softmax even where the result is overwritten.
        scores = scores.masked_fill(~where, torch.finfo(scores.dtype).min)
        weights = F.softmax(scores, dim=-1).masked_fill(~where, 0.0)
    return torch.bmm(weights, values), weights


def normalized(v: Tensor, g: Tensor | None) -> Tensor:
    """v [K] itself, or ``g v / |v|`` with a scalar ``g``."""
    return v if g is None else v * (g / torch.linalg.vector_norm(v))


@_one_query_too
def additive_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    g: Tensor | None = None,
    extra: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """e = scale * v . tanh(q + k); arguments as :func:`fastseq.functional.additive_attention`."""
    terms = query.unsqueeze(2) + keys.unsqueeze(1)
    if extra is not None:
        terms = terms + extra.unsqueeze(1)
    if bias is not None:
        terms = terms + bias
    scores = torch.tanh(terms) @ normalized(v, g) * scale
    return attend(scores, values, attended(keys, lengths, mask))


@_one_query_too
def dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """e = scale * q . k; arguments as :func:`fastseq.functional.dot_attention`."""
    scores = torch.bmm(query, keys.mT) * scale
    return attend(scores, values, attended(keys, lengths, mask))


@_one_query_too
def general_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    weight: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """e = scale * q W k; arguments as :func:`fastseq.functional.general_attention`."""
    scores = torch.bmm(query, F.linear(keys, weight).mT) * scale
    return attend(scores, values, attended(keys, lengths, mask))


@_one_query_too
def concat_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    weight: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    g: Tensor | None = None,
    extra: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """e = scale * v . tanh(W [q; k]); arguments as :func:`fastseq.functional.concat_attention`."""
    queries, steps = query.shape[1], keys.shape[1]
    pairs = torch.cat(
        (
            query.unsqueeze(2).expand(-1, -1, steps, -1),
            keys.unsqueeze(1).expand(-1, queries, -1, -1),
        ),
        dim=-1,
    )
    terms = F.linear(pairs, weight, bias)
    if extra is not None:
        terms = terms + extra.unsqueeze(1)
    scores = torch.tanh(terms) @ normalized(v, g) * scale
    return attend(scores, values, attended(keys, lengths, mask))


def location_features(previous: Tensor, filters: Tensor, weight: Tensor) -> Tensor:
    """What earlier weights say of each position: U f with f = filters * previous.

    Args:
        previous: weights of earlier steps, [B, S], or [B, J, S] for several kinds of them.
        filters: [F, J, N], N odd; positions beyond the source count as zero.
        weight: [K, F].

    Returns:
        [B, S, K].

    Source: Chorowski et al. 2015, equations 8 and 9.
    """
    if previous.dim() == 2:
        previous = previous.unsqueeze(1)
    side = (filters.shape[2] - 1) // 2
    # One position more than is kept: a convolution refuses to run over nothing.
    found = F.conv1d(F.pad(previous, (side, side + 1)), filters)[..., :-1]
    # Of a transposed input, torch computes a product that depends on who needs gradients.
    return F.linear(found.mT.contiguous(), weight)


def location_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    v: Tensor,
    previous: Tensor,
    filters: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    g: Tensor | None = None,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """e = scale * v . tanh(q + k + U f); arguments as
    :func:`fastseq.functional.location_attention`."""
    return additive_attention(
        query,
        keys,
        values,
        v,
        bias=bias,
        g=g,
        extra=location_features(previous, filters, weight),
        lengths=lengths,
        mask=mask,
        scale=scale,
    )
