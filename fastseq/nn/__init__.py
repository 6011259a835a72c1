"""Drop-in replacement for :mod:`torch.nn`: the accelerated modules, and all else unchanged.

``from fastseq import nn`` replaces ``from torch import nn``: every name of torch.nn is here, and
those in ``ACCELERATED`` are fastseq's. ``ADDED`` are modules torch.nn has no counterpart of.
"""

from __future__ import annotations

import torch.nn as _torch_nn

from fastseq.nn import cells as _cells
from fastseq.nn import decoder as _decoder
from fastseq.nn import loss as _loss
from fastseq.nn import rnn as _rnn
from fastseq.nn import scores as _scores

_OURS = {
    name: getattr(home, name)
    for home in (_cells, _decoder, _loss, _rnn, _scores)
    for name in home.__all__
}
globals().update(_OURS)

ACCELERATED = tuple(sorted(name for name in _OURS if hasattr(_torch_nn, name)))
ADDED = tuple(sorted(name for name in _OURS if not hasattr(_torch_nn, name)))


def __getattr__(name: str):
    return getattr(_torch_nn, name)


def __dir__() -> list[str]:
    return sorted({*dir(_torch_nn), *globals()})


__all__ = [name for name in dir(_torch_nn) if not name.startswith("_")]
__all__ += ADDED
