"""``fastseq::attention_seq2seq_fwd``, ``_bwd``, ``_greedy``, ``_beams`` and ``_samples``:
fastseq.models.attention in one call, from tokens to logits or to tokens.

The schemas and CPU kernels are in csrc/ops/attention_seq2seq.cpp and attention_seq2seq_writes.cpp;
here are shapes (for tracing) and autograd. src [B, S] and trg [B, T], int64; ``forced`` [T-1],
bool, or None; ``parameters`` are the source's table [Vs, E], the encoder's w_ih, w_hh, b_ih and
b_hh, the target's table [V, E], the attention's weight [H, 2H] and bias [H], v [1, H], the
decoder's four, and the output layer's weight [V, 2H] and bias [V].

Forward returns logits [B, T, V], zero at position 0, and, with ``save``, what the backward pass is
given of it; that returns the gradients of the parameters. Greedy takes the first tokens ``start``
[B] and N + 1 entries of ``forced``, of which the first alone is True, and returns tokens [B, N+1],
that first one included, and attention weights [B, N, S]. Beams and samples take what
``attention_decoder_beams`` and ``_samples`` do of ``start``, ``ends`` and options, and return what
these do.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from fastseq import _native
from fastseq.ops import by_reference, decoder_cuda
from fastseq.ops.recurrent import CELLS
from fastseq.reference.decoder import attention_decoder as _reference_decoder
from fastseq.reference.rnn import lstm as _reference_lstm

__all__ = ["beams", "greedy", "run", "samples"]

# None where there are no kernels, whose callers do not get this far.
_LSTM = CELLS.get("lstm")


def run(src: Tensor, trg: Tensor, forced: Tensor | None, parameters: list[Tensor]) -> Tensor:
    """Logits [B, T, V], differentiable."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*parameters):
        return _apply(src, trg, forced, *parameters)
    with torch._C._AutoDispatchBelowAutograd():
        return attention_seq2seq_fwd(_LSTM.number, src, trg, forced, parameters, False)[0]


def greedy(
    src: Tensor,
    start: Tensor,
    parameters: list[Tensor],
    *,
    max_length: int,
    end_token: int | None,
) -> tuple[Tensor, Tensor]:
    """The likeliest tokens [B, max_length], and attention weights [B, max_length, S]; no
    gradients."""
    end_token = -1 if end_token is None else end_token
    forced = torch.tensor((True, *[False] * max_length))
    with torch._C._AutoDispatchBelowAutograd():
        tokens, weights = attention_seq2seq_greedy(
            _LSTM.number, src, start, forced, end_token, parameters
        )
    return tokens[:, 1:], weights


def beams(
    src: Tensor,
    start: Tensor,
    parameters: list[Tensor],
    *,
    ends: Tensor | None,
    penalties: list[float],
    width: int,
    n_best: int,
    min_length: int,
    no_repeat_ngram: int,
    early_stop: bool,
) -> list[Tensor]:
    """Tokens, scores and lengths, as :func:`fastseq.functional.attention_beams`."""
    penalties = torch.tensor(penalties, dtype=torch.float64, device="cpu")
    with torch._C._AutoDispatchBelowAutograd():
        return attention_seq2seq_beams(
            _LSTM.number, src, start, ends, penalties, width, n_best, min_length, no_repeat_ngram,
            early_stop, parameters,
        )  # fmt: skip


