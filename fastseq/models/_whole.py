"""The attention model as one operator, where its parts are what it made them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import backends, nn
from fastseq.models._steps import Forced, computes_as, is_lookup, is_one_layer
from fastseq.ops import attention_seq2seq

__all__ = ["logits", "parameters", "write"]


def parameters(model: nn.Module, kinds: tuple[type, type], src: Tensor) -> list[Tensor] | None:
    """What the operators take of a model whose encoder and decoder are of ``kinds``; None where
    they do not serve: with hooks or a forward of one's own somewhere, in a dtype or on a device
    without a kernel, inside a transform or a compiled graph."""
    encoder, decoder = model.encoder, model.decoder
    if (
        torch.compiler.is_compiling()
        or not (computes_as(encoder, kinds[0]) and computes_as(decoder, kinds[1]))
        or not (is_lookup(encoder.embedding) and decoder.picks_in_one_call())
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    lstm, attention, fc = encoder.lstm, decoder.attention, decoder.fc
    if not is_one_layer(lstm, nn.LSTM) or lstm.recompute:
        return None
    attn, weight = attention.attn, fc.weight
    found = [
        encoder.embedding.weight, *lstm._weights_now(), decoder.embedding.weight, attn.weight,
        attn.bias, attention.v.weight, *decoder.lstm._weights_now(), weight, fc.bias,
    ]  # fmt: skip
    if not (weight.is_cpu and src.is_cpu and weight.dtype in (torch.float32, torch.float64)):
        return None
    if any(parameter is None for parameter in found):
        return None
    return None if backends.recurrent_obstacle("lstm", weight, found) is not None else found


def logits(given: list[Tensor] | None, src: Tensor, trg: Tensor, forced: Forced | None):
    """Logits [B, T, V] by :func:`parameters`; None where there are none, or they do not fit."""
    if given is None:
        return None
    forced = None if forced is None else torch.tensor(forced)
    try:
        return attention_seq2seq.run(src, trg, forced, given)
    except RuntimeError:
        # What it refuses, the modules know better words for, or another way.
        return None


def write(
    way: str, given: list[Tensor] | None, src: Tensor, start: Tensor, options: dict[str, object]
) -> Sequence[Tensor] | None:
    """What the function ``way`` of :mod:`fastseq.ops.attention_seq2seq` returns: "greedy", "beams"
    or "samples"; None as above."""
    try:
        return given and getattr(attention_seq2seq, way)(src, start, given, **options)
    except RuntimeError:
        return None
