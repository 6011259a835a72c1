"""Sampling with a decoder with attention, a whole batch of targets in one call.

Shapes: B sources, S source length, E embedding, H hidden, L layers, K width of queries and keys, C
of values, V vocabulary, N the most tokens of a target.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq.functional._logits import leading_arguments
from fastseq.ops.decoder_samples import attention_decoder_samples

__all__ = ["attention_samples"]


@torch.no_grad()
def attention_samples(
    start: Tensor,
    hx: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    params: Sequence[Tensor],
    *,
    embedding: Tensor,
    output: tuple[Tensor, Tensor | None],
    drawn: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    ends: Tensor | None = None,
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
) -> tuple[Tensor, Tensor]:
    """Draw a target for each source, by the CPU's kernel: :func:`fastseq.decoding.sample`, whose
    options these are, with the random numbers given. No gradients.

    Args:
        start: the token each target starts with, [B], int64.
        hx: the initial h, and c of an LSTM, [L, B, H] each.
        keys, values: what is scored, projected already, [B, S, K], and averaged, [B, S, C].
        params: of the layers, as :func:`fastseq.functional.attention_decoder`.
        embedding: of the tokens, [V, E].
        output: (weight [V, F] or [V, F+E], bias [V] or None) of the logits, as there.
        drawn: a number from [0, 1) for each step and source, [N, B], float64: the token is the
            first whose CDF is above it, in the order of the vocabulary, or with ``top_k`` or
            ``top_p`` that leave something out from the most probable token down.
        temperature, top_k, top_p: as :func:`fastseq.decoding.sample`.
        ends: token that ends a target, [B], int64; None: none does.
        cell, has_biases, query_weight, v, combine, input_feeding, residual, scale: as for
            :func:`fastseq.functional.attention_decoder`.
        lengths: source positions that count, [B], int64 in 0..S; None: all.
        mask: bool, [B, S], True = attend; None: all.

    Returns:
        tokens [B, N], int64, 0 past a target's end, and lengths [B], int64: of each, its end
        included.

    Raises:
        ValueError: an option out of range, a shape that does not fit.
        TypeError: an argument of the wrong kind or dtype.
        IndexError: a start token outside 0..V-1.
        NotImplementedError: not on a CPU, or no kernel for these.
        RuntimeError: logits that are NaN or all minus infinity.

    Source: Fan, Lewis, Dauphin 2018 (top-k); Holtzman et al. 2020 (nucleus).
    """
    op = "fastseq.attention_samples"
    arguments = leading_arguments(
        op, start, ends, hx, keys, values, params, output, lengths, mask, embedding=embedding,
        cell=cell, has_biases=has_biases, query_weight=query_weight, v=v, combine=combine,
        input_feeding=input_feeding, residual=residual, scale=scale,
    )  # fmt: skip
    V, B = embedding.shape[0], start.shape[0]
    check_sampling(op, temperature, top_k, top_p)
    if not isinstance(drawn, Tensor) or drawn.dtype != torch.float64:
        got = drawn.dtype if isinstance(drawn, Tensor) else type(drawn).__name__
        raise TypeError(f"{op}: expected drawn to be a float64 tensor, got {got}")
    if drawn.dim() != 2 or drawn.shape[1] != B:
        raise ValueError(
            f"{op}: expected drawn of shape [N, B] with B = {B}, got {list(drawn.shape)}"
        )
    if drawn.numel() and not 0 <= float(drawn.min()) <= float(drawn.max()) < 1:
        raise ValueError(f"{op}: expected drawn in [0, 1), got others")
    tokens, counts = attention_decoder_samples(
        *arguments, drawn, float(temperature), V if top_k is None else min(top_k, V), float(top_p)
    )
    return tokens, counts


def check_sampling(op: str, temperature: float, top_k: int | None, top_p: float) -> None:
    """Refuse options of sampling that are out of range."""
    if not 0 < temperature < torch.inf:
        raise ValueError(f"{op}: expected a finite temperature above 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"{op}: expected top_k of at least 1, got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"{op}: expected top_p above 0 and at most 1, got {top_p}")
