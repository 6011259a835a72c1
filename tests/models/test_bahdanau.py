"""The published translation model: random streams, unequal sources, features, searches."""

from __future__ import annotations

import random

import pytest
import torch

from fastseq.decoding import beam_search, greedy
from fastseq.models import _alone
from fastseq.models import bahdanau as fast_house
from fastseq.reference import bahdanau as reference_house
from fastseq.reference.attention import length_mask
from fastseq.testing import assert_close_to_reference, assert_matches, run_with_grads

LENGTHS = [(1, 1), (3, 5), (5, 1, 4), (4, 4), (2, 7, 7, 3)]
STEPS = {(2, 7, 7, 3): 8}


def _tokens(rows, columns):
    return torch.randint(11, (rows, columns))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_lengths_like_the_reference(lengths, ratio, make_pair, results, assert_same):
    src = _tokens(len(lengths), STEPS.get(lengths, max(lengths)))
    trg, cotangent = _tokens(len(lengths), 5), torch.randn(len(lengths), 5, 11)
    expected, actual = (
        results(model, cotangent, src, trg, ratio, torch.tensor(lengths))
        for model in make_pair("bahdanau")
    )
    assert_same(actual, expected)


def test_what_lies_past_the_end_of_a_source_does_not_matter(make_pair):
    src, trg, lengths = _tokens(3, 6), _tokens(3, 4), torch.tensor([2, 6, 3])
    other = torch.where(length_mask(lengths, 6), src, _tokens(3, 6))
    for model in make_pair("bahdanau"):
        assert torch.equal(model(src, trg, 1.0, lengths), model(other, trg, 1.0, lengths))
        alone = model(src[:1, :2], trg[:1], 1.0)
        assert_close_to_reference(model(src, trg, 1.0, lengths)[:1], alone, terms=100)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("drops", [(0.5, 0.0), (0.0, 0.3), (0.4, 0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dropout_draws_what_the_reference_draws(
    drops, ratio, dtype, make_pair, results, assert_same
):
    src, trg, cotangent = _tokens(5, 4), _tokens(5, 6), torch.randn(5, 6, 11)
    found, states = [], []
    for model in make_pair("bahdanau", dtype=dtype):
        model.train()
        for layer in (model.encoder.dropout, model.decoder.dropout):
            layer.p = drops[0]
        model.decoder.output_dropout.p = drops[1]
        torch.manual_seed(3)
        found.append(results(model, cotangent, src, trg, ratio, torch.tensor([4, 1, 3, 4, 2])))
        states.append((torch.get_rng_state(), random.getstate()))
    assert torch.equal(states[0][0], states[1][0])
    assert states[0][1] == states[1][1]
    expected, actual = found
    if dtype == torch.float64:
        assert_same(actual, expected)
        torch.manual_seed(4)
        assert not torch.equal(model(src, trg, 1.0), actual["output"])
    else:
        # Another draw would move the loss by tenths.
        assert (actual["output"] - expected["output"]).abs().max() < 1e-4


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_the_loop_is_one_call(ratio, make_pair, monkeypatch):
    _, fast = make_pair("bahdanau")
    calls, whole = [], fast_house.attention_decoder

    def noted(*args, **options):
        calls.append((args[0] if args else options["input"]).shape)
        return whole(*args, **options)

    monkeypatch.setattr(fast_house, "attention_decoder", noted)
    monkeypatch.setattr(_alone, "attention_decoder", noted)
    monkeypatch.setattr(fast_house.Stepper, "__call__", None)
    fast.train()(_tokens(3, 4), _tokens(3, 9), ratio)
    assert [shape[:2] for shape in calls] == [(3, 8)]
    greedy(fast.eval(), _tokens(3, 4), max_length=7)
    assert len(calls) == 2


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["attention", "bahdanau"])
def test_the_output_layer_of_the_features_gives_the_logits(kind, ratio, make_pair):
    _, fast = make_pair(kind)
    src, trg, lengths = _tokens(3, 4), _tokens(3, 6), torch.tensor([4, 2, 3])
    random.seed(2)
    logits = fast(src, trg, ratio, lengths)
    drawn = random.getstate()
    random.seed(2)
    features = fast.features(src, trg, ratio, lengths)
    assert random.getstate() == drawn
    assert features.shape == (3, 5, fast.decoder.fc.in_features)
    assert_close_to_reference(fast.decoder.fc(features), logits[:, 1:])
    assert fast.features(src, trg[:, :1]).shape == (3, 0, fast.decoder.fc.in_features)


@pytest.mark.parametrize("kind", ["attention", "bahdanau"])
def test_features_of_a_decoder_that_has_to_be_called_are_refused(kind, make_pair):
    reference, fast = make_pair(kind)
    src, trg = _tokens(2, 3), _tokens(2, 4)
    with pytest.raises(AttributeError):
        type(fast)(fast.encoder, reference.decoder).features(src, trg)
    fast.decoder.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="without hooks or a forward of"):
        fast.features(src, trg)


def _attentions(hidden, dtype=torch.float64):
    reference = reference_house.Attention(hidden).to(dtype)
    fast = fast_house.Attention(hidden).to(dtype)
    fast.load_state_dict(reference.state_dict())
    return reference, fast


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 5, 3), (7, 13, 8), (3, 31, 17)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_contexts_weights_and_gradients(dtype, sizes, masked, assert_same):
    rows, source, hidden = sizes
    mask = torch.rand(rows, source) < 0.6 if masked else None
    reference, fast = _attentions(hidden, dtype)
    names = dict(reference.named_parameters())

    def call(attention):
        def forward(query, keys, *parameters):
            given = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(attention, given, (query, keys, mask))

        return forward

    inputs = {
        "query": torch.randn(rows, hidden, dtype=dtype),
        "keys": torch.randn(rows, source, 2 * hidden, dtype=dtype),
        **names,
    }
    cotangents = [torch.randn(rows, n, dtype=dtype) for n in (2 * hidden, source)]
    if dtype == torch.float32:
        assert_matches(call(fast), call(reference), call(reference), inputs, cotangents)
    else:
        truth = run_with_grads(call(reference), inputs, cotangents)
        actual = run_with_grads(call(fast), inputs, cotangents)
        # One position weighs 1 whatever the scores: their gradients are rounding and nothing else.
        flat = ("grad query", "grad attn.weight", "grad attn.bias", "grad v.weight")
        for name in flat if source == 1 else ():
            assert max(actual.pop(name).abs().max(), truth.pop(name).abs().max()) < 1e-12
        assert_same(actual, truth)


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(3, 2, dtype=torch.bool)])
def test_masks_of_another_kind_or_shape(mask, make_pair):
    error = TypeError if mask.dtype != torch.bool else ValueError
    for model in make_pair("bahdanau"):
        outputs, hidden = model.encoder(_tokens(2, 3))
        with pytest.raises(error, match="expected mask"):
            model.decoder(_tokens(2, 1), hidden, outputs, mask)
        with pytest.raises(error, match="expected mask"):
            model.decoder.attention(hidden[0], outputs, mask)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_rows_without_anything_to_attend_to_stay_finite(make_pair):
    mask = torch.tensor([[True, False], [False, False]])
    with torch.autograd.detect_anomaly(check_nan=True):
        for model in make_pair("bahdanau"):
            outputs, hidden = model.encoder(torch.tensor([[1, 2], [3, 4]]))
            logits, _, weights = model.decoder(torch.tensor([[5], [6]]), hidden, outputs, mask)
            assert not weights[1].any()
            logits.sum().backward()
            grads = [p.grad for p in model.parameters()]
            assert all(g.isfinite().all() for g in [logits, *grads])


