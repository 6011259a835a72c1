"""The best of many scores, the lower index first where scores are equal."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["descending", "top"]


def top(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row, as torch.topk, which leaves open what becomes of equal ones.

    Which of many elements at minus infinity is taken stays open.

    Args:
        scores: [R, V], without NaN.
        k: at most V.

    Returns:
        values: [R, k], descending.
        indices: [R, k], int64; ascending where values are equal.
    """
    beyond = min(k + 1, scores.shape[1])
    values, indices = scores.topk(beyond, dim=1)
    # Whether another element has an equal right to the last place.
    cut = (values[:, k:] == values[:, k - 1 : k]) & (values[:, k:] > -torch.inf)
    values, indices = values[:, :k], indices[:, :k]
    if bool(cut.any()):
        rows = cut.squeeze(1).nonzero().squeeze(1)
        whole = scores[rows].sort(dim=1, descending=True, stable=True)
        values = values.index_copy(0, rows, whole.values[:, :k])
        indices = indices.index_copy(0, rows, whole.indices[:, :k])
    indices, order = indices.sort(dim=1)
    values, order = descending(values.gather(1, order))
    return values, indices.gather(1, order)


def descending(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Each row [R, N] in descending order and where its elements came from; equal ones stay put."""
    return scores.sort(dim=1, descending=True, stable=True)
