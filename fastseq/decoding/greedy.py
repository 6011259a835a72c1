"""Greedy decoding: at each step the most likely token."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from fastseq.reference.attention import check_lengths, length_mask

__all__ = ["greedy"]

PAD = 0


@torch.no_grad()
def greedy(
    model: nn.Module,
    src: Tensor,
    lengths: Tensor | None = None,
    max_length: int = 100,
    bos: int | Tensor = 2,
    eos: int | None = 3,
    *,
    return_weights: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Decode a batch of sources with an attention Seq2Seq, fast or reference.

    Decoding stops when every row has ended, at ``max_length`` tokens at the latest. The model's
    mode is left as it is: call ``model.eval()`` first where that matters.

    Args:
        model: with the ``encoder`` and ``decoder`` of an attention Seq2Seq.
        src: source token ids, [B, S], int64.
        lengths: tokens in each source row, [B], int64, between 1 and S; None: all are full.
        max_length: the most tokens to decode.
        bos: start token, or one for each row, [B], int64.
        eos: token that ends a row; None: no row ends early.
        return_weights: return the attention weights too.

    Returns:
        tokens: [B, N], int64, N <= max_length: without the start token, with ``eos`` where it came,
            and <pad> = 0 after it.
        weights: only if asked for: [B, N, S]; those of a row that has ended mean nothing.

    Raises:
        ValueError: negative ``max_length``, ``bos`` of another shape, ``lengths`` out of range.
        TypeError: ``lengths`` not int64.
    """
    if max_length < 0:
        raise ValueError(f"fastseq.greedy: expected max_length of at least 0, got {max_length}")
    batch, steps = src.shape
    start = torch.as_tensor(bos, dtype=torch.int64, device=src.device)
    if start.shape not in ((), (batch,)):
        raise ValueError(
            f"fastseq.greedy: expected bos to be a token or of shape [B] = [{batch}], "
            f"got {list(start.shape)}"
        )
    mask = None
    if lengths is not None:
        check_lengths(lengths, src)
        mask = length_mask(lengths.to(src.device), steps)

    encoder_outputs, (hidden, cell) = model.encoder(src, lengths)
    decoder = model.decoder
    if hasattr(decoder, "stepper"):
        step = decoder.stepper(encoder_outputs, mask)
    else:
        step = partial(decoder, encoder_outputs=encoder_outputs, mask=mask)

    token = start.expand(batch).unsqueeze(1)
    ended = torch.zeros_like(token, dtype=torch.bool)
    tokens, weights = [src.new_empty(batch, 0)], [encoder_outputs.new_empty(batch, 0, steps)]
    for _ in range(max_length):
        logits, hidden, cell, attention = step(token, hidden, cell)
        token = logits.argmax(2).masked_fill(ended, PAD)
        tokens.append(token)
        if return_weights:
            weights.append(attention)
        if eos is not None:
            ended = ended | (token == eos)
            if bool(ended.all()):
                break
    decoded = torch.cat(tokens, dim=1)
    return (decoded, torch.cat(weights, dim=1)) if return_weights else decoded