@pytest.mark.parametrize("masked", [False, True])
def test_decoder_calls_one_by_one_are_the_whole_target(masked, make_pair):
    src, trg = _tokens(3, 5), _tokens(3, 6)
    mask = torch.rand(3, 5) < 0.7 if masked else None
    reference, fast = make_pair("bahdanau")
    outputs, hidden = fast.encoder(src)
    coins = [True, False, False, True, True]
    whole = fast.decoder.fc(fast.decoder.features(trg, [True, *coins[:-1]], hidden, outputs, mask))
    token, mine, theirs = trg[:, :1], hidden, hidden
    for t, forced in enumerate(coins):
        logits, mine, weights = fast.decoder(token, mine, outputs, mask)
        expected, theirs, wanted = reference.decoder(token, theirs, outputs, mask)
        assert logits.shape == (3, 1, 11) and weights.shape == (3, 1, 5)
        assert_close_to_reference(logits, expected)
        assert_close_to_reference(weights, wanted)
        assert_close_to_reference(logits[:, 0], whole[:, t])
        token = trg[:, t + 1 : t + 2] if forced else logits.argmax(2)


class Sharper(fast_house.Attention):
    """An attention of one's own, which takes one query a source."""

    def forward(self, query, keys, mask=None):
        return super().forward(2 * query, keys, mask)


@torch.no_grad()
@pytest.mark.parametrize("own", [False, True])
def test_searches_find_what_they_find_with_the_reference(own, make_pair):
    src, lengths = _tokens(6, 5), torch.tensor([5, 2, 4, 1, 5, 3])
    reference, fast = make_pair("bahdanau")
    if own:
        for model in (reference, fast):
            attention = Sharper(7).double()
            attention.load_state_dict(reference.decoder.attention.state_dict())
            model.decoder.attention = attention
    options = {"lengths": lengths, "max_length": 12}
    expected, actual = (greedy(m, src, return_weights=True, **options) for m in (reference, fast))
    assert torch.equal(actual[0], expected[0])
    assert_close_to_reference(actual[1], expected[1])
    expected, actual = (
        beam_search(m, src, width=4, n_best=3, **options) for m in (reference, fast)
    )
    assert torch.equal(actual.tokens, expected.tokens)
    assert_close_to_reference(actual.scores, expected.scores, terms=1000)


@torch.no_grad()
def test_keys_are_projected_once_a_search(make_pair, monkeypatch):
    _, fast = make_pair("bahdanau")
    calls, project = [], fast_house.Attention.project_keys
    monkeypatch.setattr(
        fast_house.Attention, "project_keys", lambda *a: calls.append(1) or project(*a)
    )
    beam_search(fast, _tokens(3, 5), width=3, max_length=8)
    assert len(calls) == 1
