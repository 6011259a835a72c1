"""How a call becomes a launch: tiles, parts of the source, buffers."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from .._lang import (
    BACKEND,
    blocks,
    compiler_options,
    last_contiguous,
    on,
    power_of_two,
    precision,
    upcast,
    which_tanh,
)
from .softmax import merge_kernel, scores_bwd_kernel
from .tuned import tiles

__all__ = ["forward", "launch", "options", "scores_gradient", "split", "values_gradient"]

# Programs that keep a multiprocessor busy, by warps of one.
_WARPS_A_PROCESSOR = 16
# Each part has a partial result of its own in memory.
_MOST_PARTS = 32


@functools.cache
def _device(index: int) -> tuple[str, int]:
    """Name and multiprocessors; the index is -1 under the interpreter."""
    if index < 0:
        return "interpreter", 1
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count


def _index(device: torch.device) -> int:
    return device.index if device.type == "cuda" else -1


@functools.cache
def _config(stage: str, index: int, single: bool, exact: bool, extents: tuple) -> dict[str, int]:
    config = tiles(stage, single, exact, _device(index)[0])
    for block, extent in extents:
        # No wider than what there is, and no narrower than a warp.
        config[block] = power_of_two(extent, 32, config[block])
    return compiler_options(config, BACKEND)


def options(stage: str, query: Tensor, *, K: int | None = None, C: int | None = None) -> dict:
    """Tiles and warps of a stage, for a query [B, Q, K] and the widths K and C it has."""
    extents = (("BLOCK_K", K), ("BLOCK_C", C))
    return dict(
        _config(
            stage,
            _index(query.device),
            query.shape[1] == 1,
            query.dtype == torch.float32 and precision() == "ieee",
            tuple((block, extent) for block, extent in extents if extent is not None),
        )
    )


def split(device: torch.device, programs: int, S: int, block: int, warps: int) -> tuple[int, int]:
    """Into how many parts the source goes, and the positions of each.

    One, unless ``programs`` of ``warps`` warps would leave multiprocessors idle.
    """
    wanted = _WARPS_A_PROCESSOR * _device(_index(device))[1] // (programs * warps)
    span = blocks(blocks(S, block), max(1, min(wanted, _MOST_PARTS))) * block
    return blocks(S, span), span


def launch(
    device: torch.device,
    kernel,
    programs: int,
    tensors: Sequence[Tensor | None],
    sizes: Sequence[int | float],
    strided: Sequence[Tensor | None],
    **config,
) -> None:
    """Run ``programs`` of a kernel: its tensors, its sizes, the two outer strides of some."""
    strides = [stride for t in strided for stride in ((0, 0) if t is None else t.stride()[:2])]
    with on(device):
        kernel[(programs,)](*tensors, *sizes, *strides, **config)


def forward(
    stage: str,
    kernel,
    tensors: Sequence[Tensor | None],
    mask: Tensor | None,
    lengths: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Context [B, Q, C] and weights [B, Q, S] by a forward kernel, in one launch or two.

    tensors: query, keys, values and, for the additive score, v and extra.
    """
    query, keys, values, *more = map(last_contiguous, tensors)
    B, Q, K = query.shape
    S, C = values.shape[1:]
    context, weights = query.new_empty(B, Q, C), query.new_empty(B, Q, S)
    scores = query.new_empty(B, Q, S, dtype=torch.float32)
    lengths = last_contiguous(lengths)
    if mask is not None:
        mask = last_contiguous(mask.view(torch.uint8).expand(B, Q, S))
    config = options(stage, query, K=K, C=C)
    if more:
        config["TANH"] = which_tanh()
    programs = B * blocks(Q, config["BLOCK_Q"])
    parts, span = split(query.device, programs, S, config["BLOCK_S"], config["num_warps"])
    partial = peaks = None
    if parts > 1:
        partial = query.new_empty(parts, B, Q, C, dtype=torch.float32)
        peaks = query.new_empty(2, B, Q, parts, dtype=torch.float32)
    launch(
        query.device,
        kernel,
        programs * parts,
        (query, keys, values, *more, mask, lengths, scores, weights, context, partial, peaks),
        (scale, B, Q, S, K, C, parts, span),
        (query, keys, values, mask, *more[1:]),
        WHOLE=parts == 1,
        PRECISION=precision(),
        UPCAST=upcast(query.dtype),
        **config,
    )
    if parts > 1:
        launch(
            query.device,
            merge_kernel,
            B * Q,
            (scores, lengths, weights, context, partial, peaks),
            (B, Q, S, C, parts),
            (),
            LANES=triton.next_power_of_2(parts),
            **_config("merge", _index(query.device), False, True, (("BLOCK_C", C),)),
        )
    return context, weights


def scores_gradient(
    d_context: Tensor | None,
    d_weights: Tensor | None,
    values: Tensor,
    weights: Tensor,
    lengths: Tensor | None,
    scale: float,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of the scores before ``scale``, [B, Q, S] in ``dtype``."""
    B, Q, S = weights.shape
    C = values.shape[2]
    d_context, d_weights, weights = (
        t if t is None else t.contiguous() for t in (d_context, d_weights, weights)
    )
    values, lengths = last_contiguous(values), last_contiguous(lengths)
    d_scores = weights.new_empty(B, Q, S, dtype=dtype)
    d_p = weights.new_empty(B, Q, S, dtype=torch.float32)
    config = options("scores_bwd", weights, C=C)
    launch(
        weights.device,
        scores_bwd_kernel,
        B * blocks(Q, config["BLOCK_Q"]),
        (d_context, d_weights, values, weights, lengths, d_p, d_scores),
        (scale, B, Q, S, C),
        (values,),
        PRECISION=precision(),
        UPCAST=upcast(values.dtype),
        **config,
    )
    return d_scores


def values_gradient(
    d_context: Tensor | None, values: Tensor, weights: Tensor, needed: bool
) -> Tensor:
    """weights^T d_context, [B, S, C]: a plain product."""
    if not needed:
        return values.new_empty(0)
    if d_context is None:
        return values.new_zeros(values.shape)
    return torch.bmm(weights.mT, d_context)
