"""Drop-in replacement for :mod:`torch.nn`: the accelerated modules, and all else unchanged.

``from fastseq import nn`` replaces ``from torch import nn``: every name of torch.nn is here, and
those in ``ACCELERATED`` are fastseq's. ``ADDED`` are modules torch.nn has no counterpart of.
"""

from __future__ import annotations

import torch.nn as _torch_nn

from fastseq.nn.rnn import LSTM as LSTM
from fastseq.nn.scores import AdditiveAttention as AdditiveAttention
from fastseq.nn.scores import ConcatAttention as ConcatAttention
from fastseq.nn.scores import DotAttention as DotAttention
from fastseq.nn.scores import GeneralAttention as GeneralAttention
from fastseq.nn.scores import LocationAttention as LocationAttention

ACCELERATED = ("LSTM",)
ADDED = (
    "AdditiveAttention",
    "ConcatAttention",
    "DotAttention",
    "GeneralAttention",
    "LocationAttention",
)


def __getattr__(name: str):
    return getattr(_torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*dir(_torch_nn), *globals()})


__all__ = [name for name in dir(_torch_nn) if not name.startswith("_")]
__all__ += ADDED
