"""Decoding with fastseq.nn.AttentionDecoder: one call of the kernel, and step by step the same."""

from __future__ import annotations

import pytest
import torch

from fastseq import decoding, explain, nn, use_backend

V, E, H, S, B = 9, 4, 6, 5, 3
KINDS = {
    "before": {},
    "before, two GRUs": {"cell": "gru", "num_layers": 2, "residual": True},
    "after": {"order": "after", "score": "general", "cell": "gru"},
    "input feeding": {"order": "after", "score": "dot", "input_feeding": True},
}


class Encoder(torch.nn.Module):
    def __init__(self, layer, layers):
        super().__init__()
        self.embedding, self.rnn = nn.Embedding(V, E), layer(E, H, layers, batch_first=True)

    def forward(self, src):
        return self.rnn(self.embedding(src))


@pytest.fixture
def make():
    def made(**options):
        torch.manual_seed(1)
        layer = nn.GRU if options.get("cell") == "gru" else nn.LSTM
        model = torch.nn.Module()
        model.encoder = Encoder(layer, options.get("num_layers", 1))
        model.decoder = nn.AttentionDecoder(V, E, H, **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)
        return model.double(), torch.randint(V, (B, S))

    return made


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_beams_by_the_kernel_and_step_by_step(options, make, monkeypatch):
    model, src = make(**options)
    how = {"max_length": 7, "bos": 1, "eos": 2, "width": 4, "n_best": 3}
    found = decoding.beam_search(model, src, **how)
    assert found.tokens.unique().numel() > 2
    with use_backend("torch"):
        stepwise = decoding.beam_search(model, src, **how)
    assert torch.equal(found.tokens, stepwise.tokens)
    torch.testing.assert_close(found.scores, stepwise.scores)
    assert explain(decoding.beam_search, model, src).backend == "cpu"
    monkeypatch.setattr(type(model.decoder), "_step", None)
    assert torch.equal(decoding.beam_search(model, src, **how).tokens, found.tokens)


@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_greedy_by_the_kernel_and_step_by_step(options, make):
    model, src = make(**options)
    tokens = decoding.greedy(model, src, max_length=7, bos=1, eos=2)
    stepwise = decoding.greedy(model, src, max_length=7, bos=1, eos=torch.full((B,), 2))
    assert torch.equal(tokens, stepwise)
    assert torch.equal(
        tokens, decoding.beam_search(model, src, None, 7, 1, 2, width=1).tokens[:, 0]
    )
    drawn = decoding.sample(model, src, max_length=7, bos=1, eos=2, top_k=1, generator=0)
    assert torch.equal(tokens, drawn)


def test_the_location_score_is_decoded_greedily_only(make):
    model, src = make(score="location", kernel_size=3, filters=2)
    assert decoding.greedy(model, src, max_length=4, bos=1, eos=None).shape == (B, 4)
    with pytest.raises(NotImplementedError, match="location"):
        decoding.beam_search(model, src, max_length=4, bos=1, width=2)
