"""``recurrent_fwd`` and ``recurrent_bwd`` past torch's dispatcher, for plain eager calls.

The dispatcher takes an op of so many arguments 10 microseconds to its kernel, five times what a
small layer computes. A call that looks, to the guards of torch's own compiler, like one found fit
before goes to the same kernel through a C function (csrc/ops/recurrent_direct.cpp). Whatever
watches or changes operators (a mode, a profiler, a subclass, a transform) has the registered op.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from fastseq import _native

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:
    TensorGuards = None

__all__ = ["backward", "forward"]

_DTYPES = (torch.float32, torch.float64)
# More layers than a program has; one that makes new weights all the time must not fill the memory.
_MOST_LAYERS = 4096
_layers: dict[tuple, _Layer] = {}

_watched = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch.autograd._profiler_enabled,
)


class _Layer:
    """A layer whose weights were found fit: what a call of it needs."""

    def __init__(self, kind, settings, tensors: Sequence[Tensor | None]) -> None:
        x, h0, c0, *weights = tensors
        P, D = weights[1].shape[1], settings.directions
        H = weights[0].shape[0] // kind.gates
        self.kind, self.directions, self.widths = kind, D, (P, H)
        projected = len(weights) // D == 3 + 2 * settings.has_biases + bool(kind.params)
        self.saved = kind.saved * H + (P if projected else 0)
        numbers = (kind.number, x.dtype is torch.float64, x.shape[-1], H, P, D)
        self.packed = struct.pack("8q", *numbers, settings.has_biases, projected)
        self.one_step = x.dim() == 2
        # Steps and rows are as many as they are, and x has any strides.
        sizes = [[*[None] * (x.dim() - 1), x.shape[-1]]]
        strides = [[*[None] * (x.dim() - 1), 1]]
        for state, width in zip((h0, c0), self.widths, strict=True):
            if state is not None:
                sizes.append([None, width] if self.one_step else [D, None, width])
                strides.append([*[None] * (x.dim() - 1), 1])
        sizes += [list(w.shape) for w in weights]
        strides += [list(w.stride()) for w in weights]
        self.guards = TensorGuards(
            *[t for t in tensors if t is not None],
            dynamic_dims_sizes=sizes,
            dynamic_dims_strides=strides,
        )
        inputs = 7 + len(weights)
        self.forward = _function("fastseq_recurrent_fwd", inputs + 4)
        self.backward = _function("fastseq_recurrent_bwd", inputs + 9 + len(weights))
        self.biases = [
            settings.has_biases and i % (len(weights) // D) in (2, 3) for i in range(len(weights))
        ]


def _function(name: str, numbers: int) -> Callable[..., None]:
    """The C function of that name, of a packed layer and so many numbers."""
    function, pack = getattr(_native.library(), name), struct.Struct(f"{numbers}q").pack
    function.argtypes = (ctypes.c_char_p, ctypes.c_char_p)

    def call(layer: bytes, *numbers: int) -> None:
        error = function(layer, pack(*numbers))
        if error is not None:
            raise RuntimeError(f"fastseq: {error.decode()}")

    return call


def _find(kinds, settings, x, h0, c0, weights) -> _Layer | None:
    """The layer of a call; None where the dispatcher is to have it."""
    _, _, _, batch_sizes, lengths, resets, masks, _ = settings
    if batch_sizes is not None or lengths is not None or resets is not None or masks:
        return None
    for watched in _watched:
        if watched():
            return None
    key = (
        settings[:3],
        id(weights[0]),
        len(weights),
        x.dim(),
        x.requires_grad,
        h0 is None or h0.requires_grad,
        c0 is None or c0.requires_grad,
        h0 is None,
        c0 is None,
    )
    layer = _layers.get(key)
    tensors = (x, h0, c0, *weights)
    present = [t for t in tensors if t is not None] if h0 is None or c0 is None else tensors
    if layer is None or not layer.guards.check(*present):
        if not _fit(kinds[settings.cell], settings, tensors):
            return None
        if len(_layers) >= _MOST_LAYERS:
            _layers.clear()
        layer = _layers[key] = _Layer(kinds[settings.cell], settings, tensors)
        if not layer.guards.check(*present):
            return None
    B = x.shape[-2]
    for state in (h0, c0):
        if state is not None and (state.shape[-2] != B or not state.is_contiguous()):
            return None
    return layer if x.numel() else None


def _fit(kind, settings, tensors) -> bool:
    """Whether the kernel may read these tensors as they stand."""
    x, h0, c0, *weights = tensors
    one_step = x.dim() == 2 and settings.directions == 1
    if TensorGuards is None or not (x.dim() == 3 or one_step):
        return False
    if c0 is not None and kind.states == 1:
        return False
    for t in tensors:
        if t is None:
            continue
        plain = type(t) in (Tensor, Parameter) and t.is_cpu and t.layout is torch.strided
        if not plain or t.dtype not in _DTYPES or t.dtype is not x.dtype or not t.numel():
            return False
        if _wrapped(t) or t.is_neg():
            return False
    per, D = len(weights) // settings.directions, settings.directions
    least = 2 + 2 * settings.has_biases + bool(kind.params)
    if per * D != len(weights) or per not in (least, least + 1) or weights[1].dim() != 2:
        return False
    P, H = weights[1].shape[1], weights[0].shape[0] // kind.gates
    shapes = [(kind.gates * H, x.shape[-1]), (kind.gates * H, P)]
    shapes += [(kind.gates * H,)] * (2 * settings.has_biases)
    shapes += [(kind.params, H)] * bool(kind.params)
    shapes += [(P, H)] * (per == least + 1)
    if per == least and P != H or per > least and kind.states != 2:
        return False
    if x.stride(-1) != 1 or not all(
        w.is_contiguous() and w.shape == shape for w, shape in zip(weights, shapes * D, strict=True)
    ):
        return False
    rows = x.shape[:1] if one_step else (D, x.shape[1])
    states = zip((h0, c0), (P, H), strict=True)
    return all(state is None or state.shape == (*rows, width) for state, width in states)


def _wrapped(t: Tensor) -> bool:
    of = torch._C._functorch
    return of.is_functorch_wrapped_tensor(t) or of.is_legacy_batchedtensor(t)


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def forward(kinds, settings, x, h0, c0, weights, save: bool) -> list[Tensor] | None:
    """What ``recurrent_fwd`` returns, or None: then it is for the dispatcher.

    Args:
        kinds: the cells by number.
        settings, x, h0, c0, weights: as of :func:`fastseq.ops.recurrent.run`.
        save: whether the backward pass will follow.
    """
    layer = _find(kinds, settings, x, h0, c0, weights)
    if layer is None:
        return None
    T, B, step, row, rows = _extents(layer, x)
    D, (P, H), new = layer.directions, layer.widths, x.new_empty
    # Of one step h_n is all of y.
    out = [] if layer.one_step else [new((T, B, D * P))]
    out.append(h_n := new((*rows, P)))
    c_n = saved = None
    if layer.kind.states == 2:
        out.append(c_n := new((*rows, H)))
    if save:
        out.append(saved := new((D, T * B, layer.saved)))
    layer.forward(
        layer.packed, T, B, step, row, x.data_ptr(), _address(h0), _address(c0),
        *[w.data_ptr() for w in weights],
        out[0].data_ptr(), h_n.data_ptr(), _address(c_n), _address(saved),
    )  # fmt: skip
    return out


def _extents(layer: _Layer, x: Tensor) -> tuple[int, int, int, int, tuple[int, ...]]:
    """T, B, the strides of steps and rows of x, the shape of a state but for its width."""
    if layer.one_step:
        B = x.shape[0]
        return 1, B, 0, x.stride(0), (B,)
    (T, B, _), (step, row, _) = x.shape, x.stride()
    return T, B, step, row, (layer.directions, B)


def backward(
    kinds, settings, dy, dh_n, dc_n, x, h0, c0, weights, saved, need_dx, need_dw, need_db, need_dh0
) -> list[Tensor] | None:
    """What ``recurrent_bwd`` returns, or None: then it is for the dispatcher."""
    layer = _find(kinds, settings, x, h0, c0, weights)
    if layer is None:
        return None
    T, B, step, row, rows = _extents(layer, x)
    D, (P, H), new = layer.directions, layer.widths, x.new_empty
    # Hooks may have put anything in the place of what was saved, and of gradients.
    shapes = ((D, T * B, layer.saved), (T, B, D * P), (*rows, P), (*rows, H))
    given = [saved, dy, dh_n, dc_n]
    for i, t in enumerate(given):
        if t is None:
            continue
        plain = type(t) is Tensor and t.is_cpu and t.layout is torch.strided and not _wrapped(t)
        if not plain or t.shape != shapes[i] or t.dtype is not x.dtype or t.is_neg():
            return None
        if not (t.stride(2) == 1 if i == 1 else t.is_contiguous()):
            given[i] = t.contiguous()
    saved, dy, dh_n, dc_n = given
    out = [new(x.shape)] if need_dx else []
    dh0 = dc0 = None
    if need_dh0:
        out.append(dh0 := new((*rows, P)))
    if layer.kind.states == 2:
        # Of use to the loop even where nobody wants it.
        dc0 = new((*rows, H))
        if need_dh0:
            out.append(dc0)
    gradients = [
        new(w.shape) if (need_db if bias else need_dw) else None
        for w, bias in zip(weights, layer.biases, strict=True)
    ]
    dy_step, dy_row = (0, 0) if dy is None else dy.stride()[:2]
    layer.backward(
        layer.packed, T, B, step, row, x.data_ptr(), _address(h0), _address(c0),
        *[w.data_ptr() for w in weights],
        saved.data_ptr(), dy_step, dy_row, _address(dy), _address(dh_n), _address(dc_n),
        out[0].data_ptr() if need_dx else 0, _address(dh0), _address(dc0),
        *map(_address, gradients),
    )  # fmt: skip
    return out + [g for g in gradients if g is not None]
