"""``fastseq.explain``: which code a call would run, and why."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import backends, functional
from fastseq.backends import Explanation
from fastseq.functional import loss
from fastseq.functional._checks import NO_ZONEOUT, Options, check_zoneout
from fastseq.functional.decoder import kind_of
from fastseq.nn.cells import _FastCell
from fastseq.nn.loss import LinearCrossEntropy
from fastseq.nn.rnn import _FastLayer
from fastseq.nn.scores import _Attention

__all__ = ["explain"]

ACCELERATED = (_FastLayer, _FastCell)


_DECODERS = (
    functional.attention_decoder,
    functional.attention_beams,
    functional.attention_samples,
)


def explain(target: Callable | torch.nn.Module, *args, **kwargs) -> Explanation:
    """Say what ``target(*args, **kwargs)`` would run, without running it.

    Args:
        target: a function of :mod:`fastseq.functional` or :mod:`fastseq.decoding`, or a module.
        args, kwargs: what it would be called with. For a module they may be left out: then the
            module's own weights stand for the input's dtype and device.

    Returns:
        An :class:`Explanation`; ``str()`` of it is a sentence.

    Raises:
        TypeError: ``target`` is neither.
    """
    if isinstance(target, ACCELERATED):
        return _explain_module(target, *args, **kwargs)
    if isinstance(target, LinearCrossEntropy):
        return loss.explanation(args[0] if args else target.weight, target.weight)
    if target is functional.linear_cross_entropy:
        return loss.explanation(*args, **kwargs)
    if hasattr(target, "explained"):
        # What stands above this module says of itself what it runs.
        return target.explained(*args, **kwargs)
    if target in _DECODERS:
        return _explain_decoder(*args, **kwargs)
    if isinstance(target, _Attention):
        if not args and "query" not in kwargs:
            args = (next(target.parameters(), torch.empty(0)),)
        return _explain_attention(type(target).__name__, *args, **kwargs)
    if isinstance(target, torch.nn.Module):
        name = type(target).__name__
        return Explanation(name, "torch", "not one of fastseq's modules")
    if getattr(functional, getattr(target, "__name__", ""), None) is target:
        name = target.__name__
        explain_it = _explain_attention if name.endswith("_attention") else _explain_function
        return explain_it(name, *args, **kwargs)
    raise TypeError(
        f"fastseq.explain: expected a module or a function of fastseq.functional, got {target!r}"
    )


def _explain_module(module, input=None, hx=None, lengths=None, resets=None) -> Explanation:
    weights = [w for w in module._weights_now() or () if w is not None]
    packed = isinstance(input, PackedSequence)
    x = input.data if packed else input
    known = isinstance(x, Tensor)
    zoneout = getattr(module, "zoneout", NO_ZONEOUT)
    one_step = isinstance(module, _FastCell)
    options = None
    if known and not one_step:
        if x.dim() == 2 and not packed:
            x = x.unsqueeze(1)
        options = Options(
            module.bias,
            module.num_layers,
            bidirectional=module.bidirectional,
            batch_first=module.batch_first and x is input,
            batch_sizes=input.batch_sizes if packed else None,
            lengths=lengths,
            resets=resets,
            zoneout=zoneout,
        )
    return backends.recurrent_explanation(
        module.cell_name,
        x if known else weights[0],
        weights,
        one_step=one_step,
        plain=lengths is None and resets is None and not any(zoneout),
        options=options,
        hx=hx,
    )


def _explain_decoder(input, hx, keys, values, params, *, cell="lstm", **kwargs) -> Explanation:
    if len(params) == 0:
        raise ValueError("fastseq.explain: expected params, the weights of the cell, got none")
    kind = kind_of(cell, hx[0].shape[0] if hx else 1, kwargs)
    by_steps = kwargs.get("location") is not None
    known = input.dim() > 1 and keys.dim() == 3
    T, K = (input.shape[1], keys.shape[2]) if known else (None, None)
    return backends.decoder_explanation(values, params, kind, by_steps, T, K)


def _explain_attention(name, query, keys=None, values=None, *args, **keywords) -> Explanation:
    known = [t for t in (keys, values) if t is not None]
    return backends.attention_explanation(name, query, *known)


def _explain_function(name, input, hx=None, params=(), *args, **kwargs) -> Explanation:
    given = inspect.signature(getattr(functional, name)).bind(input, hx, params, *args, **kwargs)
    known = {k: v for k, v in given.arguments.items() if k in Options._fields}
    options = Options(**known)
    options = options._replace(zoneout=check_zoneout(name, options.zoneout))
    plain = options.lengths is None and options.resets is None and not any(options.zoneout)
    return backends.recurrent_explanation(
        name, input, params, plain=plain, options=options if params else None, hx=hx
    )
