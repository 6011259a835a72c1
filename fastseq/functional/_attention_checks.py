"""What arguments of an attention function are refused, each in words; once a kind of call."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["PASSED", "check_lengths", "check_tensors", "check_where", "kind_of_call", "passed"]

# The kinds of calls that have passed: the checks cost more than a decoding step.
PASSED: set[tuple] = set()
MOST_KINDS = 4096
_PLAIN = (Tensor, torch.nn.Parameter)


def kind_of_call(op: str, arguments: tuple) -> tuple | None:
    """All that the checks depend on but the values of lengths; None where it is not to be kept.

    arguments: the query first.
    """
    # A graph that is being made has sizes that no dictionary takes, or that nobody may keep.
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return None
    query = arguments[0]
    if type(query) not in _PLAIN:
        return None
    mixed = torch.is_autocast_enabled(query.device.type)
    described = [
        (t.shape, t.dtype, t.device) if isinstance(t, Tensor) else type(t) for t in arguments
    ]
    return (op, mixed, *described)


def passed(kind: tuple | None) -> None:
    """Remember a kind."""
    if kind is None:
        return
    if len(PASSED) >= MOST_KINDS:
        PASSED.clear()
    PASSED.add(kind)


def check_tensors(op: str, *arguments: tuple[str, Tensor | None, str | None]) -> None:
    """Refuse arguments that are no tensors of one floating dtype, or do not fit each other.

    Each is its name, itself and its layout: shape letters, None for a scalar. A letter stands for
    the extent it has where it is first met.
    """
    first = arguments[0][1]
    sizes: dict[str, int] = {}
    mixed = isinstance(first, Tensor) and torch.is_autocast_enabled(first.device.type)
    for name, tensor, layout in arguments:
        if tensor is None and tensor is not first:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"fastseq.{op}: expected {name} to be a tensor, got {type(tensor).__name__}"
            )
        if not tensor.is_floating_point():
            raise TypeError(
                f"fastseq.{op}: expected {name} of a floating dtype, got {tensor.dtype}"
            )
        if not mixed and tensor.dtype != first.dtype:
            raise TypeError(
                f"fastseq.{op}: expected {name} of the query's dtype {first.dtype}, "
                f"got {tensor.dtype}; convert one with .to()"
            )
        if tensor.device != first.device:
            raise ValueError(
                f"fastseq.{op}: expected {name} on the query's device {first.device}, "
                f"got {tensor.device}"
            )
        if layout is None:
            if tensor.numel() != 1:
                raise ValueError(
                    f"fastseq.{op}: expected {name} to be a scalar, got {list(tensor.shape)}"
                )
            continue
        if layout[:3] == "B Q" and tensor.dim() == 2:
            layout = layout.replace("Q ", "")
        _check_shape(op, name, tensor, layout.split(), sizes)


def _check_shape(
    op: str, name: str, tensor: Tensor, letters: list[str], sizes: dict[str, int]
) -> None:
    shape = tensor.shape
    # The usual case without the lists that a message is made of: they cost more than a small call.
    if len(shape) == len(letters):
        for letter, found in zip(letters, shape, strict=True):
            if sizes.get(letter, found) != found or "+" in letter:
                break
        else:
            sizes.update(zip(letters, shape, strict=True))
            return

    def extent(letter: str) -> int | None:
        parts = [sizes.get(part) for part in letter.split("+")]
        return None if None in parts else sum(parts)

    wanted = [extent(letter) for letter in letters]
    fits = len(shape) == len(letters) and all(
        size is None or size == found for size, found in zip(wanted, shape, strict=True)
    )
    if not fits:
        known = [
            str(letter if size is None else size)
            for letter, size in zip(letters, wanted, strict=True)
        ]
        equal = "" if known == letters else f" = [{', '.join(known)}]"
        raise ValueError(
            f"fastseq.{op}: expected {name} of shape [{', '.join(letters)}]{equal}, "
            f"got {list(tensor.shape)}"
        )
    sizes.update(zip(letters, shape, strict=True))


def check_where(
    op: str,
    query: Tensor,
    keys: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> None:
    """Refuse a scale, mask or lengths of the wrong kind, dtype, shape or device."""
    if isinstance(scale, Tensor):
        raise TypeError(
            f"fastseq.{op}: expected scale to be a number, got a tensor; multiply v or the query "
            "by it, so that it has a gradient"
        )
    B, S = keys.shape[:2]
    for name, tensor in (("mask", mask), ("lengths", lengths)):
        if isinstance(tensor, Tensor) and tensor.device != keys.device:
            raise ValueError(
                f"fastseq.{op}: expected {name} on the keys' device {keys.device}, "
                f"got {tensor.device}"
            )
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(
                f"fastseq.{op}: expected mask to be a bool tensor (True = attend), got {got}"
            )
        shapes = [("[B, S]", (B, S))]
        if query.dim() == 3:
            shapes.append(("[B, Q, S]", (B, query.shape[1], S)))
        if tuple(mask.shape) not in [shape for _, shape in shapes]:
            said = " or ".join(f"{letters} = {list(shape)}" for letters, shape in shapes)
            raise ValueError(f"fastseq.{op}: expected mask of shape {said}, got {list(mask.shape)}")
    if lengths is None:
        return
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"fastseq.{op}: expected lengths to be an int64 tensor, got {got}")
    if tuple(lengths.shape) != (B,):
        raise ValueError(
            f"fastseq.{op}: expected lengths of shape [B] = [{B}], got {list(lengths.shape)}"
        )


def check_lengths(op: str, keys: Tensor, lengths: Tensor | None) -> None:
    """Refuse a length outside 0..S, where looking at it costs nothing."""
    # Elsewhere reading them would make the host wait; kernels clamp them.
    if lengths is None or not lengths.is_cpu or not lengths.numel():
        return
    if not torch.compiler.is_compiling():
        S = keys.shape[1]
        least, most = (int(t) for t in lengths.aminmax())
        if least < 0 or most > S:
            raise ValueError(
                f"fastseq.{op}: expected lengths between 0 and S = {S}, got {least} to {most}"
            )
