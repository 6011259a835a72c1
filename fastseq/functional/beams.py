"""Beam search with a decoder with attention, a whole batch of sources in one call.

Shapes: B sources, S source length, E embedding, H hidden, L layers, K width of queries and keys, C
of values, V vocabulary, W hypotheses a source, N the most tokens of a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.functional._logits import leading_arguments
from fastseq.ops.decoder_beams import attention_decoder_beams

__all__ = ["attention_beams"]


@torch.no_grad()
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
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The most probable targets of each source, by the CPU's kernel: the search of
    :func:`fastseq.decoding.beam_search`, whose options these are. No gradients.

    Args:
        start: the token each source's targets start with, [B], int64.
        hx: the initial h, and c of an LSTM, [L, B, H] each.
        keys, values: what is scored, projected already, [B, S, K], and averaged, [B, S, C].
        params: of the layers, as :func:`fastseq.functional.attention_decoder`.
        embedding: of the tokens, [V, E].
        output: (weight [V, F] or [V, F+E], bias [V] or None) of the logits, as there.
        penalties: what the log-probability of 0, 1, .. N tokens is divided by, N + 1 numbers above
            0; N at least 1.
        width: W, hypotheses a source, between 1 and V.
        n_best: how many to return, at most W.
        ends: token that ends a target, [B], int64; None: none does.
        min_length, no_repeat_ngram, early_stop: as :func:`fastseq.decoding.beam_search`.
        cell, has_biases, query_weight, v, combine, input_feeding, residual, scale: as for
            :func:`fastseq.functional.attention_decoder`.
        lengths: source positions that count, [B], int64 in 0..S; None: all.
        mask: bool, [B, S], True = attend; None: all.

    Returns:
        tokens [B, n_best, N], int64, 0 past a target's end, scores [B, n_best], float64, and
        lengths [B, n_best], int64.

    Raises:
        ValueError: a shape, an option or an end that does not fit.
        TypeError: an argument of the wrong kind or dtype.
        IndexError: a start token outside 0..V-1.
        NotImplementedError: not on a CPU, or no kernel for these.
        RuntimeError: logits that are NaN.

    Source: Sutskever, Vinyals, Le 2014; Wu et al. 2016, equation 14.
    """
    op = "fastseq.attention_beams"
    arguments = leading_arguments(
        op, start, ends, hx, keys, values, params, output, lengths, mask, embedding=embedding,
        cell=cell, has_biases=has_biases, query_weight=query_weight, v=v, combine=combine,
        input_feeding=input_feeding, residual=residual, scale=scale,
    )  # fmt: skip
    V = embedding.shape[0]
    if not 1 <= width <= V:
        raise ValueError(
            f"{op}: expected width of at {'least 1' if width < 1 else f'most V = {V}'}, got {width}"
        )
    if not 1 <= n_best <= width:
        raise ValueError(f"{op}: expected n_best between 1 and width = {width}, got {n_best}")
    if ends is not None and ends.numel() and not 0 <= int(ends.min()) <= int(ends.max()) < V:
        raise ValueError(f"{op}: expected eos in 0..{V - 1}, got {sorted(set(ends.tolist()))}")
    for name, count in (("min_length", min_length), ("no_repeat_ngram", no_repeat_ngram)):
        if count < 0:
            raise ValueError(f"{op}: expected {name} of at least 0, got {count}")
    if len(penalties) < 2 or not all(0 < penalty < torch.inf for penalty in penalties):
        raise ValueError(
            f"{op}: expected penalties of at least 2 finite numbers above 0, got {list(penalties)}"
        )
    penalties = torch.tensor(penalties, dtype=torch.float64, device="cpu")
    tokens, scores, counts = attention_decoder_beams(
        *arguments, penalties, width, n_best, min_length, no_repeat_ngram, early_stop
    )
    return tokens, scores, counts
