"""Every operation as a function."""

from __future__ import annotations

from fastseq.functional.attention import (
    additive_attention,
    concat_attention,
    dot_attention,
    general_attention,
    location_attention,
)
from fastseq.functional.rnn import lstm
from fastseq.functional.rnn import lstm_kernel as lstm_kernel

__all__ = [
    "additive_attention",
    "concat_attention",
    "dot_attention",
    "general_attention",
    "location_attention",
    "lstm",
]
