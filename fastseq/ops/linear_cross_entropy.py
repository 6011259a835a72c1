"""``fastseq::linear_cross_entropy_fwd`` and ``_bwd``: cross entropy without the logits of all rows.

Both walk over chunks of rows: logits of a chunk, log-softmax in place, and, where gradients are
wanted, d loss / d logits in the same place and the three products it enters. hidden [N, H],
weight [V, H], bias [V], target [N], class_weight [V]. The large products are torch's own, as is
everything else, so one text serves every device.

A loss summed or averaged over rows has its gradients from the forward pass, up to one factor that
the backward pass applies. With reduction "none" each row has a factor of its own and dweight can't
wait for it: there the backward pass walks again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from fastseq.ops import by_reference
from fastseq.reference.loss import linear_cross_entropy as _reference

__all__ = ["linear_cross_entropy_bwd", "linear_cross_entropy_fwd", "loss_of"]

# Bytes of a chunk's logits. Beyond 512 rows at V = 8000 the products gain nothing (measured).
CHUNK_BYTES = 16 << 20
# Rows summed in float32 for a bias: a class that is the target of many has as many terms near -1.
SUMMED_ROWS = 32

_ARGUMENTS = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? class_weight, "
    "int ignore_index, float label_smoothing, "
)
_NEEDS = "bool need_hidden, bool need_weight, bool need_bias"
_library = torch.library.Library("fastseq", "FRAGMENT")
_library.define(
    f"linear_cross_entropy_fwd({_ARGUMENTS}str reduction, {_NEEDS})"
    " -> (Tensor loss, Tensor scale, Tensor dhidden, Tensor dweight, Tensor dbias)"
)
_library.define(
    f"linear_cross_entropy_bwd(Tensor dloss, {_ARGUMENTS}{_NEEDS})"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and softmax of ``dtype`` are held in: at least float32."""
    return torch.promote_types(dtype, torch.float32)


