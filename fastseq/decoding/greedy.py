"""Greedy decoding: at each step the most likely token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastseq.decoding._rows import Rows, a_token_each, check_max_length, cut, whole, write

__all__ = ["greedy"]


@torch.no_grad()
def greedy(
    model: nn.Module,
    src: Tensor,
    lengths: Tensor | None = None,
    max_length: int = 100,
    bos: int | Tensor = 2,
    eos: int | Tensor | None = 3,
    *,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode a batch of sources with a Seq2Seq, fast or reference.

    Rows that have ended take no part in further steps; decoding stops when every row has ended,
    at ``max_length`` tokens at the latest. The model's mode is left as it is: call ``model.eval()``
    first where that matters.

    Args:
        model: with the ``encoder`` and ``decoder`` of a Seq2Seq, with or without attention.
        src: source token ids, [B, S], int64.
        lengths: tokens in each source row, [B], int64, between 1 and S; None: all are full.
        max_length: the most tokens to decode.
        bos: start token, or one for each row, [B], int64.
        eos: token that ends a row, or one for each row, [B], int64; None: no row ends early.
        return_weights: return the attention weights too.

    Returns:
        Tokens [B, N], int64, N <= max_length: without the start token, with ``eos`` where it came,
        and <pad> = 0 after it. If asked for, the weights too, [B, N, S]; zero after a row's end.

    Raises:
        ValueError: negative ``max_length``, ``bos`` or ``eos`` of another shape, ``lengths`` out of
            range, weights asked of a model without attention.
        TypeError: ``lengths`` not int64, an option not the number it should be.
    """
    check_max_length(max_length, "greedy")
    start = a_token_each(bos, src, "bos", "greedy")
    ends = None if eos is None else a_token_each(eos, src, "eos", "greedy")
    one_end = eos is None or isinstance(eos, int)
    found = None
    if one_end:
        found = whole(model, "greedy", src, lengths, start, max_length=max_length, end_token=eos)
        found = found and cut(*found, eos)
    if found is None:
        rows = Rows(model, src, lengths, "greedy")
        if return_weights and rows.no_weights is None:
            raise ValueError(
                "fastseq.greedy: expected return_weights = False for a model without attention"
            )
        found = rows.greedy(start, max_length, eos) if one_end else None
    tokens, weights = found or write(
        rows, start, ends, max_length, lambda logits: logits.argmax(1), return_weights
    )
    return (tokens, weights) if return_weights else tokens
