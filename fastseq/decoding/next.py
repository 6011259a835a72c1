"""What comes next: the most probable tokens after a beginning."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastseq.decoding._rows import Choice, Rows, a_token_each, check_integers, decode
from fastseq.decoding._top import top

__all__ = ["next_tokens"]


@torch.no_grad()
def next_tokens(
    model: nn.Module,
    src: Tensor,
    prefix: int | Tensor = 2,
    lengths: Tensor | None = None,
    *,
    k: int = 5,
) -> tuple[Tensor, Tensor]:
    """The ``k`` most probable next tokens after the beginnings of targets, and how probable.

    Args:
        model: with the ``encoder`` and ``decoder`` of a Seq2Seq, with or without attention.
        src: source token ids, [B, S], int64.
        prefix: the targets so far, [B, P], int64, with the start token, P at least 1; or the start
            token alone, one or [B].
        lengths: tokens in each source row, [B], int64, between 1 and S; None: all are full.
        k: between 1 and V.

    Returns:
        tokens: [B, k], int64, the most probable first, the lower id first among equals.
        probabilities: [B, k], in the dtype of the logits, at least float32.

    Raises:
        ValueError: ``k`` out of range, ``prefix`` of another shape, ``lengths`` out of range.
        TypeError: ``lengths`` not int64, ``k`` no integer.
    """
    where = "fastseq.next_tokens: expected"
    check_integers("next_tokens", k=k)
    if k < 1:
        raise ValueError(f"{where} k of at least 1, got {k}")
    if isinstance(prefix, Tensor) and prefix.dim() == 2:
        if prefix.shape[0] != src.shape[0] or prefix.shape[1] == 0:
            raise ValueError(
                f"{where} prefix of shape [B, P] with B = {src.shape[0]} and P of at least 1, "
                f"got {list(prefix.shape)}"
            )
        prefix = prefix.to(src.device)
    else:
        prefix = a_token_each(prefix, src, "prefix", "next_tokens").unsqueeze(1)
    columns = list(prefix.unbind(1))
    following = iter(columns[1:])
    last = None

    def choose(logits: Tensor, _: Tensor | None) -> Choice:
        nonlocal last
        last = logits
        return Choice(next(following, columns[0]))

    decode(Rows(model, src, lengths, "next_tokens"), columns[0], len(columns), choose)
    if last is None:
        return prefix.new_empty(0, k), torch.empty(0, k, device=src.device)
    if k > last.shape[1]:
        raise ValueError(f"{where} k of at most V = {last.shape[1]}, got {k}")
    last = last.to(torch.promote_types(last.dtype, torch.float32))
    values, tokens = top(last, k)
    return tokens, (values - last.logsumexp(1, keepdim=True)).exp()
