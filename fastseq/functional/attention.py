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
    _check(
        op,
        ("query", query, _QUERY),
        ("keys", keys, "B S K"),
        ("values", values, "B S C"),
        ("v", v, "K"),
        ("bias", bias, "K"),
        ("extra", extra, "B S K"),
        ("g", g, None),
    )
    _check_where(op, query, keys, lengths, mask, scale)
    query, keys, values, v, bias, g, extra = _autocast(query, keys, values, v, bias, g, extra)
    if bias is not None:
        query = query + bias
    v = _reference.normalized(v, g)
    where = {"lengths": lengths, "mask": mask}
    if backends.attention_obstacle(op, query):
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
    _check(op, ("query", query, _QUERY), ("keys", keys, "B S K"), ("values", values, "B S C"))
    _check_where(op, query, keys, lengths, mask, scale)
    query, keys, values = _autocast(query, keys, values)
    where = {"lengths": lengths, "mask": mask}
    if backends.attention_obstacle(op, query):
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
    _check(
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
    _check(
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
    _check(
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


def _check(op: str, *arguments: tuple[str, Tensor | None, str | None]) -> None:
    """Refuse arguments that are no tensors of one floating dtype, or do not fit each other.

    Each is its name, itself and its layout: shape letters, None for a scalar. A letter stands for
    the extent it has where it is first met.
    """
    first = arguments[0][1]
    sizes: dict[str, int] = {}
    mixed = isinstance(first, Tensor) and torch.is_autocast_enabled(first.device.type)
    for name, tensor, layout in arguments:
        if tensor is None and tensor is not first:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"fastseq.{op}: expected {name} to be a tensor, got {type(tensor).__name__}"
            )
        if not tensor.is_floating_point():
            raise TypeError(
                f"fastseq.{op}: expected {name} of a floating dtype, got {tensor.dtype}"
            )
        if not mixed and tensor.dtype != first.dtype:
            raise TypeError(
                f"fastseq.{op}: expected {name} of the query's dtype {first.dtype}, "
                f"got {tensor.dtype}; convert one with .to()"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"fastseq.{op}: expected {name} on the query's device {first.device}, "
                f"got {tensor.device}"
            )
        if layout is None:
            if tensor.numel() != 1:
                raise ValueError(
                    f"fastseq.{op}: expected {name} to be a scalar, got {list(tensor.shape)}"
                )
            continue
        if layout[:3] == "B Q" and tensor.dim() == 2:
            layout = layout.replace("Q ", "")
        _check_shape(op, name, tensor, layout.split(), sizes)


def _check_shape(
    op: str, name: str, tensor: Tensor, letters: list[str], sizes: dict[str, int]
) -> None:
    shape = tensor.shape
    # The usual case without the lists that a message is made of: they cost more than a small call.
    if len(shape) == len(letters):
        for letter, found in zip(letters, shape, strict=True):
            if sizes.get(letter, found) != found or "+" in letter:
                break
        else:
            sizes.update(zip(letters, shape, strict=True))
            return

    def extent(letter: str) -> int | None:
        parts = [sizes.get(part) for part in letter.split("+")]
        return None if None in parts else sum(parts)

    wanted = [extent(letter) for letter in letters]
    fits = len(shape) == len(letters) and all(
        size is None or size == found for size, found in zip(wanted, shape, strict=True)
    )
    if not fits:
        known = [
            str(letter if size is None else size)
            for letter, size in zip(letters, wanted, strict=True)
        ]
        equal = "" if known == letters else f" = [{', '.join(known)}]"
        raise ValueError(
            f"fastseq.{op}: expected {name} of shape [{', '.join(letters)}]{equal}, "
            f"got {list(tensor.shape)}"
        )
    sizes.update(zip(letters, shape, strict=True))


def _check_where(
    op: str,
    query: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> None:
    if isinstance(scale, Tensor):
        raise TypeError(
            f"fastseq.{op}: expected scale to be a number, got a tensor; multiply v or the query "
            "by it, so that it has a gradient"
        )
    B, S = keys.shape[:2]
    for name, tensor in (("mask", mask), ("lengths", lengths)):
        if isinstance(tensor, Tensor) and tensor.device != keys.device:
            raise ValueError(
                f"fastseq.{op}: expected {name} on the keys' device {keys.device}, "
                f"got {tensor.device}"
            )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"fastseq.{op}: expected mask to be a bool tensor (True = attend), got {got}"
            )
        shapes = [("[B, S]", (B, S))]
        if query.dim() == 3:
            shapes.append(("[B, Q, S]", (B, query.shape[1], S)))
        if tuple(mask.shape) not in [shape for _, shape in shapes]:
            said = " or ".join(f"{letters} = {list(shape)}" for letters, shape in shapes)
            raise ValueError(f"fastseq.{op}: expected mask of shape {said}, got {list(mask.shape)}")
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"fastseq.{op}: expected lengths to be an int64 tensor, got {got}")
    if tuple(lengths.shape) != (B,):
        raise ValueError(
            f"fastseq.{op}: expected lengths of shape [B] = [{B}], got {list(lengths.shape)}"
        )
    # Elsewhere reading them would make the host wait; kernels clamp them.
    if lengths.is_cpu and lengths.numel() and not torch.compiler.is_compiling():
        least, most = (int(t) for t in lengths.aminmax())
        if least < 0 or most > S:
            raise ValueError(
                f"fastseq.{op}: expected lengths between 0 and S = {S}, got {least} to {most}"
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
