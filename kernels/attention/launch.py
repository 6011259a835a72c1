"""How a call becomes a launch: tiles, parts of the source, buffers."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import _lang
from .._lang import (
    blocks,
    compiler_options,
    precision,
    upcast,
    which_tanh,
)
from .._launch import Launch, addresses, run_planned
from .softmax import merge_kernel, scores_bwd_kernel
from .tuned import tiles

__all__ = [
    "SHAPES",
    "aligned",
    "check",
    "densely",
    "options",
    "plan_forward",
    "products",
    "scores_gradient",
    "split",
    "values_gradient",
]

# Programs that keep a multiprocessor busy, by warps of one.
_WARPS_A_PROCESSOR = 16
# Each part has a partial result of its own in memory.
_MOST_PARTS = 32
# Positions of one query's scores that take no longer than the launch that merges two parts.
_LEAST_SPAN = 128


@functools.cache
def _device(index: int) -> tuple[str, int]:
    """Name and multiprocessors; the index is -1 under the interpreter."""
    if index < 0:
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def _index(device: torch.device) -> int:
    return device.index if device.type == "cuda" else -1


def aligned(*tensors: Tensor | None) -> bool:
    """Whether addresses, widths and strides are all multiples of 16: elements or bytes."""
    numbers = [(t.data_ptr(), t.shape[-1], *t.stride()[:-1]) for t in tensors if t is not None]
    return not any(n % 16 for n in itertools.chain.from_iterable(numbers))


def options(stage: str, query: Tensor, fits: bool) -> dict[str, int]:
    """Tiles and warps of a stage, for a query [B, Q, ...] and inputs that ``fits`` says are
    :func:`aligned`."""
    exact = query.dtype == torch.float32 and precision() == "ieee"
    name, _ = _device(_index(query.device))
    circumstances = ([] if fits else ["unaligned"]) + [_lang.BACKEND]
    return compiler_options(tiles(stage, query.shape[1] == 1, exact, name, circumstances))


def products(query: Tensor) -> dict[str, object]:
    """How tiles are multiplied. The switch is for float32; those of one query are not products of
    matrices."""
    switched = query.dtype == torch.float32 and query.shape[1] > 1
    return {
        "PRECISION": precision() if switched else "ieee",
        "UPCAST": upcast(query.dtype),
    }


def split(
    device: torch.device, programs: int, S: int, block: int, warps: int, least: int = 1
) -> tuple[int, int]:
    """Into how many parts the source goes, and the positions of each: ``least`` or more.

    One, unless ``programs`` of ``warps`` warps would leave multiprocessors idle.
    """
    wanted = _WARPS_A_PROCESSOR * _device(_index(device))[1] // (programs * warps)
    wanted = max(1, min(wanted, _MOST_PARTS, S // least))
    span = blocks(blocks(S, block), wanted) * block
    return blocks(S, span), span


# What kernels take for granted of their inputs, which they have as addresses; fastseq/ops/
# attention.py says what each is. Each letter is one size.
SHAPES = {
    "query": "BQK",
    "keys": "BSK",
    "values": "BSC",
    "v": "K",
    "extra": "BSK",
    "mask": "BQS",
    "lengths": "B",
    "d_context": "BQC",
    "d_weights": "BQS",
    "weights": "BQS",
}


def check(names: Sequence[str], inputs: Sequence[Tensor | None]) -> None:
    """See to it that a launch on ``inputs``, called ``names`` in ``SHAPES``, stays within them.

    Raises:
        RuntimeError: shapes, dtypes or devices do not go together.
    """
    first = next(t for t in inputs if t is not None)
    sizes: dict[str, int] = {}
    for name, t in zip(names, inputs, strict=True):
        if t is None:
            continue
        shape, extents = tuple(t.shape), SHAPES[name]
        if name == "mask" and shape[1:2] == (1,):
            shape = (shape[0], sizes["Q"], *shape[2:])
        expected = [sizes.setdefault(e, n) for e, n in zip(extents, shape, strict=False)]
        if len(extents) != len(shape) or expected != list(shape):
            said = ", ".join(f"{e} = {sizes[e]}" if e in sizes else e for e in extents)
            raise _refusal(name, f"of shape [{said}]", tuple(t.shape))
        if t.device != first.device:
            raise _refusal(name, f"on {first.device}", t.device)
        if name == "lengths":
            if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
                raise _refusal(name, "of integers", t.dtype)
        elif t.dtype != (dtype := torch.bool if name == "mask" else first.dtype):
            raise _refusal(name, f"of {dtype}", t.dtype)


def _refusal(name: str, expected: str, got: object) -> RuntimeError:
    return RuntimeError(f"fastseq.kernels.attention: expected {name} {expected}, got {got}")


def densely(names: str, plan: Callable[[tuple], Callable], whole: Sequence[int] = ()) -> Callable:
    """``plan`` for inputs whose last dimension, or all (those counted in ``whole``), is dense.

    Others are copied first: the only stride that kernels take for granted is the last. So are
    lengths, the last of the inputs, if they are not int64. Inputs, called ``names``, are checked
    where a plan is made: what is checked is what tells plans apart.
    """

    def dense(inputs: tuple) -> tuple:
        *tensors, lengths = inputs
        tensors = [
            t.contiguous() if t is not None and (i in whole or t.stride(-1) != 1) else t
            for i, t in enumerate(tensors)
        ]
        return (*tensors, None if lengths is None else lengths.long().contiguous())

    def planned(inputs: tuple) -> Callable:
        check(names.split(), inputs)
        ready = dense(inputs)
        run = plan(ready)
        if all(map(operator.is_, ready, inputs)):
            return run

        def copying(inputs: tuple, _: Sequence[int | None], *rest: object):
            ready = dense(inputs)
            return run(ready, addresses(ready), *rest)

        return copying

    return planned


def plan_forward(stage: str, kernel, inputs: tuple) -> Callable:
    """The plan of a forward kernel, in one launch or two.

    inputs: query, keys, values; for the additive score v and extra; mask and lengths.

    Returns:
        ``run(inputs, where, scale)``, which returns context [B, Q, C] and weights [B, Q, S].
    """
    query, keys, values, *more, mask, _ = inputs
    B, Q, K = query.shape
    S, C = values.shape[1:]
    device = query.device
    fits = aligned(query, keys, values, *more)
    config = options(stage, query, fits) | products(query)
    if more:
        config["TANH"] = which_tanh()
    programs = B * blocks(Q, config["BLOCK_Q"])
    least = max(1, _LEAST_SPAN // config["BLOCK_Q"])
    parts, span = split(device, programs, S, config["BLOCK_S"], config["num_warps"], least)
    score = Launch(
        kernel[fits],
        device,
        programs * parts,
        (B, Q, S, K, C, parts, span),
        (query, keys, values, None if mask is None else mask.expand(B, Q, S), *more[1:]),
        **config,
    )
    merge = None
    if parts > 1:
        fits = C % 16 == 0
        config = options("merge", query, fits) | {"LANES": _MOST_PARTS}
        merge = Launch(merge_kernel[fits], device, B * Q, (B, Q, S, C, parts), **config)
    exact = query.dtype == torch.float32

    def run(inputs: tuple, where: list, scale: float) -> tuple[Tensor, Tensor]:
        new = inputs[0].new_empty
        context, weights = new(B, Q, C), new(B, Q, S)
        # Where the weights are float32 the scores lie in their place until they are replaced.
        scores = weights if exact else new((B, Q, S), dtype=torch.float32)
        if merge is None:
            score(inputs, where, (scores, weights, context, None, None), scale)
            return context, weights
        partial = new((parts, B, Q, C), dtype=torch.float32)
        peaks = new((2, B, Q, parts), dtype=torch.float32)
        score(inputs, where, (scores, weights, context, partial, peaks), scale)
        merge((), (), (scores, inputs[-1], weights, context, partial, peaks))
        return context, weights

    return run


def scores_gradient(
    d_context: Tensor | None,
    d_weights: Tensor | None,
    values: Tensor,
    weights: Tensor,
    lengths: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the scores before ``scale``, [B, Q, S], in ``dtype``."""
    inputs = (d_context, d_weights, values, weights, lengths)
    if dtype == torch.float32:
        return run_planned("scores_bwd, float32", _PLAN_EXACT_GRADIENT, inputs, scale)
    return run_planned("scores_bwd", _PLAN_GRADIENT, inputs, scale)


