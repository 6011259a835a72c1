"""What ``fastseq.explain`` says of decoding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from fastseq import backends
from fastseq.explanation import ACCELERATED, Explanation, explain

__all__ = ["explains_itself"]

# The method of a decoder that does all steps of a way of decoding.
_WHOLE = {"greedy": "generate", "beam_search": "search", "sample": "draw"}


def explains_itself(function: Callable) -> Callable:
    """Give a decoding function, whose first argument is a model, what ``explain`` asks for."""
    function.explained = partial(_explained, function.__name__)
    return function


def _explained(name: str, model: nn.Module, *args, **keywords) -> Explanation:
    """The loop is the same for every model; what a step runs is the decoder's. Some decoders have a
    kernel for all of it."""
    decoder = model.decoder
    fast = [module for module in decoder.modules() if isinstance(module, ACCELERATED)]
    if fast and hasattr(decoder, _WHOLE.get(name, "")) and decoder.picks_in_one_call():
        weight = decoder.fc.weight
        kernel = backends.recurrent_explanation(fast[0].cell_name, weight, [weight], plain=False)
        if kernel.backend == "cpu":
            return Explanation(name, "cpu", f"all steps are one call of {kernel.reason}")
    inner = explain(fast[0]) if fast else None
    seam = "its stepper, which prepares a source once" if hasattr(decoder, "stepper") else "itself"
    said = f"a loop of tensor operations; a step calls the decoder through {seam}"
    if inner is None:
        return Explanation(name, "torch", f"{said}; none of its layers is fastseq's")
    return Explanation(name, inner.backend, f"{said}; its {inner.op}: {inner.reason}")
