"""Decoders changed by their users: hooks, and forwards written anew, are called at each step."""

from __future__ import annotations

import copy

import pytest
import torch

from fastseq import decoding
from tests.decoding.test_samples_in_one_call import V, make

WAYS = {
    "greedy": lambda model, src: decoding.greedy(model, src, max_length=6, eos=None),
    "sample": lambda model, src: decoding.sample(
        model, src, max_length=6, eos=None, generator=1, top_k=5
    ),
    "beams": lambda model, src: (
        decoding.beam_search(model, src, max_length=6, eos=None, width=3, n_best=3).tokens
    ),
    "next": lambda model, src: decoding.next_tokens(model, src, k=4)[0],
}


def negated(output):
    logits, *rest = output
    return -logits, *rest


def by_class(decoder):
    class Negated(type(decoder)):
        def forward(self, *args, **keywords):
            return negated(super().forward(*args, **keywords))

    decoder.__class__ = Negated


def by_hook(decoder):
    decoder.register_forward_hook(lambda module, given, output: negated(output))


def by_attribute(decoder):
    forward = decoder.forward
    decoder.forward = lambda *args, **keywords: negated(forward(*args, **keywords))


@pytest.mark.parametrize("change", [by_class, by_hook, by_attribute])
@pytest.mark.parametrize("kind", ["attention", "bahdanau", "plain"])
def test_what_a_decoder_is_made_to_do_is_done(kind, change):
    model, src = make(kind), torch.randint(V, (5, 4))
    opposite = copy.deepcopy(model)
    with torch.no_grad():
        opposite.decoder.fc.weight.neg_()
        opposite.decoder.fc.bias.neg_()
    expected = {name: way(opposite, src) for name, way in WAYS.items()}
    before = {name: way(model, src) for name, way in WAYS.items()}
    change(model.decoder)
    for name, way in WAYS.items():
        assert torch.equal(way(model, src), expected[name]), name
        assert not torch.equal(before[name], expected[name])


def test_a_part_with_a_forward_of_its_own_is_called():
    model, src = make("attention"), torch.randint(V, (5, 4))
    expected = decoding.greedy(model, src, max_length=6, eos=0)
    calls, forward = [], model.encoder.forward
    model.encoder.forward = lambda *args: calls.append(1) or forward(*args)
    assert torch.equal(decoding.greedy(model, src, max_length=6, eos=0), expected)
    linear, logits = model.decoder.fc, model.decoder.fc.forward
    linear.forward = lambda *args: calls.append(2) or logits(*args)
    assert torch.equal(decoding.greedy(model, src, max_length=6, eos=0), expected)
    assert set(calls) == {1, 2}