def _plan_gradient(exact: bool, inputs: tuple) -> Callable:
    d_context, _, values, weights, _ = inputs
    B, Q, S = weights.shape
    C = values.shape[2]
    fits = aligned(d_context, values)
    config = options("scores_bwd", weights, fits) | products(weights)
    gradient = Launch(
        scores_bwd_kernel[fits],
        weights.device,
        B * blocks(Q, config["BLOCK_Q"]),
        (B, Q, S, C),
        (values,),
        **config,
    )

    def run(inputs: tuple, where: list, scale: float) -> Tensor:
        new = inputs[3].new_empty
        # d_p, float32, gives way to the gradient of the scores.
        d_p = new((B, Q, S), dtype=torch.float32)
        d_scores = d_p if exact else new(B, Q, S)
        gradient(inputs, where, (d_p, d_scores), scale)
        return d_scores

    return run


_PLAN_GRADIENT, _PLAN_EXACT_GRADIENT = (
    densely(
        "d_context d_weights values weights lengths",
        functools.partial(_plan_gradient, exact),
        whole=(0, 1, 3),
    )
    for exact in (False, True)
)


def values_gradient(
    d_context: Tensor | None, values: Tensor, weights: Tensor, needed: bool
) -> Tensor:
    """weights^T d_context, [B, S, C]: a plain product."""
    if not needed:
        return values.new_empty(0)
    if d_context is None:
        return values.new_zeros(values.shape)
    return torch.bmm(weights.mT, d_context)
