"""What all models promise alike: they are their reference, faster."""

from __future__ import annotations

import copy
import inspect
import pickle
import random
from importlib import import_module

import pytest
import torch

from fastseq.testing import assert_close_to_reference, assert_matches

KINDS = ["plain", "attention", "bahdanau"]
SIZES = [(1, 1, 2), (3, 5, 1), (1, 2, 5), (2, 1, 7), (5, 7, 4), (13, 3, 11)]


def _tokens(rows, columns, vocab=11):
    return torch.randint(vocab, (rows, columns))


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_gradients_and_draws_in_float64(
    kind, sizes, ratio, make_pair, results, assert_same
):
    rows, source, target = sizes
    reference, fast = make_pair(kind)
    src, trg = _tokens(rows, source), _tokens(rows, target)
    cotangent = torch.randn(rows, target, 11)
    expected = results(reference, cotangent, src, trg, ratio)
    drawn = random.getstate()
    actual = results(fast, cotangent, src, trg, ratio)
    assert random.getstate() == drawn
    assert_same(actual, expected)
    assert not actual["output"][:, 0].any()
    assert actual["output"].is_contiguous()


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("sizes", [(3, 5, 6), (17, 9, 8)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_float32_errs_no_more_than_twice_the_reference(kind, sizes, ratio, make_pair):
    rows, source, target = sizes
    src, trg = _tokens(rows, source, 13), _tokens(rows, target, 13)

    def call(model):
        def forward(*parameters):
            random.seed(0)
            given = dict(zip(names, parameters, strict=True))
            return torch.func.functional_call(model, given, (src, trg, ratio))

        return forward

    reference, fast = make_pair(kind, (13, 16, 32), torch.float32)
    names = dict(fast.named_parameters())
    cotangents = [torch.randn(rows, target, 13)]
    assert_matches(call(fast), call(reference), call(reference), names, cotangents)


@pytest.mark.parametrize("kind", KINDS)
def test_many_coin_patterns(kind, make_pair, results, assert_same):
    reference, fast = make_pair(kind)
    src, trg = _tokens(4, 3), _tokens(4, 5)
    cotangent = torch.randn(4, 5, 11)
    for seed in range(20):
        expected = results(reference, cotangent, src, trg, 0.5, seed=seed)
        actual = results(fast, cotangent, src, trg, 0.5, seed=seed)
        assert_same(actual, expected, f"seed {seed}")


@pytest.mark.parametrize("kind", KINDS)
def test_transposed_tokens_and_a_batch_of_none(kind, make_pair, results, assert_same):
    reference, fast = make_pair(kind)
    src, trg = _tokens(6, 3).t(), _tokens(4, 3).t()
    cotangent = torch.randn(3, 4, 11)
    expected = results(reference, cotangent, src, trg)
    assert_same(results(fast, cotangent, src, trg), expected)
    assert fast(src[:0], trg[:0]).shape == reference(src[:0], trg[:0]).shape == (0, 4, 11)


@pytest.mark.parametrize("kind", KINDS)
def test_a_target_of_only_the_start_token(kind, make_pair):
    for model in make_pair(kind):
        state = random.getstate()
        output = model(_tokens(2, 3), _tokens(2, 1))
        assert output.shape == (2, 1, 11) and output.dtype == torch.float64
        assert not output.any() and not output.requires_grad
        assert random.getstate() == state


@pytest.mark.parametrize("kind", KINDS)
def test_targets_that_are_never_fed_may_be_any_label(kind, make_pair):
    src, trg = _tokens(2, 3), _tokens(2, 4)
    ignored = trg.clone()
    ignored[:, 1:] = -100
    for model in make_pair(kind):
        assert torch.equal(model(src, trg, 0.0), model(src, ignored, 0.0))
        ignored_last = trg.clone()
        ignored_last[:, -1] = -100
        assert torch.equal(model(src, trg, 1.0), model(src, ignored_last, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_same_names_signatures_and_initial_weights(kind):
    reference = import_module(f"fastseq.reference.{kind}")
    fast = import_module(f"fastseq.models.{kind}")
    for name in fast.__all__:
        ours, theirs = getattr(fast, name), getattr(reference, name)
        for method in ("__init__", "forward"):
            wanted = inspect.signature(getattr(theirs, method)).parameters
            got = inspect.signature(getattr(ours, method)).parameters
            assert [(p.name, p.default) for p in got.values()] == [
                (p.name, p.default) for p in wanted.values()
            ]
    torch.manual_seed(3)
    expected = reference.Encoder(11, 5, 7).state_dict()
    torch.manual_seed(3)
    actual = fast.Encoder(11, 5, 7).state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoints_load_both_ways(kind, make_pair):
    reference, fast = make_pair(kind)
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.add_(1.0)
    reference.load_state_dict(fast.state_dict(), strict=True)
    assert list(reference.state_dict()) == list(fast.state_dict())
    src, trg = _tokens(2, 3), _tokens(2, 4)
    assert_close_to_reference(fast(src, trg, 1.0), reference(src, trg, 1.0))


@pytest.mark.parametrize("remake", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("kind", KINDS)
def test_copies_are_equal_and_independent(kind, remake, make_pair):
    _, fast = make_pair(kind)
    src, trg = _tokens(2, 3), _tokens(2, 4)
    before = fast(src, trg, 1.0)
    other = remake(fast)
    assert torch.equal(other(src, trg, 1.0), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(-1.0)
    assert torch.equal(fast(src, trg, 1.0), before)
    assert not torch.equal(other(src, trg, 1.0), before)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_changed_in_place_take_effect(kind, make_pair):
    reference, fast = make_pair(kind)
    src, trg = _tokens(2, 3), _tokens(2, 4)
    fast(src, trg)
    with torch.no_grad():
        for ours, theirs in zip(fast.parameters(), reference.parameters(), strict=True):
            ours.data.mul_(0.5)
            theirs.mul_(0.5)
    assert_close_to_reference(fast(src, trg, 1.0), reference(src, trg, 1.0))


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_collect_both_gradients(kind, make_pair, results, assert_same):
    pair = make_pair(kind)
    for model in pair:
        model.decoder.embedding.weight = model.encoder.embedding.weight
    src, trg = _tokens(3, 4), _tokens(3, 5)
    cotangent = torch.randn(3, 5, 11)
    expected, actual = (results(model, cotangent, src, trg) for model in pair)
    assert "grad decoder.embedding.weight" not in actual
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_backward_through_the_gradient(kind, make_pair, assert_same):
    src, trg = _tokens(2, 3), _tokens(2, 4)
    penalties = []
    for model in make_pair(kind):
        loss = model(src, trg, 1.0).square().sum()
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        penalty = sum(g.square().sum() for g in gradients)
        penalties.append(torch.autograd.grad(penalty, parameters))
    expected, actual = (dict(enumerate(penalty)) for penalty in penalties)
    assert_same(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_both_houses_mix(kind, make_pair):
    reference, fast = make_pair(kind)
    src, trg = _tokens(3, 4), _tokens(3, 6)
    random.seed(5)
    expected = reference(src, trg)
    for encoder, decoder in [
        (fast.encoder, reference.decoder),
        (reference.encoder, fast.decoder),
    ]:
        for owner in (reference, fast):
            random.seed(5)
            assert_close_to_reference(type(owner)(encoder, decoder)(src, trg), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_decoder_with_hooks_or_its_own_forward_is_called_each_step(kind, make_pair):
    reference, fast = make_pair(kind)
    src, trg = _tokens(3, 4), _tokens(3, 6)
    calls = []
    handle = fast.decoder.register_forward_hook(lambda *_: calls.append(1))
    assert_close_to_reference(fast(src, trg, 1.0), reference(src, trg, 1.0))
    assert len(calls) == 5
    handle.remove()

    class Louder(type(fast.decoder)):
        def forward(self, *args):
            logits, *rest = super().forward(*args)
            return logits * 2, *rest

    fast.decoder.__class__ = Louder
    assert_close_to_reference(fast(src, trg, 1.0), 2 * reference(src, trg, 1.0))


@pytest.mark.parametrize("token", [11, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_tokens_outside_the_vocabulary(kind, token, make_pair):
    good, bad = _tokens(2, 3), torch.tensor([[1, token, 2], [0, 1, 2]])
    reference, fast = make_pair(kind)
    for src, trg in [(bad, good), (good, bad)]:
        with pytest.raises(IndexError):
            reference(src, trg, 1.0)
        with pytest.raises(IndexError, match=r"expected token ids in 0\.\.10, got"):
            fast(src, trg, 1.0)


@pytest.mark.parametrize(
    ("src", "trg", "message"),
    [
        ((2, 0), (2, 3), "at least one source token"),
        ((2, 3), (2, 0), "start token"),
        ((3, 3), (2, 3), "B = 2"),
        ((2, 3), (2,), r"trg of shape \[B, T\]"),
        ((2, 3), (2, 3, 1), r"trg of shape \[B, T\]"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_bad_shapes_raise_what_the_reference_raises(kind, src, trg, message, make_pair):
    reference, fast = make_pair(kind)
    tokens = [torch.ones(shape, dtype=torch.int64) for shape in (src, trg)]
    with pytest.raises(Exception) as expected:  # noqa: PT011
        reference(*tokens)
    with pytest.raises(expected.type, match=f"^fastseq.models.{kind}.*{message}"):
        fast(*tokens)
