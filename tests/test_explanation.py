"""What explain() says of the fused loss and of decoding, and that it is what happens."""

from __future__ import annotations

import pytest
import torch

import fastseq
from fastseq import _native, decoding, functional, nn
from fastseq.functional import loss
from fastseq.models import attention as fast_house
from fastseq.reference import attention as reference_house


def inputs(rows: int, vocabulary: int):
    hidden, weight = torch.randn(rows, 4), torch.randn(vocabulary, 4)
    return hidden, weight, None, torch.randint(vocabulary, (rows,))


@pytest.fixture
def walks(monkeypatch):
    """Calls of the operator that walks over chunks."""
    calls = []
    real = loss.loss_of
    monkeypatch.setattr(loss, "loss_of", lambda *given: calls.append(1) or real(*given))
    return calls


@pytest.mark.parametrize("rows,backend,said", [(8, "torch", "bytes"), (3000, "cpu", "chunks")])
def test_the_loss_runs_what_it_says(walks, rows, backend, said):
    arguments = inputs(rows, 100)
    explanation = fastseq.explain(functional.linear_cross_entropy, *arguments)
    assert explanation.backend == backend and said in str(explanation)
    functional.linear_cross_entropy(*arguments)
    assert bool(walks) == (backend == "cpu")


@pytest.mark.parametrize("forced", ["torch", "cpu"])
def test_a_forced_backend_is_said_and_kept(walks, forced):
    arguments = inputs(8 if forced == "cpu" else 3000, 100)
    with fastseq.use_backend(forced):
        assert fastseq.explain(functional.linear_cross_entropy, *arguments).backend == forced
        functional.linear_cross_entropy(*arguments)
    assert bool(walks) == (forced == "cpu")


def test_the_module_is_explained_with_an_input_or_without():
    layer = nn.LinearCrossEntropy(4, 100)
    assert fastseq.explain(layer).backend == "torch"
    assert fastseq.explain(layer, torch.randn(3000, 4)).backend == "cpu"
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in str(fastseq.explain(layer, torch.randn(3000, 4)))


@pytest.mark.parametrize("name", ["greedy", "sample", "beam_search", "next_tokens"])
def test_decoding_names_what_a_step_runs(name):
    function = getattr(decoding, name)
    said = {}
    for house in (fast_house, reference_house):
        decoder = house.Decoder(9, 4, 6, house.Attention(6))
        model = house.Seq2Seq(house.Encoder(9, 4, 6), decoder)
        said[house] = fastseq.explain(function, model, torch.ones(1, 2, dtype=torch.int64))
    assert said[fast_house].op == said[reference_house].op == name
    whole = name != "next_tokens" and _native.loaded()
    assert ("one call" if whole else "stepper") in str(said[fast_house])
    assert "stepper" not in str(said[reference_house])
    assert said[reference_house].backend == "torch"
    model = fast_house.Seq2Seq(model.encoder, fast_house.Decoder(9, 4, 6, fast_house.Attention(6)))
    model.decoder.fc.register_forward_hook(lambda *_: None)
    assert "stepper" in str(fastseq.explain(function, model, torch.ones(1, 2, dtype=torch.int64)))


def test_a_decoder_is_explained():
    layer = nn.AttentionDecoder(7, 3, 4)
    hx = (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    arguments = torch.zeros(2, 3, dtype=torch.int64), hx, torch.randn(2, 5, 4)
    for found in (fastseq.explain(layer), fastseq.explain(layer, *arguments)):
        assert found.op == "attention_decoder"
        assert found.backend == ("cpu" if _native.loaded() else "torch")
    with fastseq.use_backend("torch"):
        found = fastseq.explain(layer)
    assert found.backend == "torch" and "a step at a time" in found.reason
    weights = [w for held in layer.rnn.all_weights for w in held]
    values = arguments[-1]
    said = fastseq.explain(functional.attention_decoder, values, hx, values, values, weights)
    assert said == fastseq.explain(layer)


def test_a_decoder_without_weights_is_refused():
    input, keys = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4)
    state = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match="expected params, the weights of the cell, got none"):
        fastseq.explain(functional.attention_decoder, input, (state, state), keys, keys, [])
