"""The decoder with attention in plain PyTorch, a step at a time: oracle and fallback.

Arguments, shapes and meaning are those of :func:`fastseq.functional.attention_decoder`; every
function runs on any device in any floating dtype and is differentiable any number of times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq.reference.rnn import step
from fastseq.reference.scores import additive_attention, dot_attention, location_features

__all__ = ["attention_decoder"]


def attention_decoder(
    input: Tensor,
    hx: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    params: Sequence[Tensor],
    *,
    cell: str = "lstm",
    has_biases: bool = True,
    query_weight: Tensor | None = None,
    v: Tensor | None = None,
    combine: tuple[Tensor, Tensor | None] | None = None,
    input_feeding: bool = False,
    feed: Tensor | None = None,
    residual: bool = False,
    scale: float = 1.0,
    lengths: Tensor | None = None,
    mask: Tensor | None = None,
    embedding: Tensor | None = None,
    forced: Sequence[bool] | None = None,
    output: tuple[Tensor, Tensor | None] | None = None,
    input_factor: Tensor | None = None,
    output_factor: Tensor | None = None,
    location: tuple[Tensor, Tensor] | None = None,
    score: Callable = additive_attention,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor | None]:
    """Features, final states, attention weights and the tokens that were fed, one step at a time.

    Args and Returns: as :func:`fastseq.functional.attention_decoder`: input [B, T, E] or [B, T],
    hx [L, B, H] each, keys [B, S, K], values [B, S, C]. ``score`` is what an additive score is
    computed by.
    """
    T = input.shape[1]
    layers = hx[0].shape[0]
    per_layer = len(params) // layers
    states = [tuple(state[i] for state in hx) for i in range(layers)]
    if combine is not None and input_feeding and feed is None:
        feed = values.new_zeros(keys.shape[0], combine[0].shape[0])

    # Of the step before, and of all steps before.
    seen = [values.new_zeros(keys.shape[:2])] * 2

    def attend(h: Tensor) -> tuple[Tensor, Tensor]:
        query = h if query_weight is None else F.linear(h, query_weight)
        where = {"lengths": lengths, "mask": mask, "scale": scale}
        if v is None:
            return dot_attention(query, keys, values, **where)
        if location is None:
            return score(query, keys, values, v, **where)
        filters, weight = location
        previous = torch.stack(seen[: filters.shape[1]], dim=1)
        extra = location_features(previous, filters, weight)
        context, last = score(query, keys, values, v, extra=extra, **where)
        seen[:] = last, seen[1] + last
        return context, last

    features, weights, tokens = [], [], []

    def likeliest(t: int) -> Tensor:
        read = features[t]
        if output[0].shape[1] > read.shape[1]:
            read = torch.cat((read, embedded), dim=1)
        if output_factor is not None:
            read = read * output_factor[:, t]
        return F.linear(read, *output).argmax(1)

    for t in range(T):
        x = input[:, t]
        if not input.is_floating_point():
            if forced is not None and not forced[t]:
                x = likeliest(t - 1)
            tokens.append(x)
            x = F.embedding(x, embedding)
            x = embedded = x if input_factor is None else x * input_factor[:, t]
        if combine is None:
            context, attended = attend(states[-1][0])
            x = torch.cat((x, context), dim=1)
        elif input_feeding:
            x = torch.cat((x, feed), dim=1)
        for i in range(layers):
            side = list(params[i * per_layer : (i + 1) * per_layer])
            states[i] = step(cell, x, states[i], side if has_biases else [*side, None, None])
            x = states[i][0] + x if residual and i else states[i][0]
        if combine is None:
            feature = torch.cat((x, context), dim=1)
        else:
            context, attended = attend(x)
            feature = feed = F.linear(torch.cat((context, x), dim=1), *combine).tanh()
        features.append(feature)
        weights.append(attended)
    if forced is not None and len(forced) > T:
        tokens.append(likeliest(T - 1))
    final = tuple(torch.stack(kind) for kind in zip(*states, strict=True))
    fed = torch.stack(tokens, dim=1) if tokens else None
    if not T:
        width = combine[0].shape[0] if combine else hx[0].shape[2] + values.shape[2]
        nothing = values.new_zeros(keys.shape[0], 0, width)
        return nothing, final, values.new_zeros(keys.shape[0], 0, keys.shape[1]), fed
    return torch.stack(features, dim=1), final, torch.stack(weights, dim=1), fed
