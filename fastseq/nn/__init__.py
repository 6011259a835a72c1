"""Drop-in replacement for :mod:`torch.nn`: the accelerated modules, and all else unchanged.

``from fastseq import nn`` replaces ``from torch import nn``: every name of torch.nn is here, and
those in ``ACCELERATED`` are fastseq's.
"""

from __future__ import annotations

import torch.nn as _torch_nn

from fastseq.nn.rnn import LSTM as LSTM

ACCELERATED = ("LSTM",)


def __getattr__(name: str):
    return getattr(_torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*dir(_torch_nn), *globals()})


__all__ = [name for name in dir(_torch_nn) if not name.startswith("_")]
