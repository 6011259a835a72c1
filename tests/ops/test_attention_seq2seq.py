"""fastseq::attention_seq2seq_*: registration, what it refuses, and that a model takes it."""

from __future__ import annotations

import pytest
import torch

from fastseq import use_backend
from fastseq.models import attention
from fastseq.ops import attention_seq2seq

OPS = torch.ops.fastseq
B, S, T, V, E, H = 3, 4, 5, 7, 3, 6


def made(dtype=torch.float32):
    """A model, the operators' parameters of it, src and trg."""
    torch.manual_seed(0)
    model = attention.Seq2Seq(
        attention.Encoder(V, E, H), attention.Decoder(V, E, H, attention.Attention(H))
    ).to(dtype)
    src, trg = torch.randint(V, (B, S)), torch.randint(V, (B, T))
    return model, model._parameters_of_one(src), src, trg


@pytest.mark.parametrize("forced", [None, (True, False, True, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype, forced):
    _, parameters, src, trg = made(dtype)
    forced = None if forced is None else torch.tensor(forced)
    forward = OPS.attention_seq2seq_fwd.default
    torch.library.opcheck(forward, (0, src, trg, forced, parameters, True))
    detached = [p.detach() for p in parameters]
    logits, *kept = forward(0, src, trg, forced, detached, True)
    backward = OPS.attention_seq2seq_bwd.default
    torch.library.opcheck(backward, (0, torch.randn_like(logits), src, kept, detached))
    greedy = OPS.attention_seq2seq_greedy.default
    steps = torch.tensor((True, False, False))
    torch.library.opcheck(greedy, (0, src, trg[:, 0], steps, 2, detached))
    beams, penalties = OPS.attention_seq2seq_beams.default, torch.ones(4, dtype=torch.float64)
    options = (trg[:, 1], penalties, 3, 2, 1, 0, True)
    torch.library.opcheck(beams, (0, src, trg[:, 0], *options, detached))
    samples, drawn = OPS.attention_seq2seq_samples.default, torch.rand(4, B, dtype=torch.float64)
    torch.library.opcheck(samples, (0, src, trg[:, 0], None, drawn, 1.0, V, 0.9, detached))


def test_parameters_that_want_no_gradient_get_none():
    model, _, src, trg = made()
    model.encoder.requires_grad_(False)
    model(src, trg, 1.0).sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith("encoder"), name
    model.requires_grad_(False)
    assert not model(src, trg, 1.0).requires_grad


def test_a_gradient_for_the_given_position_goes_nowhere():
    model, parameters, src, trg = made()
    dlogits = torch.randn(B, T, V)
    clean = torch.autograd.grad(model(src, trg, 1.0), parameters, dlogits)
    dlogits[:, 0] = torch.nan
    again = torch.autograd.grad(model(src, trg, 1.0), parameters, dlogits)
    assert all(map(torch.equal, clean, again))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_same_bits_with_any_number_of_threads(threads):
    torch.manual_seed(0)
    model = attention.Seq2Seq(
        attention.Encoder(300, 40, 64), attention.Decoder(300, 40, 64, attention.Attention(64))
    )
    src, trg = torch.randint(300, (21, 9)), torch.randint(300, (21, 11))

    def run():
        logits = model(src, trg, 1.0)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run()
        torch.set_num_threads(threads)
        assert all(map(torch.equal, run(), expected))
    finally:
        torch.set_num_threads(before)


def test_who_calls_it(monkeypatch):
    calls = []
    run = attention_seq2seq.run
    monkeypatch.setattr(attention_seq2seq, "run", lambda *given: calls.append(given) or run(*given))
    model, _, src, trg = made()
    model(src, trg)
    assert len(calls) == 1
    model(src, trg, lengths=torch.tensor([4, 2, 1]))
    with use_backend("torch"):
        model(src, trg)
    with torch.autocast("cpu"):
        model(src, trg)
    model.decoder.attention.register_forward_hook(lambda *_: None)
    model(src, trg)
    assert len(calls) == 1


@pytest.mark.parametrize("place", range(14))
def test_parameters_of_another_shape_are_refused(place):
    _, parameters, src, trg = made()
    parameters = [p.detach() for p in parameters]
    parameters[place] = parameters[place].new_zeros(*parameters[place].shape, 1)
    with pytest.raises(RuntimeError, match="expected"):
        OPS.attention_seq2seq_fwd(0, src, trg, None, parameters, False)


@pytest.mark.parametrize("token", [-1, V])
@pytest.mark.parametrize("side", ["src", "trg"])
def test_tokens_outside_the_vocabulary_are_refused(side, token):
    _, parameters, src, trg = made()
    (src if side == "src" else trg)[1, 2] = token
    with pytest.raises(RuntimeError, match=f"expected tokens in 0..{V - 1}, got {token}"):
        OPS.attention_seq2seq_fwd(0, src, trg, None, [p.detach() for p in parameters], False)