def chunk_rows(vocabulary: int, hidden: int, itemsize: int) -> int:
    """Rows a chunk: logits of CHUNK_BYTES or a sixteenth of the weight, whichever is more."""
    return max(CHUNK_BYTES // max(vocabulary * itemsize, 1), hidden // 16, 1)


def _counted_rows(target: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor | None, int]:
    """Indices of the rows not ignored (None: all), and their number; ids are in range after it."""
    counted = target != ignore_index
    count = int(counted.sum())
    rows = None if count == target.shape[0] else counted.nonzero().squeeze(1)
    if count:
        low, high = (int(t) for t in (target if rows is None else target[rows]).aminmax())
        if low < 0 or high >= vocabulary:
            raise IndexError(
                f"fastseq.linear_cross_entropy: expected target ids in 0..{vocabulary - 1} or "
                f"ignore_index = {ignore_index}, got {low if low < 0 else high}"
            )
    return rows, count


def _chunks(rows: Tensor | None, count: int, size: int) -> Iterator[slice | Tensor]:
    """What to index the counted rows of a chunk with."""
    if rows is not None:
        yield from rows.split(size) if count else ()
        return
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _walk(
    hidden, weight, bias, target, class_weight, ignore_index, smoothing, row_scale, needs
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Loss of each row, counted rows, and the gradients of their sum weighted by ``row_scale``.

    Gradients of weight and bias are in the accumulator's dtype. ``row_scale`` [N] or None.
    """
    N, (V, H) = hidden.shape[0], weight.shape
    dtype, wide = hidden.dtype, accumulator_dtype(hidden.dtype)
    rows, count = _counted_rows(target, ignore_index, V)
    size = min(chunk_rows(V, H, wide.itemsize), max(count, 1))
    need_hidden, need_weight, need_bias = needs

    losses = hidden.new_zeros(N, dtype=wide)
    dhidden = hidden.new_zeros(N, H) if need_hidden else hidden.new_empty(0)
    dweight = hidden.new_zeros((V, H) if need_weight else 0, dtype=wide)
    dbias = hidden.new_zeros(V if need_bias else 0, dtype=torch.float64)
    w = None if class_weight is None else class_weight.to(wide)
    buffer = hidden.new_empty(size, V)
    wide_buffer = None if wide == dtype else hidden.new_empty(size, V, dtype=wide)
    for chunk in _chunks(rows, count, size):
        h, y = hidden[chunk], target[chunk].unsqueeze(1)
        logits = buffer[: len(y)]
        if bias is None:
            torch.mm(h, weight.t(), out=logits)
        else:
            torch.addmm(bias, h, weight.t(), out=logits)
        log_p = logits if wide_buffer is None else wide_buffer[: len(y)].copy_(logits)
        torch.log_softmax(log_p, 1, out=log_p)
        picked_weight = None if w is None else w[y.squeeze(1)]
        loss = log_p.gather(1, y).squeeze(1).mul_(smoothing - 1)
        if w is not None:
            loss.mul_(picked_weight)
        if smoothing:
            spread = log_p.sum(1) if w is None else torch.mv(log_p, w)
            loss.sub_(spread, alpha=smoothing / V)
        losses[chunk] = loss
        if not any(needs):
            continue
        scale = None if row_scale is None else row_scale[chunk].to(wide)
        _dlogits(log_p, y, w, picked_weight, smoothing, scale)
        d = log_p if wide_buffer is None else logits.copy_(log_p)
        if need_hidden:
            dhidden[chunk] = torch.mm(d, weight)
        if need_weight:
            if wide_buffer is None:
                dweight.addmm_(d.t(), h)
            else:
                dweight.add_(torch.mm(d.t(), h))
        if need_bias:
            for some in log_p.split(SUMMED_ROWS):
                dbias.add_(some.sum(0))
    return losses, rows, dhidden, dweight, dbias.to(wide)


def _dlogits(log_p, y, w, picked_weight, smoothing, scale) -> None:
    """Turn log p [C, V] into the gradients of the rows' losses, times scale [C], in place.

    With s the scale: p s ((1 - e) w_y + e / V sum_c w_c) - [c = y] s (1 - e) w_y - s e / V w_c.
    """
    V = log_p.shape[1]
    on_target = None if w is None else picked_weight * (1 - smoothing)
    whole = None if w is None else on_target + smoothing / V * w.sum()
    if scale is not None:
        on_target = scale * (1 - smoothing) if w is None else on_target * scale
        whole = scale if w is None else whole * scale
    p = log_p.exp_()
    if whole is not None:
        p.mul_(whole.unsqueeze(1))
    if smoothing and w is None:
        p.sub_(smoothing / V if scale is None else (scale * (smoothing / V)).unsqueeze(1))
    elif smoothing:
        p.addr_(torch.ones_like(on_target) if scale is None else scale, w, alpha=-smoothing / V)
    if on_target is None:
        p.scatter_add_(1, y, p.new_full((1, 1), smoothing - 1).expand(y.shape))
    else:
        p.scatter_add_(1, y, -on_target.unsqueeze(1))


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """The kernel has chosen its dtypes; autocast must not choose again inside."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def _fwd(
    hidden,
    weight,
    bias,
    target,
    class_weight,
    ignore_index,
    smoothing,
    reduction,
    need_hidden,
    need_weight,
    need_bias,
):
    needs = (need_hidden, need_weight, need_bias)
    if reduction == "none":
        needs = (False, False, False)
    with _no_autocast(hidden.device):
        losses, rows, *grads = _walk(
            hidden, weight, bias, target, class_weight, ignore_index, smoothing, None, needs
        )
        scale = losses.new_ones(())
        if reduction == "none":
            return losses, scale, *grads
        total = losses.sum()
        if reduction == "mean":
            counted = target if rows is None else target[rows]
            divisor = scale * len(counted)
            if class_weight is not None:
                divisor = class_weight.to(losses.dtype)[counted].sum()
            total = total / divisor
            # Nothing counted: a mean of NaN, but gradients of zero, as in torch.
            scale = 1 / divisor if len(counted) else torch.zeros_like(scale)
        return total, scale, *grads


def _bwd(
    dloss,
    hidden,
    weight,
    bias,
    target,
    class_weight,
    ignore_index,
    smoothing,
    need_hidden,
    need_weight,
    need_bias,
):
    needs = (need_hidden, need_weight, need_bias)
    with _no_autocast(hidden.device):
        return _walk(
            hidden, weight, bias, target, class_weight, ignore_index, smoothing, dloss, needs
        )[2:]


def _grads_fake(hidden, weight, need_hidden, need_weight, need_bias):
    wide = accumulator_dtype(hidden.dtype)
    return (
        hidden.new_empty(hidden.shape if need_hidden else 0),
        weight.new_empty(weight.shape if need_weight else 0, dtype=wide),
        weight.new_empty(weight.shape[0] if need_bias else 0, dtype=wide),
    )


def _fwd_fake(hidden, weight, bias, target, class_weight, ignore, smoothing, reduction, *needs):
    wide = accumulator_dtype(hidden.dtype)
    rows = reduction == "none"
    loss = hidden.new_empty(hidden.shape[0] if rows else (), dtype=wide)
    needs = (False, False, False) if rows else needs
    return loss, hidden.new_empty((), dtype=wide), *_grads_fake(hidden, weight, *needs)


def _bwd_fake(dloss, hidden, weight, bias, target, class_weight, ignore, smoothing, *needs):
    return _grads_fake(hidden, weight, *needs)


# Whether a backward pass may come again; if not, what was saved for it may be overwritten: a second
# copy of a large weight's gradient would be most of a step's memory. (True where torch can't tell.)
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *inputs):
        hidden, weight, bias, target, class_weight, ignore_index, smoothing, reduction, *_ = inputs
        if any(
            needs and not said
            for needs, said in zip(ctx.needs_input_grad, inputs[8:], strict=False)
        ):
            raise RuntimeError(
                "fastseq.linear_cross_entropy_fwd: expected need_* = True for inputs that require "
                f"grad, got {inputs[8:]}"
            )
        with torch._C._AutoDispatchBelowAutograd():
            output = linear_cross_entropy_fwd(*inputs)
        ctx.options = ignore_index, smoothing, reduction
        ctx.alone = False
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, target, class_weight, *output[1:])
        return output

    @staticmethod
    def backward(ctx, dloss, *_):
        needs = ctx.needs_input_grad[:3]
        *inputs, scale, dhidden, dweight, dbias = ctx.saved_tensors
        if dloss is None:
            return (None,) * 11
        if by_reference.wanted(dloss):

            def loss(*leaves):
                return (_reference(*leaves, *inputs[3:], *ctx.options).to(dloss.dtype),)

            return *by_reference.gradients(loss, inputs[:3], needs, [dloss]), *(None,) * 8
        ignore_index, smoothing, reduction = ctx.options
        if reduction == "none":
            grads = linear_cross_entropy_bwd(dloss, *inputs, ignore_index, smoothing, *needs)
        else:
            scale = scale * dloss
            times = Tensor.mul_ if ctx.alone and not _keeps_graph() else Tensor.mul
            grads = [
                times(grad, scale) if needed else None
                for grad, needed in zip((dhidden, dweight, dbias), needs, strict=True)
            ]
        dtype = inputs[0].dtype
        kept = [g.to(dtype) if needed else None for g, needed in zip(grads, needs, strict=True)]
        return *kept, *(None,) * 8


