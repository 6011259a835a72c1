"""Dot attention, backward: with the gradient of the scores, d_e, dq = d_e k and dk = d_e^T q.

Past the fused gradient of the softmax these are plain products, left to cuBLAS or hipBLAS. Half
dtypes are multiplied as such: d_e is rounded once, which README.md bounds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import scores_gradient, values_gradient

__all__ = ["dot_bwd"]


def dot_bwd(
    d_context: Tensor | None,
    d_weights: Tensor | None,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor | None,
    weights: Tensor,
    scale: float,
    need_scores: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``fastseq::dot_attention_bwd``; shapes are the operator's."""
    d_values = values_gradient(d_context, values, weights, need_values)
    if not need_scores:
        return query.new_empty(0), query.new_empty(0), d_values
    d_scores = scores_gradient(d_context, d_weights, values, weights, lengths, scale, query.dtype)
    return torch.bmm(d_scores, keys), torch.bmm(d_scores.mT, query), d_values
