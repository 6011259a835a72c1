"""Attention as modules: a score's parameters, and its function in :mod:`fastseq.functional`.

Not attention.py: torch.nn.attention is a module of torch's own, and ours must not hide it.

Shapes: B batch, Q queries, S source length, H query width, E key width, K width of the score,
C width of the values, J kinds of earlier weights.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.functional import additive_attention, dot_attention
from fastseq.nn._scripting import refusal
from fastseq.reference.scores import location_features

__all__ = [
    "AdditiveAttention",
    "ConcatAttention",
    "DotAttention",
    "GeneralAttention",
    "LocationAttention",
]


class _Attention(nn.Module):
    """What the scores share: keys projected once a source, values that default to the keys."""

    scale: float

    def project_query(self, query: Tensor) -> Tensor:
        """What the score compares with the keys: [.., H] to [.., K]."""
        return query

    def project_keys(self, keys: Tensor) -> Tensor:
        """What of a source doesn't depend on the query, [B, S, E] to [B, S, K]: for many calls
        on one source, computed once and given to each as ``projected``."""
        return keys

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor, extra: Tensor | None, **where):
        raise NotImplementedError

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        extra: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            query: [B, H] or [B, Q, H].
            keys: [B, S, E].
            values: [B, S, C]; the keys where absent.
            lengths: source positions that count, [B], integers in 0..S.
            mask: bool, [B, S] or [B, Q, S], True = attend.
            extra: a further term inside the tanh, [B, S, K]; of the additive scores alone.
            projected: :meth:`project_keys` of ``keys``, where it was computed before.

        Returns:
            context [B, C] or [B, Q, C], and weights [B, S] or [B, Q, S].

        Raises:
            TypeError, ValueError: as the score's function in :mod:`fastseq.functional`.
        """
        values = keys if values is None else values
        projected = self.project_keys(keys) if projected is None else projected
        where = {"lengths": lengths, "mask": mask, "scale": self.scale}
        return self._attend(self.project_query(query), projected, values, extra, **where)

    def __prepare_scriptable__(self):
        raise refusal(self)

    def extra_repr(self) -> str:
        return "" if self.scale == 1.0 else f"scale={self.scale:g}"


class _TanhAttention(_Attention):
    """Scores v . tanh(...): the vector v, plain or normalised."""

    def _add_v(self, attention_dim: int, normalize: bool, scale: float, where: dict) -> None:
        self.scale = scale
        self.v = nn.Linear(attention_dim, 1, bias=False, **where)
        length = math.sqrt(1.0 / attention_dim)
        self.g = nn.Parameter(torch.tensor(length, **where)) if normalize else None

    def _attend(self, query, keys, values, extra, **where):
        v = self.v.weight.squeeze(0)
        return additive_attention(query, keys, values, v, g=self.g, extra=extra, **where)


class AdditiveAttention(_TanhAttention):
    """e = v . tanh(W_q h + W_k y + b), as Bahdanau has it.

    Args:
        query_dim, key_dim, attention_dim: H, E and K.
        bias: whether b is there; it belongs to ``key_proj``.
        normalize: whether a scalar g takes the length of v over: ``g v / |v|``, g = sqrt(1 / K) at
            first.
        scale: multiplies the scores.
        device, dtype: of the parameters.

    Source: Bahdanau, Cho and Bengio 2015, appendix A.1.2; normalised v, Salimans and Kingma 2016.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        bias: bool = True,
        normalize: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = {"device": device, "dtype": dtype}
        self.query_proj = nn.Linear(query_dim, attention_dim, bias=False, **where)
        self.key_proj = nn.Linear(key_dim, attention_dim, bias=bias, **where)
        self._add_v(attention_dim, normalize, scale, where)

    def project_query(self, query: Tensor) -> Tensor:
        return self.query_proj(query)

    def project_keys(self, keys: Tensor) -> Tensor:
        return self.key_proj(keys)


class ConcatAttention(_TanhAttention):
    """e = v . tanh(W [h; y] + b): the additive score with both halves of W in one layer, ``attn``.

    Parameters and checkpoints are those of :class:`fastseq.reference.attention.Attention`, where
    H = E = K.

    Args:
        query_dim, key_dim, attention_dim: H, E and K.
        bias, normalize, scale, device, dtype: as :class:`AdditiveAttention`.

    Source: Luong, Pham and Manning 2015, equation 8 (concat).
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        bias: bool = True,
        normalize: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.key_dim = key_dim
        where = {"device": device, "dtype": dtype}
        self.attn = nn.Linear(query_dim + key_dim, attention_dim, bias=bias, **where)
        self._add_v(attention_dim, normalize, scale, where)

    def project_query(self, query: Tensor) -> Tensor:
        return F.linear(query, self.attn.weight[:, : -self.key_dim])

    def project_keys(self, keys: Tensor) -> Tensor:
        return F.linear(keys, self.attn.weight[:, -self.key_dim :], self.attn.bias)


