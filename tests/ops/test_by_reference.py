"""Cotangents that no kernel takes: batches of them, with tangents, negated lazily."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian

from fastseq import functional, nn
from fastseq.functional import loss as functional_loss
from fastseq.models import attention
from fastseq.ops import recurrent as recurrent_op
from fastseq.testing_decoder import decoder_case

T, B, E, H, V = 4, 2, 3, 5, 6
LAYERS = {
    "lstm": lambda: nn.LSTM(E, H, 2, bidirectional=True),
    "projected": lambda: nn.LSTM(E, H, proj_size=2, batch_first=True),
    "gru": lambda: nn.GRU(E, H),
    "rnn": lambda: nn.RNN(E, H, nonlinearity="relu"),
    "peephole lstm": lambda: nn.PeepholeLSTM(E, H),
    "layer norm lstm": lambda: nn.LayerNormLSTM(E, H),
    "zoneout": lambda: nn.LSTM(E, H, zoneout=0.3).eval(),
    "lstm cell": lambda: nn.LSTMCell(E, H),
    "gru cell": lambda: nn.GRUCell(E, H),
    "rnn cell": lambda: nn.RNNCell(E, H),
}


def recurrent(name, recompute=False):
    module = LAYERS[name]().double()
    module.recompute = recompute
    x = torch.randn(*((B, E) if "cell" in name else (T, B, E)), dtype=torch.float64)
    return lambda x, *_: module(x), [x, *module.parameters()]


def scores(name):
    query, keys, values = (torch.randn(B, n, H, dtype=torch.float64) for n in (2, T, T))
    more = [torch.randn(H, dtype=torch.float64)] if name == "additive_attention" else []
    return getattr(functional, name), [query, keys, values, *more]


def projection_alone():
    """c after one step depends on no weight of the projection."""
    module = nn.LSTM(E, H, proj_size=2).double().requires_grad_(False)
    x = torch.randn(1, B, E, dtype=torch.float64)
    return lambda _: module(x), [module.weight_hr_l0]


def values_alone():
    call, (query, keys, values, v) = scores("additive_attention")
    return lambda values: call(query, keys, values, v), [values]


def decoder(**options):
    case = decoder_case("lstm", dtype=torch.float64, **options)
    return case.function(functional), list(case.inputs.values())


def seq2seq():
    model = attention.Seq2Seq(
        attention.Encoder(V, E, H), attention.Decoder(V, E, H, attention.Attention(H))
    ).double()
    src, trg = torch.randint(V, (B, 3)), torch.randint(V, (B, T))
    return lambda *_: model(src, trg, 1.0), list(model.parameters())


def chunked_loss(reduction):
    target = torch.tensor([0, 5, -100, 2])
    hidden, weight = (torch.randn(n, H, dtype=torch.float64) for n in (len(target), V))
    call = functools.partial(functional.linear_cross_entropy, reduction=reduction)
    return lambda hidden, weight: call(hidden, weight, None, target), [hidden, weight]


CALLS = {
    **{name: functools.partial(recurrent, name) for name in LAYERS},
    "recomputed": lambda: recurrent("lstm", recompute=True),
    "additive attention": lambda: scores("additive_attention"),
    "dot attention": lambda: scores("dot_attention"),
    "lstm, the projection alone": projection_alone,
    "additive attention, values alone": values_alone,
    "decoder": decoder,
    "decoder of tokens": lambda: decoder(tokens=True),
    "seq2seq": seq2seq,
    **{f"loss, {r}": functools.partial(chunked_loss, r) for r in ("mean", "sum", "none")},
}
every_call = pytest.mark.parametrize("name", CALLS)


@pytest.fixture(params=[True, False], ids=["eager", "registered"])
def eager(request, monkeypatch):
    """Recurrent calls by the module for eager ones, and by the registered operators."""
    if request.param and recurrent_op.eager is None:
        pytest.skip("built without")
    if not request.param:
        monkeypatch.setattr(recurrent_op, "eager", None)
    monkeypatch.setattr(functional_loss, "DIRECT_BYTES", -1)


def flat(result):
    return [result] if isinstance(result, torch.Tensor) else [t for r in result for t in flat(r)]


def called(name):
    """Outputs and leaves."""
    call, inputs = CALLS[name]()
    leaves = [t.requires_grad_() for t in inputs if t.is_floating_point()]
    outputs = [out for out in flat(call(*inputs)) if out.requires_grad]
    assert outputs
    return outputs, leaves


def assert_same(found, expected):
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want)


@every_call
def test_a_batch_of_cotangents_is_one_after_another(name, eager):
    outputs, leaves = called(name)
    cotangents = [torch.randn(3, *out.shape, dtype=out.dtype) for out in outputs]
    find = functools.partial(torch.autograd.grad, outputs, leaves, retain_graph=True)
    one_by_one = [find(list(each)) for each in zip(*cotangents, strict=True)]
    expected = [torch.stack(each) for each in zip(*one_by_one, strict=True)]
    found = find(cotangents, is_grads_batched=True)
    assert not any(t.requires_grad for t in found)
    assert_same(found, expected)
    assert_same(torch.func.vmap(lambda *each: find(each))(*cotangents), expected)


@every_call
def test_a_cotangents_tangent_goes_through(name, eager):
    """Gradients are linear in the cotangents."""
    outputs, leaves = called(name)
    cotangents, tangents = ([torch.randn_like(out) for out in outputs] for _ in range(2))
    find = functools.partial(torch.autograd.grad, outputs, leaves, retain_graph=True)
    with forward_ad.dual_level():
        found = find(
            [forward_ad.make_dual(c, t) for c, t in zip(cotangents, tangents, strict=True)]
        )
        primals, pushed = zip(*map(forward_ad.unpack_dual, found), strict=True)
    assert_same(primals, find(cotangents))
    assert_same(pushed, find(tangents))


@pytest.mark.parametrize("call", [projection_alone, values_alone])
def test_an_output_without_a_gradient_of_its_own_has_second_derivatives(call, eager):
    fn, leaves = call()
    for leaf in leaves:
        leaf.requires_grad_()
    for out in flat(fn(*leaves)):
        find = functools.partial(
            torch.autograd.grad, out, leaves, torch.ones_like(out), materialize_grads=True
        )
        want = find(retain_graph=True)
        assert_same(find(create_graph=True), want)


@every_call
def test_lazy_negation_of_a_cotangent_is_seen(name, eager):
    outputs, leaves = called(name)
    cotangents = [torch.randn_like(out) for out in outputs]
    find = functools.partial(torch.autograd.grad, outputs, leaves, retain_graph=True)
    found = find([torch._neg_view(c) for c in cotangents])
    assert all(map(torch.equal, found, find([-c for c in cotangents])))


@pytest.mark.parametrize("name", ["lstm", "layer norm lstm", "gru cell"])
def test_vectorized_jacobians_and_hessians(name, eager):
    call, (x, *_) = CALLS[name]()

    def first(x):
        return flat(call(x))[0]

    for find, fn in ((jacobian, first), (hessian, lambda x: first(x).square().sum())):
        assert_same([find(fn, x, vectorize=True)], [find(fn, x)])
