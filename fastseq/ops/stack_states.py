"""``fastseq::stack_states``: the final states of stacked layers as one tensor, for graphs.

``states`` [D, B, W] of each layer in turn; returns [L*D, B, W]. It is ``torch.cat``, but for one
thing: torch.compile's default backend writes C++ for a cat, and its compilation, with the search
for instruction sets that comes before the first, took most of the time a compiled layer did.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq import _native

__all__ = ["stack_states"]


def _fake(states: list[Tensor]) -> Tensor:
    rows = sum(state.shape[0] for state in states)
    return states[0].new_empty(rows, *states[0].shape[1:])


def _keep_rows(ctx, inputs, output) -> None:
    ctx.rows = [state.shape[0] for state in inputs[0]]


def _backward(ctx, grad: Tensor) -> list[Tensor]:
    return list(grad.split(ctx.rows))


if _native.loaded():
    torch.library.register_fake("fastseq::stack_states")(_fake)
    torch.library.register_autograd("fastseq::stack_states", _backward, setup_context=_keep_rows)
    stack_states = torch.ops.fastseq.stack_states.default
else:
    stack_states = torch.cat
