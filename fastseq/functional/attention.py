"""Attention: score, mask, softmax and context as one operation.

Two scores have kernels, additive and dot; the others are these with something projected first.

Shapes: B batch, Q queries, S source length, H query width, E key width before projection, K width
of the score, C width of the values and so of the context, F filters of N positions over J kinds of
earlier weights.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import backends
from fastseq.functional._attention_checks import (
    PASSED,
    check_lengths,
    check_tensors,
    check_where,
    kind_of_call,
    passed,
)
from fastseq.ops import attention as _op
from fastseq.reference import scores as _reference

__all__ = [
    "additive_attention",
    "concat_attention",
    "dot_attention",
    "general_attention",
    "location_attention",
]

# Without Q where there is one query a row.
_QUERY = "B Q K"


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
    """Attend with the score e = scale * v . tanh(q + k + extra + bias).

    Query and keys come projected, q = W_q h and k = W_k y: the keys once a source, however many
    queries follow. Nothing of size B x Q x S x K is stored; the backward pass recomputes it.

    Args:
        query: q, [B, K] or [B, Q, K], floating.
        keys: k, [B, S, K].
        values: what is averaged, [B, S, C]; finite at masked positions too, as keys and extra.
        v: [K].
        bias: [K], or None.
        g: a scalar that replaces v by ``g v / |v|``, or None.
        extra: a further term inside the tanh, [B, S, K], such as location, coverage or cumulative
            attention features; or None.
        lengths: source positions that count, [B], integers in 0..S; None: all.
        mask: bool, [B, S] or [B, Q, S], True = attend; None: all. Given with ``lengths``, both
            have to allow a position.
        scale: a number, the inverse of the softmax's temperature.

    Returns:
        context [B, C] or [B, Q, C], and weights [B, S] or [B, Q, S], differentiable both. A query
        that may attend to nothing has context and weights zero, and gradients zero.

    Raises:
        ValueError: a shape that does not fit, or a length outside 0..S.
        TypeError: an argument of the wrong kind or dtype.

    Source: Bahdanau, Cho and Bengio 2015, section 3.1 and appendix A.1.2; normalised v, Salimans
    and Kingma 2016, equation 2.
    """
    op = "additive_attention"
    kind = kind_of_call(op, (query, keys, values, v, bias, extra, g, lengths, mask, scale))
    if kind is None or kind not in PASSED:
        check_tensors(
            op,
            ("query", query, _QUERY),
            ("keys", keys, "B S K"),
            ("values", values, "B S C"),
            ("v", v, "K"),
            ("bias", bias, "K"),
            ("extra", extra, "B S K"),
            ("g", g, None),
        )
        check_where(op, query, keys, lengths, mask, scale)
        passed(kind)
    check_lengths(op, keys, lengths)
    query, keys, values, v, bias, g, extra = _autocast(query, keys, values, v, bias, g, extra)
    if bias is not None:
        query = query + bias
    v = _reference.normalized(v, g)
    where = {"lengths": lengths, "mask": mask}
    if backends.attention_obstacle(op, query, keys, values):
        return _reference.additive_attention(
            query, keys, values, v, extra=extra, scale=scale, **where
        )
    return _run(_op.additive_attention, (query, keys, values, v, extra), scale, **where)


def dot_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Attend with the score e = scale * q . k.

    Args:
        query: q, [B, K] or [B, Q, K], floating.
        keys: k, [B, S, K].
        values, lengths, mask, scale: as in :func:`additive_attention`, values [B, S, C].

    Returns, Raises:
        As :func:`additive_attention`.

    Source: Luong, Pham and Manning 2015, equation 8 (dot).
    """
    op = "dot_attention"
    kind = kind_of_call(op, (query, keys, values, lengths, mask, scale))
    if kind is None or kind not in PASSED:
        tensors = ("query", query, _QUERY), ("keys", keys, "B S K"), ("values", values, "B S C")
        check_tensors(op, *tensors)
        check_where(op, query, keys, lengths, mask, scale)
        passed(kind)
    check_lengths(op, keys, lengths)
    query, keys, values = _autocast(query, keys, values)
    where = {"lengths": lengths, "mask": mask}
    if backends.attention_obstacle(op, query, keys, values):
        return _reference.dot_attention(query, keys, values, scale=scale, **where)
    return _run(_op.dot_attention, (query, keys, values), scale, **where)


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
    """Attend with the score e = scale * h W y: the dot score of the query h W.

    Args:
        query: h, [B, H] or [B, Q, H], floating.
        keys: y, [B, S, E].
        weight: W, [H, E].
        values, lengths, mask, scale: as in :func:`additive_attention`, values [B, S, C].

    Returns, Raises:
        As :func:`additive_attention`.

    Source: Luong, Pham and Manning 2015, equation 8 (general).
    """
    op = "general_attention"
    check_tensors(
        op,
        ("query", query, _QUERY.replace("K", "H")),
        ("keys", keys, "B S E"),
        ("values", values, "B S C"),
        ("weight", weight, "H E"),
    )
    query = torch.matmul(query, weight)
    return dot_attention(query, keys, values, lengths=lengths, mask=mask, scale=scale)


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
    """Attend with the score e = scale * v . tanh(W [h; y] + extra + bias).

    W splits into a query half and a key half: the additive score of W_q h and W_k y. Many calls
    on one source are better served by :func:`additive_attention` and keys projected once.

    Args:
        query: h, [B, H] or [B, Q, H], floating.
        keys: y, [B, S, E].
        weight: W, [K, H+E], columns of the query first.
        v, bias: [K], bias or None.
        values, g, extra, lengths, mask, scale: as in :func:`additive_attention`, values [B, S, C].

    Returns, Raises:
        As :func:`additive_attention`.

    Source: Luong, Pham and Manning 2015, equation 8 (concat).
    """
    op = "concat_attention"
    check_tensors(
        op,
        ("query", query, _QUERY.replace("K", "H")),
        ("keys", keys, "B S E"),
        ("values", values, "B S C"),
        ("weight", weight, "K H+E"),
        ("v", v, "K"),
        ("bias", bias, "K"),
        ("extra", extra, "B S K"),
    )
    query_weight, key_weight = weight.split((query.shape[-1], keys.shape[-1]), dim=1)
    return additive_attention(
        F.linear(query, query_weight, bias),
        F.linear(keys, key_weight),
        values,
        v,
        g=g,
        extra=extra,
        lengths=lengths,
        mask=mask,
        scale=scale,
    )


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
    """Attend with the score e = scale * v . tanh(q + k + U f + bias), f = filters * previous.

    Args:
        query, keys, values, v, bias, g, lengths, mask, scale: as in :func:`additive_attention`.
        previous: weights of earlier steps, [B, S], or [B, J, S] for several kinds of them
            (the last ones, their sum); the same for every query.
        filters: of a convolution over positions, [F, J, N], N odd; beyond the source lie zeros.
        weight: U, [K, F].

    Returns, Raises:
        As :func:`additive_attention`.

    Source: Chorowski et al. 2015, equations 8 and 9; cumulative weights, Shen et al. 2018.
    """
    op = "location_attention"
    if isinstance(previous, Tensor) and previous.dim() == 2:
        previous = previous.unsqueeze(1)
    check_tensors(
        op,
        ("query", query, _QUERY),
        ("keys", keys, "B S K"),
        ("previous", previous, "B J S"),
        ("filters", filters, "F J N"),
        ("weight", weight, "K F"),
    )
    if filters.shape[2] % 2 == 0:
        raise ValueError(
            f"fastseq.{op}: expected filters of an odd width N, got {list(filters.shape)}"
        )
    return additive_attention(
        query,
        keys,
        values,
        v,
        bias=bias,
        g=g,
        extra=_reference.location_features(previous, filters, weight),
        lengths=lengths,
        mask=mask,
        scale=scale,
    )


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Under autocast, every tensor in its dtype: what torch does for the products inside."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def _run(
    op,
    tensors: tuple[Tensor | None, ...],
    scale: float,
    lengths: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Call the operator, which knows queries [B, Q, K] and masks [B, 1 or Q, S] alone."""
    query, *rest = tensors
    single = query.dim() == 2
    if mask is not None and mask.dim() == 2:
        mask = mask.unsqueeze(1)
    context, weights = op(query.unsqueeze(1) if single else query, *rest, mask, lengths, scale)
    return (context.squeeze(1), weights.squeeze(1)) if single else (context, weights)