def samples(
    src: Tensor,
    start: Tensor,
    parameters: list[Tensor],
    *,
    ends: Tensor | None,
    drawn: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> list[Tensor]:
    """Tokens and lengths, as :func:`fastseq.functional.attention_samples`."""
    V = parameters[-1].shape[0]
    kept = V if top_k is None else min(top_k, V)
    with torch._C._AutoDispatchBelowAutograd():
        return attention_seq2seq_samples(
            _LSTM.number, src, start, ends, drawn, temperature, kept, top_p, parameters
        )


class _Seq2Seq(torch.autograd.Function):
    @staticmethod
    def forward(ctx, src, trg, forced, *parameters):
        with torch._C._AutoDispatchBelowAutograd():
            out = attention_seq2seq_fwd(_LSTM.number, src, trg, forced, parameters, True)
        logits, *kept = out
        ctx.save_for_backward(src, *kept, *parameters)
        return logits

    @staticmethod
    def backward(ctx, dlogits):
        src, *rest = ctx.saved_tensors
        kept, parameters = rest[:_KEPT], rest[_KEPT:]
        if by_reference.wanted(dlogits):
            reference = functools.partial(_by_reference, src, kept[_FED])
            need, cotangents = ctx.needs_input_grad[3:], [dlogits[:, 1:]]
            grads = by_reference.gradients(reference, parameters, need, cotangents)
            return None, None, None, *grads
        with torch._C._AutoDispatchBelowAutograd():
            grads = attention_seq2seq_bwd(_LSTM.number, dlogits, src, kept, parameters)
        # Parameters that want none are sent theirs all the same: autograd drops it.
        return None, None, None, *grads


_apply = super(torch.autograd.Function, _Seq2Seq).apply
_KEPT, _FED = 10, 6


def _by_reference(src, fed, source_table, *parameters):
    """Logits of all positions but the first."""
    encoder, rest = parameters[:4], parameters[4:]
    table, attention, bias, v, *decoder, w_out, b_out = rest
    H = v.shape[1]
    embedded = torch.nn.functional.embedding(src, source_table)
    values, *states = _reference_lstm(embedded, None, encoder, batch_first=True)
    features = _reference_decoder(
        fed, tuple(states), values @ attention[:, H:].T + bias, values, decoder,
        query_weight=attention[:, :H], v=v[0], embedding=table,
    )[0]  # fmt: skip
    return (features @ w_out.T + b_out,)


def _fwd_fake(cell, src, trg, forced, parameters, save):
    (B, S), T, like = src.shape, trg.shape[1], parameters[-1]
    H, V = parameters[8].shape[1], like.shape[0]
    out = [like.new_empty(B, T, V)]
    if save:
        state = like.new_empty(1, B, H)
        values = like.new_empty(B, S, H)
        parts = decoder_cuda.saved_parts(
            _LSTM, T - 1, state, values, values, parameters[9:13], parameters[6], None, False
        )
        out += [
            like.new_empty(S, B, parameters[0].shape[1]), like.new_empty(1, S * B, _LSTM.saved * H),
            state, like.new_empty(1, B, H), values, like.new_empty(B, S, H),
            src.new_empty(B, T - 1), like.new_empty(B, T - 1, 2 * H), like.new_empty(B, T - 1, S),
            like.new_empty(sum(steps * B * width for steps, width in parts.values())),
        ]  # fmt: skip
    return out


def _greedy_fake(cell, src, start, forced, end_token, parameters):
    (B, S), N = src.shape, forced.shape[0] - 1
    return [src.new_empty(B, N + 1), parameters[-1].new_empty(B, N, S)]


def _beams_fake(cell, src, start, ends, penalties, width, n_best, *options):
    B, N = start.shape[0], penalties.shape[0] - 1
    tokens, lengths = start.new_empty(B, n_best, N), start.new_empty(B, n_best)
    return [tokens, penalties.new_empty(B, n_best), lengths]


def _samples_fake(cell, src, start, ends, drawn, *options):
    B = start.shape[0]
    return [start.new_empty(B, drawn.shape[0]), start.new_empty(B)]


def _bwd_fake(cell, dlogits, src, kept, parameters):
    return [torch.empty_like(t) for t in parameters]


def _fwd_autograd(cell, src, trg, forced, parameters, save):
    """What the registered op does at the autograd key."""
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*parameters):
        if not save:
            raise RuntimeError(
                "fastseq.attention_seq2seq_fwd: expected save=True for parameters that require grad"
            )
        logits = _apply(src, trg, forced, *parameters)
        return [logits, *logits.grad_fn.saved_tensors[1 : 1 + _KEPT]]
    with torch._C._AutoDispatchBelowAutograd():
        return attention_seq2seq_fwd(cell, src, trg, forced, parameters, save)


if _native.loaded():
    attention_seq2seq_fwd = torch.ops.fastseq.attention_seq2seq_fwd.default
    attention_seq2seq_bwd = torch.ops.fastseq.attention_seq2seq_bwd.default
    torch.library.register_fake("fastseq::attention_seq2seq_fwd")(_fwd_fake)
    attention_seq2seq_greedy = torch.ops.fastseq.attention_seq2seq_greedy.default
    torch.library.register_fake("fastseq::attention_seq2seq_greedy")(_greedy_fake)
    attention_seq2seq_beams = torch.ops.fastseq.attention_seq2seq_beams.default
    torch.library.register_fake("fastseq::attention_seq2seq_beams")(_beams_fake)
    attention_seq2seq_samples = torch.ops.fastseq.attention_seq2seq_samples.default
    torch.library.register_fake("fastseq::attention_seq2seq_samples")(_samples_fake)
    torch.library.register_fake("fastseq::attention_seq2seq_bwd")(_bwd_fake)
    _library = torch.library.Library("fastseq", "IMPL")
    _library.impl("attention_seq2seq_fwd", _fwd_autograd, "Autograd")
else:
    attention_seq2seq_fwd = attention_seq2seq_bwd = attention_seq2seq_greedy = None
    attention_seq2seq_beams = attention_seq2seq_samples = None
