"""Drop-in replacement for :mod:`torch.nn`: the accelerated modules, and all else unchanged.

``from fastseq import nn`` replaces ``from torch import nn``: every name of torch.nn is here, and
those in ``ACCELERATED`` are fastseq's.
"""

from __future__ import annotations

import torch.nn as _torch_nn

from fastseq.nn import cells as _cells
from fastseq.nn import rnn as _rnn

ACCELERATED = (*_rnn.__all__, *_cells.__all__)
globals().update({name: getattr(home, name) for home in (_rnn, _cells) for name in home.__all__})


def __getattr__(name: str):
    return getattr(_torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*dir(_torch_nn), *globals()})


__all__ = sorted({*ACCELERATED, *(name for name in dir(_torch_nn) if not name.startswith("_"))})
