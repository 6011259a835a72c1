"""Every operation as a function."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import backends
from fastseq.ops import lstm as _lstm_op

__all__ = ["lstm"]


def lstm(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool = True,
    num_layers: int = 1,
    dropout: float = 0.0,
    train: bool = False,
    bidirectional: bool = False,
    batch_first: bool = False,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Long short-term memory over a whole sequence; arguments in the order of torch.lstm.

    T time, B batch, I input, H hidden, L layers, D directions.

    Args:
        input: [T, B, I], [B, T, I] with ``batch_first``, or the rows [N, I] of a PackedSequence
            with ``batch_sizes``; floating, any strides.
        hx: initial hidden and cell state, [L*D, B, H] each, in the input's dtype; None for zeros.
        params: for each layer and direction weight_ih [4H, I or D*H], weight_hh [4H, H] and, with
            ``has_biases``, bias_ih [4H], bias_hh [4H]; gate blocks in the order i, f, g, o.
        has_biases: whether ``params`` holds biases.
        num_layers: L.
        dropout: probability of zeroing an element between layers, where ``train``; torch's own
            random stream.
        train: whether dropout is on.
        bidirectional: whether D is 2.
        batch_first: input and output are [B, T, ...].
        batch_sizes: of a PackedSequence: int64 [T] on the CPU, never increasing.

    Returns:
        output [T, B, D*H] (or [B, T, D*H], or packed [N, D*H]), h_n [L*D, B, H], c_n [L*D, B, H].

    Raises:
        ValueError: a shape or a number of parameters that does not fit.
        TypeError: an argument of the wrong kind or dtype.

    Source: Hochreiter and Schmidhuber 1997; forget gate, Gers, Schmidhuber and Cummins 2000.
    """
    _check_kinds(input, hx, params, has_biases, num_layers, dropout, bidirectional, batch_sizes)
    _check_shapes(
        input, hx, params, has_biases, num_layers, bidirectional, batch_first, batch_sizes
    )
    if backends.lstm_obstacle(input, params) is None:
        return lstm_kernel(
            input,
            hx,
            params,
            has_biases,
            num_layers,
            dropout,
            train,
            bidirectional,
            batch_first,
            batch_sizes,
        )
    if hx is None:
        hx = _zero_state(input, params, num_layers, bidirectional, batch_first, batch_sizes)
    rest = (list(params), has_biases, num_layers, dropout, train, bidirectional)
    if batch_sizes is not None:
        return torch.lstm(input, batch_sizes, hx, *rest)
    return torch.lstm(input, hx, *rest, batch_first)


