"""``fastseq::attention_decoder_samples``: sampling with a recurrent decoder with attention.

Schema and CPU kernel are in csrc/ops/decoder_samples.cpp. Arguments up to ``b_out`` are those of
``fastseq::attention_decoder_beams``; ``drawn`` [N, B], float64, holds a number from [0, 1) for each
step and source; a ``top_k`` of V or more leaves nothing out. Returns [tokens [B, N], lengths [B]].
"""

from __future__ import annotations

import torch

from fastseq import _native

__all__ = ["attention_decoder_samples"]


def _fake(
    cell, start, ends, table, h0, c0, keys, values, mask, weights, has_biases, w_q, v, w_c, b_c,
    feeds, residual, scale, w_out, b_out, drawn, *options,
):  # fmt: skip
    B, N = start.shape[0], drawn.shape[0]
    return [start.new_empty(B, N), start.new_empty(B)]


if _native.loaded():
    attention_decoder_samples = torch.ops.fastseq.attention_decoder_samples.default
    torch.library.register_fake("fastseq::attention_decoder_samples")(_fake)
else:
    attention_decoder_samples = None
