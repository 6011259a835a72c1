"""nn.AttentionDecoder: every option against the plain loop, greedy decoding, bad arguments."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch

import fastseq
from fastseq import _native, nn
from fastseq.testing import assert_close_to_reference

OPTIONS = [
    {"cell": cell, "score": score, **order}
    for cell, score, order in itertools.product(
        ("lstm", "gru", "rnn_tanh", "rnn_relu"),
        ("additive", "general", "dot", "location"),
        (
            {},
            {"num_layers": 2, "residual": True},
            {"order": "after"},
            {"order": "after", "input_feeding": True, "num_layers": 3, "bias": False},
        ),
    )
]


def make(**options):
    torch.manual_seed(1)
    C = 6 if options.get("score") == "dot" else 5
    module = nn.AttentionDecoder(11, 4, 6, C, dtype=torch.float64, **options)
    L = options.get("num_layers", 1)
    states = 2 if options.get("cell", "lstm") == "lstm" else 1
    hx = tuple(torch.randn(L, 3, 6, dtype=torch.float64) for _ in range(states))
    outputs = torch.randn(3, 7, C, dtype=torch.float64, requires_grad=True)
    return module, torch.randint(11, (3, 5)), hx, outputs


def results(module, tokens, hx, outputs, **more):
    logits, states, weights = module(tokens, hx, outputs, **more)
    leaves = [outputs, *module.parameters()]
    total = logits.sin().sum() + weights.square().sum() + sum(s.sum() for s in states)
    return [logits, *states, weights, *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_options_against_the_plain_loop(options):
    arguments = make(**options)
    mask = torch.rand(3, 7) > 0.3
    mask[0] = False
    for more in ({}, {"mask": mask}, {"forced": (True, False, True, False, False)}):
        got = results(*arguments, **more)
        with fastseq.use_backend("torch"):
            expected = results(*arguments, **more)
        for one, other in zip(got, expected, strict=True):
            assert_close_to_reference(one, other, terms=2000)


@pytest.mark.parametrize("score", ["additive", "location"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_greedy_decoding_is_feeding_the_likeliest(order, score):
    module, _, hx, outputs = make(order=order, score=score)
    start = torch.tensor([1, 2, 3])
    tokens, weights = module.generate(start, hx, outputs, 6)
    fed, expected = start.unsqueeze(1), []
    for _ in range(6):
        logits, _, attended = module(fed, hx, outputs)
        expected.append(logits[:, -1].argmax(1))
        fed = torch.cat((fed, expected[-1].unsqueeze(1)), dim=1)
    assert torch.equal(tokens, torch.stack(expected, dim=1))
    assert_close_to_reference(weights, attended, terms=100)
    end = int(tokens[1, 2])
    stopped, _ = module.generate(start, hx, outputs, 6, end_token=end)
    for row, whole in zip(stopped.tolist(), tokens.tolist(), strict=True):
        n = whole.index(end) + 1 if end in whole else 6
        assert row == whole[:n] + [end] * (6 - n)


def by_hand(module, tokens, state, outputs, mask):
    """nn.AttentionDecoder with the location score, one layer, before the cell: as it is written."""
    kinds, side = module.location_conv.in_channels, module.location_conv.kernel_size[0] // 2
    last = torch.zeros(outputs.shape[:2], dtype=outputs.dtype)
    total, logits, weights = last, [], []
    for token in tokens.unbind(1):
        previous = torch.stack((last, total)[:kinds], 1)
        f = torch.nn.functional.conv1d(previous, module.location_conv.weight, padding=side)
        terms = module.query(state[0][0])[:, None] + module.key(outputs)
        e = torch.tanh(terms + module.location_proj(f.mT)) @ module.v
        last = e.masked_fill(~mask, -torch.inf).softmax(1)
        total = total + last
        context = torch.bmm(last[:, None], outputs)[:, 0]
        x = torch.cat((module.embedding(token), context), 1)
        out, state = module.rnn(x[:, None], state)
        logits.append(module.fc(torch.cat((out[:, 0], context), 1)))
        weights.append(last)
    return torch.stack(logits, 1), torch.stack(weights, 1)


@pytest.mark.parametrize("cumulative", [False, True])
def test_the_location_score_as_it_is_written(cumulative):
    torch.manual_seed(3)
    module = nn.AttentionDecoder(11, 4, 6, 5, score="location", kernel_size=3, filters=4,
                                 cumulative=cumulative, dtype=torch.float64)  # fmt: skip
    tokens, outputs = torch.randint(11, (3, 5)), torch.randn(3, 7, 5, dtype=torch.float64)
    state = tuple(torch.randn(1, 3, 6, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(3, 7) > 0.3
    mask[:, 2] = True
    logits, _, weights = module(tokens, state, outputs, mask=mask)
    expected = by_hand(module, tokens, state, outputs, mask)
    parameters = list(module.parameters())
    for got, wanted in zip((logits, weights), expected, strict=True):
        assert_close_to_reference(got, wanted.detach(), terms=1000)
    total = [logits.sin().sum() + weights.square().sum() for logits, weights in
             ((logits, weights), expected)]  # fmt: skip
    grads = [torch.autograd.grad(t, parameters) for t in total]
    for got, wanted in zip(*grads, strict=True):
        assert_close_to_reference(got, wanted, terms=5000)
    # It is not the additive score.
    assert all(g.any() for g, (n, _) in zip(grads[0], module.named_parameters(), strict=True)
               if n.startswith("location"))  # fmt: skip


def test_more_layers_than_the_kernel_takes():
    module, tokens, hx, outputs = make(num_layers=9)
    assert "at most 8 layers" in str(fastseq.explain(module, tokens, hx, outputs))
    got = module(tokens, hx, outputs)[0]
    with fastseq.use_backend("torch"):
        assert torch.equal(got, module(tokens, hx, outputs)[0])
    chosen, _ = module.generate(tokens[:, 0], hx, outputs, 4, end_token=2)
    assert chosen.shape == (3, 4)
    assert module.search(tokens[:, 0], hx, outputs, penalties=[1.0] * 3, width=2) is None
    assert module.draw(tokens[:, 0], hx, outputs, drawn=torch.rand(2, 3).double()) is None
    if fastseq.explain(make()[0]).backend == "cpu":
        with fastseq.use_backend("cpu"), pytest.raises(RuntimeError, match="at most 8 layers"):
            module(tokens, hx, outputs)


def test_it_says_what_it_runs():
    module, *_ = make(score="location")
    said = fastseq.explain(module)
    assert said.backend == "torch" and "step by step" in said.reason
    i = [torch.zeros(1)] * 5
    function = fastseq.functional.attention_decoder
    assert fastseq.explain(function, *i, location=(i, i)) == said
    assert fastseq.explain(make()[0]).backend == ("cpu" if _native.loaded() else "torch")
    with fastseq.use_backend("torch"):
        assert fastseq.explain(make()[0]).backend == "torch"


def test_features_are_what_the_output_layer_reads():
    module, tokens, hx, outputs = make()
    features, _, _ = module.features(tokens, hx, outputs)
    assert torch.equal(module.fc(features), module(tokens, hx, outputs)[0])


def test_copies_and_state():
    module, tokens, hx, outputs = make(order="after", num_layers=2)
    expected = module(tokens, hx, outputs)[0]
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(tokens, hx, outputs)[0], expected)
    fresh = nn.AttentionDecoder(11, 4, 6, 5, order="after", num_layers=2, dtype=torch.float64)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(fresh(tokens, hx, outputs)[0], expected)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cell": "peephole"}, "cell"),
        ({"score": "concat"}, "score"),
        ({"order": "behind"}, "order"),
        ({"input_feeding": True}, "input_feeding"),
        ({"score": "location", "kernel_size": 4}, "odd kernel_size"),
        ({"score": "dot", "context_size": 4}, "context_size"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ValueError, match=said):
        nn.AttentionDecoder(11, 4, 6, **options)


def test_bad_arguments():
    module, tokens, hx, outputs = make()
    with pytest.raises(IndexError, match="0..10"):
        module(tokens + 11, hx, outputs)
    with pytest.raises(ValueError, match="tokens of shape"):
        module(tokens, tuple(h[:, :2] for h in hx), outputs)
    with pytest.raises(ValueError, match="max_length"):
        module.generate(tokens[:, 0], hx, outputs, 0)