def lstm_kernel(
    input: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`lstm` once the backend is known to serve it: arguments are checked by the op alone."""
    x = input.transpose(0, 1) if batch_first and batch_sizes is None else input
    directions = 2 if bidirectional else 1
    if hx is None and batch_sizes is not None:
        hx = _zero_state(input, params, num_layers, bidirectional, batch_first, batch_sizes)
    h0, c0 = hx or (None, None)
    if torch.compiler.is_compiling():
        call = _lstm_op.lstm_fwd
        tensors = [t for t in (x, h0, c0, *params) if t is not None]
        save = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    else:
        call = _lstm_op.lstm_fwd_autograd
        save = torch.is_grad_enabled() and torch._C._any_requires_grad(x, h0, c0, *params)
    per_cell = 4 if has_biases else 2
    no_biases = () if has_biases else (None, None)
    no_reverse = () if bidirectional else (None, None, None, None)
    finals = []
    for layer in range(num_layers):
        cells = slice(layer * directions, (layer + 1) * directions)
        weights = []
        for cell in range(cells.start, cells.stop):
            weights += params[cell * per_cell : (cell + 1) * per_cell]
            weights += no_biases
        whole = num_layers == 1 or h0 is None
        x, h_n, c_n, _, _ = call(
            x,
            h0 if whole else h0[cells],
            c0 if whole else c0[cells],
            *weights,
            *no_reverse,
            batch_sizes,
            save,
        )
        finals.append((h_n, c_n))
        if dropout and train and layer + 1 < num_layers:
            x = torch.nn.functional.dropout(x, dropout, training=True)
    if batch_first and batch_sizes is None:
        x = x.transpose(0, 1)
    if num_layers == 1:
        return x, h_n, c_n
    h_n, c_n = (torch.cat(states) for states in zip(*finals, strict=True))
    return x, h_n, c_n


def _zero_state(input, params, num_layers, bidirectional, batch_first, batch_sizes):
    if batch_sizes is not None:
        batch = int(batch_sizes[0]) if len(batch_sizes) else 0
    else:
        batch = input.shape[0 if batch_first else 1]
    cells = num_layers * (2 if bidirectional else 1)
    zeros = input.new_zeros(cells, batch, params[1].shape[1])
    return zeros, zeros


def _check_kinds(input, hx, params, has_biases, num_layers, dropout, bidirectional, batch_sizes):
    def expect(what, kind, got):
        raise TypeError(f"fastseq.lstm: expected {what} to be {kind}, got {type(got).__name__}")

    if not isinstance(input, Tensor):
        expect("input", "a tensor", input)
    if hx is not None and not (isinstance(hx, (tuple, list)) and len(hx) == 2):
        expect("hx", "a pair (h0, c0) or None", hx)
    if not all(isinstance(t, Tensor) for t in (hx or ())):
        expect("hx", "a pair of tensors", hx)
    if isinstance(params, Tensor) or not all(isinstance(p, Tensor) for p in params):
        expect("params", "a flat sequence of tensors", params)
    if batch_sizes is not None and not isinstance(batch_sizes, Tensor):
        expect("batch_sizes", "an int64 tensor or None", batch_sizes)
    if num_layers < 1:
        raise ValueError(f"fastseq.lstm: expected num_layers of at least 1, got {num_layers}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"fastseq.lstm: expected dropout between 0 and 1, got {dropout}")
    names = _param_names(has_biases, num_layers, bidirectional)
    if len(params) != len(names):
        raise ValueError(
            f"fastseq.lstm: expected {len(names)} params ({names[0]}, ..., {names[-1]}), "
            f"got {len(params)}"
        )
    for name, tensor in zip(("hx[0]", "hx[1]"), hx or (), strict=False):
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"fastseq.lstm: expected {name} of dtype {input.dtype}, got {tensor.dtype}"
            )
    if torch.is_autocast_enabled(input.device.type):
        return
    for name, tensor in zip(names, params, strict=True):
        if tensor.dtype != input.dtype:
            raise TypeError(
                f"fastseq.lstm: expected {name} of the input's dtype {input.dtype}, "
                f"got {tensor.dtype}; convert one with .to()"
            )


def _param_names(has_biases, num_layers, bidirectional) -> list[str]:
    """Of ``params``, in their order: torch.nn.LSTM's names."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if has_biases else 2]
    return [
        f"{kind}_l{layer}{side}"
        for layer in range(num_layers)
        for side in (("", "_reverse") if bidirectional else ("",))
        for kind in kinds
    ]


def _check_shapes(
    input, hx, params, has_biases, num_layers, bidirectional, batch_first, batch_sizes
):
    def expect(what, symbols, shape, tensor):
        if list(tensor.shape) != shape:
            raise ValueError(
                f"fastseq.lstm: expected {what} of shape {symbols} = {shape}, "
                f"got {list(tensor.shape)}"
            )

    layout = "[N, I]" if batch_sizes is not None else "[B, T, I]" if batch_first else "[T, B, I]"
    if input.dim() != (2 if batch_sizes is not None else 3):
        raise ValueError(f"fastseq.lstm: expected input of shape {layout}, got {list(input.shape)}")
    if params[1].dim() != 2:
        raise ValueError(
            f"fastseq.lstm: expected weight_hh_l0 of shape [4*H, H], got {list(params[1].shape)}"
        )
    hidden, inputs = params[1].shape[1], input.shape[-1]
    directions = 2 if bidirectional else 1
    for name, tensor in zip(
        _param_names(has_biases, num_layers, bidirectional), params, strict=True
    ):
        if name.startswith("bias"):
            expect(name, "[4*H]", [4 * hidden], tensor)
        elif name.startswith("weight_hh"):
            expect(name, "[4*H, H]", [4 * hidden, hidden], tensor)
        elif name.startswith("weight_ih_l0"):
            expect(name, "[4*H, I]", [4 * hidden, inputs], tensor)
        else:
            expect(name, "[4*H, D*H]", [4 * hidden, directions * hidden], tensor)
    if batch_sizes is None:
        batch = input.shape[0 if batch_first else 1]
    else:
        _check_batch_sizes(batch_sizes, input.shape[0])
        batch = int(batch_sizes[0]) if len(batch_sizes) else 0
    for name, state in zip(("hx[0]", "hx[1]"), hx or (), strict=False):
        expect(name, "[L*D, B, H]", [num_layers * directions, batch, hidden], state)


def _check_batch_sizes(batch_sizes, rows):
    if batch_sizes.dtype != torch.int64 or batch_sizes.dim() != 1 or not batch_sizes.is_cpu:
        raise TypeError(
            "fastseq.lstm: expected batch_sizes as int64 [T] on the CPU, got "
            f"{batch_sizes.dtype} {list(batch_sizes.shape)} on {batch_sizes.device}"
        )
    if torch.compiler.is_compiling():
        return
    sizes = batch_sizes.tolist()
    falling = all(a >= b >= 1 for a, b in zip(sizes, sizes[1:], strict=False))
    if not falling or sum(sizes) != rows or (sizes and sizes[0] < 1):
        raise ValueError(
            f"fastseq.lstm: expected batch_sizes to be positive, never increasing and to sum to "
            f"the {rows} rows of input, got {sizes if len(sizes) < 20 else [*sizes[:20], '...']}"
        )
