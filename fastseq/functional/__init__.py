"""Every operation as a function."""

from __future__ import annotations

from fastseq.functional.loss import linear_cross_entropy
from fastseq.functional.rnn import (
    gru,
    layer_norm_lstm,
    lstm,
    peephole_lstm,
    rnn_relu,
    rnn_tanh,
)

__all__ = [
    "gru",
    "layer_norm_lstm",
    "linear_cross_entropy",
    "lstm",
    "peephole_lstm",
    "rnn_relu",
    "rnn_tanh",
]
