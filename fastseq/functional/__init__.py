"""Every operation as a function."""

from __future__ import annotations

from fastseq.functional.attention import (
    additive_attention,
    concat_attention,
    dot_attention,
    general_attention,
    location_attention,
)
from fastseq.functional.beams import attention_beams
from fastseq.functional.decoder import attention_decoder
from fastseq.functional.loss import linear_cross_entropy
from fastseq.functional.rnn import (
    gru,
    layer_norm_lstm,
    lstm,
    peephole_lstm,
    rnn_relu,
    rnn_tanh,
)
from fastseq.functional.samples import attention_samples

__all__ = [
    "additive_attention",
    "attention_beams",
    "attention_decoder",
    "attention_samples",
    "concat_attention",
    "dot_attention",
    "general_attention",
    "gru",
    "layer_norm_lstm",
    "linear_cross_entropy",
    "location_attention",
    "lstm",
    "peephole_lstm",
    "rnn_relu",
    "rnn_tanh",
]
