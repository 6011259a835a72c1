"""What the functions share that choose tokens by all logits of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastseq import backends
from fastseq.functional.decoder import check_decoder, kind_of, widening
from fastseq.ops.decoder import DECODER_CELLS

__all__ = ["leading_arguments"]


def leading_arguments(
    op: str,
    start: Tensor,
    ends: Tensor | None,
    hx: tuple[Tensor, ...],
    keys: Tensor,
    values: Tensor,
    params: Sequence[Tensor],
    output: tuple[Tensor, Tensor | None],
    lengths: Tensor | None,
    mask: Tensor | None,
    **given: object,
) -> list[object]:
    """Arguments as the operators take them, from ``cell`` to ``b_out``.

    Args:
        op: the caller's name, for errors.
        given: those of :func:`fastseq.functional.attention_decoder` of the same names.

    Raises:
        ValueError, TypeError, IndexError: as there; or ``ends`` of another shape or dtype.
        NotImplementedError: there is no kernel for these.
    """
    unused = ("feed", "forced", "input_factor", "output_factor")
    arguments = {**given, "output": output, **dict.fromkeys(unused)}
    if not isinstance(start, Tensor) or start.dim() != 1:
        got = list(start.shape) if isinstance(start, Tensor) else type(start).__name__
        raise ValueError(f"{op}: expected start of shape [B], got {got}")
    if not isinstance(output, tuple) or len(output) != 2:
        got = len(output) if isinstance(output, tuple) else type(output).__name__
        raise ValueError(f"{op}: expected output as a tuple (weight, bias or None), got {got}")
    check_decoder(op, start.unsqueeze(1), hx, keys, values, params, arguments, lengths, mask, None)
    embedding, combine = given["embedding"], given["combine"]
    B = start.shape[0]
    if ends is not None:
        if not isinstance(ends, Tensor) or ends.dtype != torch.int64:
            got = ends.dtype if isinstance(ends, Tensor) else type(ends).__name__
            raise TypeError(f"{op}: expected ends to be an int64 tensor, got {got}")
        if tuple(ends.shape) != (B,):
            raise ValueError(f"{op}: expected ends of shape [B] = [{B}], got {list(ends.shape)}")
    obstacle = backends.decoder_obstacle(values, params, kind_of(given["cell"], hx[0].shape[0], {}))
    if obstacle is not None or not values.is_cpu:
        raise NotImplementedError(
            f"{op}: expected what the CPU's kernel serves, got values on {values.device}"
            f"{'' if obstacle is None else f' and {obstacle}'}; fastseq.decoding serves any"
        )
    if lengths is not None:
        within = torch.arange(keys.shape[1]) < lengths.unsqueeze(1)
        mask = within if mask is None else within & mask
    wide = widening(values.dtype)
    w_c, b_c = (None, None) if combine is None else combine
    h0, *c0 = map(wide, hx)
    return [
        DECODER_CELLS[given["cell"]].number, start, ends, wide(embedding), h0,
        c0[0] if c0 else None, wide(keys), wide(values), mask, list(map(wide, params)),
        given["has_biases"], *(wide(t) for t in (given["query_weight"], given["v"], w_c, b_c)),
        given["input_feeding"], given["residual"], float(given["scale"]), *map(wide, output),
    ]  # fmt: skip