class _Loss(_LinearCrossEntropy):
    """The loss alone: gradients that nobody else holds may be scaled where they lie."""

    @staticmethod
    def forward(ctx, *inputs):
        loss = _LinearCrossEntropy.forward(ctx, *inputs)[0]
        ctx.alone = True
        return loss


def loss_of(*inputs) -> Tensor:
    """The operator's loss, differentiable; inputs as its own."""
    if torch.compiler.is_compiling() or type(inputs[0]) is not Tensor:
        return linear_cross_entropy_fwd(*inputs)[0]
    wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs[:3])
    if wanted and torch._C._functorch.peek_interpreter_stack() is None:
        return _Loss.apply(*inputs)
    return linear_cross_entropy_fwd(*inputs)[0]


def _fwd_autograd(*inputs):
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs[:3]):
        return _LinearCrossEntropy.apply(*inputs)
    with torch._C._AutoDispatchBelowAutograd():
        return linear_cross_entropy_fwd(*inputs)


linear_cross_entropy_fwd = torch.ops.fastseq.linear_cross_entropy_fwd.default
linear_cross_entropy_bwd = torch.ops.fastseq.linear_cross_entropy_bwd.default
_library.impl("linear_cross_entropy_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("linear_cross_entropy_bwd", _bwd, "CompositeExplicitAutograd")
_library.impl("linear_cross_entropy_fwd", _fwd_autograd, "Autograd")
torch.library.register_fake("fastseq::linear_cross_entropy_fwd", _fwd_fake)
torch.library.register_fake("fastseq::linear_cross_entropy_bwd", _bwd_fake)
