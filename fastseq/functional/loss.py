"""Losses as functions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import backends
from fastseq.ops.linear_cross_entropy import loss_of

__all__ = ["linear_cross_entropy"]

REDUCTIONS = ("mean", "sum", "none")

# Logits of this many bytes are made at once, by torch: below, setting the walk up costs more than
# it saves (measured: equal at 4 MB, half the time at 10 KB).
DIRECT_BYTES = 1 << 20


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of a linear layer's logits, which are never held for all rows at once.

    The value and gradients of ``F.cross_entropy(F.linear(hidden, weight, bias), target, ...)`` with
    logits [N, V] of the flattened rows. Rows that are ignored cost nothing. What is held beside
    inputs and gradients does not grow with N beyond a chunk's logits: 16 MiB, or a sixteenth of
    ``weight`` if that is more; in half precision half as much again, and the gradient of ``weight``
    in float32 until the backward pass. Gradients of gradients go through
    :mod:`fastseq.reference.loss` and do hold the logits.

    Args:
        hidden: [N, H], or any number of leading dimensions; float64, float32, bfloat16 or
            float16, any strides. The last two are summed and normalised in float32.
        weight: [V, H], in the dtype of ``hidden``.
        bias: [V], or None.
        target: ids, int64, of the leading dimensions of ``hidden``: [N].
        class_weight: what a target counts for, [V]; None: 1. Has no gradient.
        ignore_index: the target of rows that do not count.
        label_smoothing: between 0 and 1: the part of the target spread evenly over the vocabulary.
        reduction: "mean" (over the weights of the rows that count; NaN if none does), "sum" or
            "none".

    Returns:
        A scalar, or one loss a row in the shape of ``target``; in the dtype of ``hidden``, float32
        under autocast.

    Raises:
        IndexError: a target id outside 0..V-1 that is not ``ignore_index``.
        ValueError: a shape that does not fit, an unknown reduction, a smoothing outside 0..1.
        TypeError: an argument of the wrong kind or dtype.

    Source: Szegedy et al. 2016, section 7 (label smoothing); Hsu et al. 2024, "Liger Kernel"
    (gradients of each chunk in the forward pass).
    """
    _check(hidden, weight, bias, target, class_weight, label_smoothing, reduction)
    if _left_to_torch(hidden, weight) is not None:
        return _by_torch(
            hidden, weight, bias, target, class_weight, ignore_index, label_smoothing, reduction
        )
    device, out_dtype = hidden.device.type, hidden.dtype
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        lower = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(lower), weight.to(lower)
        bias = None if bias is None else bias.to(lower)
        out_dtype = torch.float32
    grads = torch.is_grad_enabled()
    loss = loss_of(
        hidden.reshape(target.numel(), hidden.shape[-1]),
        weight,
        bias,
        target.reshape(-1),
        class_weight,
        ignore_index,
        label_smoothing,
        reduction,
        grads and hidden.requires_grad,
        grads and weight.requires_grad,
        grads and bias is not None and bias.requires_grad,
    ).to(out_dtype)
    return loss.view(target.shape) if reduction == "none" else loss


def explanation(hidden, weight, bias=None, target=None, *args, **keywords) -> backends.Explanation:
    """What runs a call, and why; of the arguments only ``hidden`` and ``weight`` decide."""
    reason = _left_to_torch(hidden, weight)
    if reason is not None:
        return backends.Explanation("linear_cross_entropy", "torch", reason)
    return backends.Explanation(
        "linear_cross_entropy",
        hidden.device.type,
        "chunks of rows, so that the logits of all are never held; each chunk's products are "
        "PyTorch's",
    )


def _left_to_torch(hidden: Tensor, weight: Tensor) -> str | None:
    """Why torch's own two operators serve the call, or None."""
    if torch.compiler.is_compiling():
        return None
    forced = backends._forced.get()
    if forced == "torch":
        return "use_backend('torch') is in force"
    # Torch's operators know every transform.
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own operators"
    if torch.autograd.forward_ad._current_level >= 0:
        return "no forward-mode derivative yet"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "no rule for torch.func transforms yet"
    rows = hidden.numel() // max(hidden.shape[-1], 1)
    size = rows * weight.shape[0] * weight.element_size()
    small = (
        size <= DIRECT_BYTES
        and forced != "cpu"
        and weight.dtype in (torch.float32, torch.float64)
        # Elsewhere an id out of range is not an error that can be caught.
        and weight.is_cpu
    )
    return f"all logits are {size} bytes: chunks would save nothing" if small else None


def _by_torch(hidden, weight, bias, target, class_weight, ignore_index, smoothing, reduction):
    try:
        loss = F.cross_entropy(
            F.linear(hidden, weight, bias).reshape(target.numel(), weight.shape[0]),
            target.reshape(-1),
            class_weight,
            ignore_index=ignore_index,
            label_smoothing=smoothing,
            reduction=reduction,
        )
    except IndexError as error:
        raise IndexError(
            f"fastseq.linear_cross_entropy: expected target ids in 0..{weight.shape[0] - 1} or "
            f"ignore_index = {ignore_index}, got: {error}"
        ) from error
    return loss.view(target.shape) if reduction == "none" else loss


def _check(hidden, weight, bias, target, class_weight, label_smoothing, reduction) -> None:
    where = "fastseq.linear_cross_entropy: expected"
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "target": target}
    tensors["class_weight"] = class_weight
    for name, tensor in tensors.items():
        if tensor is None and name in ("bias", "class_weight"):
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where} {name} to be a tensor, got {type(tensor).__name__}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"{where} reduction to be one of {REDUCTIONS}, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{where} label_smoothing between 0 and 1, got {label_smoothing}")
    if not hidden.is_floating_point():
        raise TypeError(f"{where} hidden of a floating dtype, got {hidden.dtype}")
    if target.dtype != torch.int64:
        raise TypeError(f"{where} target of dtype torch.int64 (ids), got {target.dtype}")
    autocast = torch.is_autocast_enabled(hidden.device.type)
    for name in ("weight", "bias", "class_weight"):
        tensor = tensors[name]
        if tensor is not None and tensor.dtype != hidden.dtype and not autocast:
            raise TypeError(
                f"{where} {name} of hidden's dtype {hidden.dtype}, got {tensor.dtype}; "
                "convert one with .to()"
            )
    if class_weight is not None and class_weight.requires_grad:
        raise ValueError(f"{where} class_weight without requires_grad: it has no gradient")
    if hidden.dim() == 0:
        raise ValueError(f"{where} hidden of shape [.., H], got a scalar")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{where} weight of shape [V, H] with H = {hidden.shape[-1]}, got {list(weight.shape)}"
        )
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{where} target of the leading dimensions of hidden {list(hidden.shape[:-1])}, "
            f"got {list(target.shape)}"
        )
    for name in ("bias", "class_weight"):
        tensor = tensors[name]
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise ValueError(
                f"{where} {name} of shape [V] = [{weight.shape[0]}], got {list(tensor.shape)}"
            )