class DotAttention(_Attention):
    """e = h . y; query and keys are of one width, and nothing is learned.

    Args:
        scale: multiplies the scores, as 1 / sqrt(K) does.

    Source: Luong, Pham and Manning 2015, equation 8 (dot).
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def _attend(self, query, keys, values, extra, **where):
        if extra is not None:
            raise TypeError(
                f"fastseq.nn.{type(self).__name__}: expected no extra, got one; only the scores "
                "with a tanh have a place for it"
            )
        return dot_attention(query, keys, values, **where)


class GeneralAttention(DotAttention):
    """e = h W y.

    Args:
        query_dim, key_dim: H and E; ``proj.weight``, [E, H], is W transposed.
        scale: multiplies the scores.
        device, dtype: of the parameters.

    Source: Luong, Pham and Manning 2015, equation 8 (general).
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(scale)
        self.proj = nn.Linear(query_dim, key_dim, bias=False, device=device, dtype=dtype)

    def project_query(self, query: Tensor) -> Tensor:
        return self.proj(query)


class LocationAttention(AdditiveAttention):
    """e = v . tanh(W_q h + W_k y + U f + b), f = filters * previous: where it looked before.

    Args:
        query_dim, key_dim, attention_dim: H, E and K.
        kernel_size: N, odd; positions each filter sees.
        filters: F.
        kinds: J, how many sorts of earlier weights ``previous`` holds.
        bias, normalize, scale, device, dtype: as :class:`AdditiveAttention`.

    Source: Chorowski et al. 2015, equations 8 and 9; cumulative weights, Shen et al. 2018.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        attention_dim: int,
        kernel_size: int = 31,
        filters: int = 32,
        kinds: int = 1,
        bias: bool = True,
        normalize: bool = False,
        scale: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise ValueError(
                f"fastseq.nn.LocationAttention: expected an odd kernel_size, got {kernel_size}"
            )
        where = {"device": device, "dtype": dtype}
        super().__init__(query_dim, key_dim, attention_dim, bias, normalize, scale, **where)
        padding = (kernel_size - 1) // 2
        self.location_conv = nn.Conv1d(
            kinds, filters, kernel_size, padding=padding, bias=False, **where
        )
        self.location_proj = nn.Linear(filters, attention_dim, bias=False, **where)

    def forward(
        self,
        query: Tensor,
        keys: Tensor,
        previous: Tensor,
        values: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        extra: Tensor | None = None,
        projected: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attend; ``previous`` is weights of earlier steps, [B, S] or [B, J, S], and the rest as
        in the other modules. ``extra`` comes on top of the location's own term."""
        features = location_features(previous, self.location_conv.weight, self.location_proj.weight)
        extra = features if extra is None else features + extra
        return super().forward(
            query, keys, values, lengths=lengths, mask=mask, extra=extra, projected=projected
        )
