"""Backward passes that no kernel has: by autograd through the reference.

Gradients that are to be differentiated in turn are made so, and those inside a transform, where
cotangents may be batches (``is_grads_batched``, ``vectorize=True``) or have tangents: kernels have
rules for neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["gradients", "wanted"]


def wanted(*cotangents: Tensor | None) -> bool:
    """Whether the backward pass that is running, of these cotangents, has to go this way."""
    return (
        torch.is_grad_enabled()
        or torch.autograd.forward_ad._current_level >= 0
        or any(c is not None and _is_batched(c) for c in cotangents)
    )


def _is_batched(t: Tensor) -> bool:
    # (is_grads_batched has batches of an older kind than torch.func.)
    functorch = torch._C._functorch
    return functorch.is_functorch_wrapped_tensor(t) or functorch.is_legacy_batchedtensor(t)


def gradients(
    reference: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Tensor | None],
    need: Sequence[bool],
    cotangents: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Those of ``reference(*inputs)``, themselves differentiable in grad mode.

    Args:
        reference: returns the outputs, as many as there are cotangents or more.
        inputs: what gradients may be wanted of.
        need: of each input, whether one is; there may be more.
        cotangents: of the outputs; None where there is none.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views of their own: gradients must stop at this call's inputs, which may share a past.
        inputs = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
        # An output may depend on nothing that wants a gradient: final states on no weight of a
        # projection, say.
        pairs = [
            (o, c)
            for o, c in zip(reference(*inputs), cotangents, strict=False)
            if c is not None and o.requires_grad
        ]
        if not pairs:
            return [None] * len(inputs)
        chosen = [i for i, tensor in enumerate(inputs) if tensor is not None and need[i]]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            [inputs[i] for i in chosen],
            [c for _, c in pairs],
            create_graph=differentiable,
            allow_unused=True,
        )
    grads = dict(zip(chosen, found, strict=True))
    return [grads.get(i) for i in range(len(inputs))]
