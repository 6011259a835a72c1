"""Sizes and strides at which loops over vectors go wrong."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["LAYOUTS", "edge_sizes", "with_layout"]


def edge_sizes(*widths: int, tile: int = 0) -> list[int]:
    """Sizes at which loops over vectors go wrong: 1, small primes, width +-1, beyond one tile.

    Args:
        widths: vector widths in elements; by default 4, 8 and 16.
        tile: extent of a blocked loop, 0 for none.
    """
    sizes = {1, 2, 3, 5, 13}
    for width in widths or (4, 8, 16):
        sizes |= {width - 1, width, width + 1}
    if tile:
        sizes |= {tile, tile + 1, 2 * tile + 3}
    return sorted(size for size in sizes if size > 0)


def _transposed(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else _strided(t)


def _strided(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape, 2), math.nan, dtype=t.dtype, device=t.device)
    wide[..., 0] = t
    return wide[..., 0]


def _offset(t: Tensor) -> Tensor:
    flat = torch.full((t.numel() + 3,), math.nan, dtype=t.dtype, device=t.device)
    flat[1 : 1 + t.numel()] = t.flatten()
    return flat[1 : 1 + t.numel()].view(t.shape)


def _sliced(t: Tensor) -> Tensor:
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 5), math.nan, dtype=t.dtype, device=t.device)
    wide[..., 2 : 2 + t.shape[-1]] = t
    return wide[..., 2 : 2 + t.shape[-1]]


def _expanded(t: Tensor) -> Tensor:
    return t[:1].expand_as(t)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": Tensor.contiguous,
    "transposed": _transposed,
    "strided": _strided,
    "sliced": _sliced,
    "offset": _offset,
    "expanded": _expanded,
}


def with_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides, NaN in every gap between them.

    Args:
        tensor: any shape, floating dtype.
        layout: a key of ``LAYOUTS``: ``transposed`` swaps the last two dimensions in memory,
            ``strided`` leaves a gap after each element, ``sliced`` around each row, ``offset``
            starts one element into its storage, ``expanded`` repeats the first entry of
            dimension 0 with stride 0 (the only one whose values differ).
    """
    return LAYOUTS[layout](tensor.detach())
