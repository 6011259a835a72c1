"""``fastseq::attention_decoder_beams``: beam search with a recurrent decoder with attention.

Schema and CPU kernel are in csrc/ops/decoder_beams.cpp. Arguments are those of
``fastseq::attention_decoder_fwd``, of its tokens only those that each of B sources starts with,
``start`` [B], and may end with, ``ends`` [B]; ``penalties`` [N + 1], float64, is what the
log-probability of so many tokens is divided by. Returns [tokens [B, n_best, N], scores [B, n_best],
float64, lengths [B, n_best]].
"""

from __future__ import annotations

import torch

from fastseq import _native

__all__ = ["attention_decoder_beams"]


def _fake(
    cell, start, ends, table, h0, c0, keys, values, mask, weights, has_biases, w_q, v, w_c, b_c,
    feeds, residual, scale, w_out, b_out, penalties, width, n_best, *options,
):  # fmt: skip
    B, N = start.shape[0], penalties.shape[0] - 1
    tokens, lengths = start.new_empty(B, n_best, N), start.new_empty(B, n_best)
    return [tokens, penalties.new_empty(B, n_best), lengths]


if _native.loaded():
    attention_decoder_beams = torch.ops.fastseq.attention_decoder_beams.default
    torch.library.register_fake("fastseq::attention_decoder_beams")(_fake)
else:
    attention_decoder_beams = None
