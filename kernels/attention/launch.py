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
    "clocks_of",
    "densely",
    "options",
    "plan_forward",
    "products",
    "scores_gradient",
    "split",
    "values_gradient",
    "words",
]

# Programs that keep a multiprocessor busy, by warps of one.
_WARPS_A_PROCESSOR = 16
# Each part has a partial result of its own in memory.
_MOST_PARTS = 32
# Clocks of a multiprocessor that a part takes at least: some 10 us, twice what the launch after the
# parts costs, so that even two parts save as much as they cost, and more.
_LEAST_CLOCKS = 1 << 14
# Of a multiprocessor, a clock, where few of them are at work.
_BYTES_A_CLOCK, _PRODUCTS_A_CLOCK, _SPECIAL_A_CLOCK = 32, 128, 16


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
    device: torch.device, programs: int, S: int, config: dict[str, int], clocks: int
) -> tuple[int, int]:
    """Into how many parts the source goes, and the positions of each.

    One, unless ``programs`` would leave multiprocessors idle, and a part is worth a launch more.

    config: tiles and warps; clocks: that a program takes for a position.
    """
    warps = programs * config["num_warps"]
    wanted = _WARPS_A_PROCESSOR * _device(_index(device))[1] // warps
    least = max(1, _LEAST_CLOCKS // max(1, clocks))
    wanted = max(1, min(wanted, _MOST_PARTS, S // least))
    block = config["BLOCK_S"]
    span = blocks(blocks(S, block), wanted) * block
    return blocks(S, span), span


def clocks_of(queries: int, columns: int, itemsize: int, terms: int = 0) -> int:
    """Of a program, for a position: the most of reading it, multiplying it and its tanh.

    columns: of keys and values; terms: tanh of a query.
    """
    return max(
        columns * itemsize // _BYTES_A_CLOCK,
        queries * columns // _PRODUCTS_A_CLOCK,
        2 * queries * terms // _SPECIAL_A_CLOCK,
    )


def words(lengths: Tensor | None) -> int:
    """Of 32 bits, in a length."""
    return 1 if lengths is None else lengths.element_size() // 4


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


def check(op: str, names: Sequence[str], inputs: Sequence[Tensor | None]) -> None:
    """See to it that a launch of ``op`` on ``inputs``, called ``names`` in ``SHAPES``, stays within
    them.

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
            raise _refusal(op, name, f"of shape [{said}]", tuple(t.shape))
        if t.device != first.device:
            raise _refusal(op, name, f"on {first.device}", t.device)
        if name == "lengths":
            if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
                raise _refusal(op, name, "of integers", t.dtype)
        elif t.dtype != (dtype := torch.bool if name == "mask" else first.dtype):
            raise _refusal(op, name, f"of {dtype}", t.dtype)


def _refusal(op: str, name: str, expected: str, got: object) -> RuntimeError:
    return RuntimeError(f"fastseq.{op}: expected {name} {expected}, got {got}")


def densely(
    op: str, names: str, plan: Callable[[tuple], Callable], whole: Sequence[int] = ()
) -> Callable:
    """``plan`` for inputs whose last dimension, or all (those counted in ``whole``), is dense.

    Others are copied first: the only stride that kernels take for granted is the last. So are
    lengths, the last of the inputs, if they are neither int64 nor int32. Inputs of ``op``, called
    ``names``, are checked where a plan is made: what is checked is what tells plans apart.
    """

    def dense(inputs: tuple) -> tuple:
        *tensors, lengths = inputs
        tensors = [
            t.contiguous() if t is not None and (i in whole or t.stride(-1) != 1) else t
            for i, t in enumerate(tensors)
        ]
        if lengths is not None:
            known = lengths.dtype in (torch.int64, torch.int32)
            lengths = (lengths if known else lengths.long()).contiguous()
            if lengths.stride(0) != 1:
                # A single one is contiguous whatever its stride, and read as words all the same.
                lengths = lengths.as_strided(lengths.shape, (1,))
        return (*tensors, lengths)

    def planned(inputs: tuple) -> Callable:
        check(op, names.split(), inputs)
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
    query, keys, values, *more, mask, lengths = inputs
    B, Q, K = query.shape
    S, C = values.shape[1:]
    device = query.device
    fits = aligned(query, keys, values, *more)
    config = options(stage, query, fits) | products(query)
    if more:
        config["TANH"] = which_tanh()
    programs = B * blocks(Q, config["BLOCK_Q"])
    clocks = clocks_of(config["BLOCK_Q"], K + C, query.element_size(), K if more else 0)
    parts, span = split(device, programs, S, config, clocks)
    score = Launch(
        kernel[fits],
        device,
        programs * parts,
        (B, Q, S, K, C, parts, span, words(lengths)),
        (query, keys, values, None if mask is None else mask.expand(B, Q, S), *more[1:]),
        **config,
    )
    merge = None
    if parts > 1:
        fits = C % 16 == 0
        config = options("merge", query, fits) | {"LANES": _MOST_PARTS}
        sizes = (B, Q, S, C, parts, words(lengths))
        merge = Launch(merge_kernel[fits], device, B * Q, sizes, **config)
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
    d_context, _, values, weights, lengths = inputs
    B, Q, S = weights.shape
    C = values.shape[2]
    fits = aligned(d_context, values)
    config = options("scores_bwd", weights, fits) | products(weights)
    programs = B * blocks(Q, config["BLOCK_Q"])
    clocks = clocks_of(config["BLOCK_Q"], C if d_context is not None else 0, values.element_size())
    parts, span = split(weights.device, programs, S, config, clocks)

    def launch(parts: int, span: int) -> Launch:
        return Launch(
            scores_bwd_kernel[fits],
            weights.device,
            programs * parts,
            (B, Q, S, C, parts, span, words(lengths)),
            (values,),
            **config,
        )

    launches = [launch(parts, span)] + [launch(1, 0)] * (parts > 1)

    def run(inputs: tuple, where: list, scale: float) -> Tensor:
        new = inputs[3].new_empty
        # d_p, float32, gives way to the gradient of the scores.
        d_p = new((B, Q, S), dtype=torch.float32)
        d_scores = d_p if exact else new(B, Q, S)
        for gradient in launches:
            gradient(inputs, where, (d_p, d_scores), scale)
        return d_scores

    return run


_PLAN_GRADIENT, _PLAN_EXACT_GRADIENT = (
    densely(
        "attention_bwd",
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
