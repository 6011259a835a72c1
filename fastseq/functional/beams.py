"""Beam search with a decoder with attention, a whole batch of sources in one call.

Shapes: B sources, S source length, E embedding, H hidden, L layers, K width of queries and keys, C
of values, V vocabulary, W hypotheses a source, N the most tokens of a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.functional.decoder import check_decoder, widening
from fastseq.ops.decoder import DECODER_CELLS
from fastseq.ops.decoder_beams import attention_decoder_beams

__all__ = ["attention_beams"]


def attention_beams(
    start: Tensor,
    hx: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    params: Sequence[Tensor],
    *,
    embedding: Tensor,
    output: tuple[Tensor, Tensor | None],
    penalties: Sequence[float],
    width: int,
    n_best: int = 1,
    ends: Tensor | None = None,
    min_length: int = 0,
    no_repeat_ngram: int = 0,
    early_stop: bool = True,
    cell: str = "lstm",
    has_biases: bool = True,
    query_weight: Tensor | None = None,
    v: Tensor | None = None,
    combine: tuple[Tensor, Tensor | None] | None = None,
    input_feeding: bool = False,
    residual: bool = False,
    scale: float = 1.0,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable targets of each source, by the kernel: the search of
    :func:`fastseq.decoding.beam_search`, whose options these are.

    Args:
        start: the token each source's targets start with, [B], int64.
        hx, keys, values, params, embedding, output and what follows ``early_stop``: as
            :func:`fastseq.functional.attention_decoder`.
        penalties: what the log-probability of 0, 1, .. N tokens is divided by; N at least 1.
        width: W, between 1 and V.
        n_best: how many to return, at most W.
        ends: token that ends a target, [B], int64; None: none does.
        min_length, no_repeat_ngram, early_stop: as there.

    Returns:
        tokens [B, n_best, N], int64, 0 past a target's end, scores [B, n_best], float64, and
        lengths [B, n_best], int64.

    Raises:
        ValueError: a shape, a width or an end that does not fit.
        TypeError: an argument of the wrong kind or dtype.
        IndexError: a start token outside 0..V-1.
        RuntimeError: logits that are NaN.

    Source: Sutskever, Vinyals, Le 2014; Wu et al. 2016, equation 14.
    """
    op = "fastseq.attention_beams"
    arguments = {
        "cell": cell, "has_biases": has_biases, "query_weight": query_weight, "v": v,
        "combine": combine, "input_feeding": input_feeding, "feed": None, "embedding": embedding,
        "forced": None, "output": output, "input_factor": None, "output_factor": None,
    }  # fmt: skip
    check_decoder(op, start.unsqueeze(1), hx, keys, values, params, arguments, None, mask, None)
    V = embedding.shape[0]
    if not 1 <= width <= V:
        raise ValueError(f"{op}: expected width of at most V = {V}, got {width}")
    if ends is not None and ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < V:
        raise ValueError(
            f"{op}: expected eos in 0..{V - 1}, got {sorted(set(ends.flatten().tolist()))}"
        )
    wide = widening(values.dtype)
    w_c, b_c = (None, None) if combine is None else combine
    h0, *c0 = map(wide, hx)
    tokens, scores, lengths = attention_decoder_beams(
        DECODER_CELLS[cell].number, start, ends, wide(embedding), h0, c0[0] if c0 else None,
        wide(keys), wide(values), mask, list(map(wide, params)), has_biases, wide(query_weight),
        wide(v), wide(w_c), wide(b_c), input_feeding, residual, float(scale), *map(wide, output),
        torch.tensor(penalties, dtype=torch.float64), width, n_best, min_length, no_repeat_ngram,
        early_stop,
    )  # fmt: skip
    return tokens, scores, lengths
