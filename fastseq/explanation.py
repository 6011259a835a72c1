"""``fastseq.explain``: which code a call would run, and why."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import backends, functional, nn
from fastseq.backends import Explanation

__all__ = ["explain"]


def explain(target: Callable | torch.nn.Module, *args, **kwargs) -> Explanation:
    """Say what ``target(*args, **kwargs)`` would run, without running it.

    Args:
        target: a function of :mod:`fastseq.functional`, or a module.
        args, kwargs: what it would be called with. For a module they may be left out: then the
            module's own weights stand for the input's dtype and device.

    Returns:
        An :class:`Explanation`; ``str()`` of it is a sentence.

    Raises:
        TypeError: ``target`` is neither.
    """
    if isinstance(target, nn.LSTM):
        return _explain_lstm_module(target, *args, **kwargs)
    if isinstance(target, torch.nn.Module):
        name = type(target).__name__
        return Explanation(name, "torch", "not one of fastseq's modules")
    if target is functional.lstm:
        return _explain_lstm(*args, **kwargs)
    raise TypeError(
        f"fastseq.explain: expected a module or a function of fastseq.functional, got {target!r}"
    )


def _explain_lstm_module(module, input=None, hx=None) -> Explanation:
    weights = [w for w in module._weights_now() or () if w is not None]
    x = input.data if isinstance(input, PackedSequence) else input
    return backends.lstm_explanation(
        x if isinstance(x, Tensor) else weights[0], weights, module.proj_size
    )


def _explain_lstm(input, hx=None, params=(), *args, **kwargs) -> Explanation:
    return backends.lstm_explanation(input, params)
