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
    values, indices = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    # One further place tells whether an element left out equals the last one taken.
    equal = (values[:, 1:] == values[:, :-1]) & (values[:, 1:] > -torch.inf)
    values, indices = values[:, :k], indices[:, :k]
    if k and bool(equal.any()):
        rows = equal.any(1).nonzero().squeeze(1)
        again = _by_index(scores[rows], values[rows, k - 1 :], k)
        values, indices = (
            t.index_copy(0, rows, new) for t, new in zip((values, indices), again, strict=True)
        )
    return values, indices


def _by_index(scores: Tensor, last: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """:func:`top` where ``last`` [R, 1] is the k-th largest: of its equals, the first ones."""
    above, level = scores > last, scores == last
    room = k - above.sum(1, keepdim=True)
    taken = above | (level & (level.cumsum(1) <= room))
    indices = taken.nonzero()[:, 1].view(-1, k)
    values, order = descending(scores.gather(1, indices))
    return values, indices.gather(1, order)


def descending(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Each row [R, N] in descending order and where its elements came from; equal ones stay put."""
    return scores.sort(dim=1, descending=True, stable=True)
