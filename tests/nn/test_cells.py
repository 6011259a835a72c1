"""LSTMCell, GRUCell and RNNCell as drop-ins for torch's: values, gradients, calls, errors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from fastseq import backends, nn
from fastseq.testing import assert_close_to_reference, assert_matches, edge_sizes

CELLS = {
    "lstm": (nn.LSTMCell, torch.nn.LSTMCell, {}),
    "gru": (nn.GRUCell, torch.nn.GRUCell, {}),
    "tanh": (nn.RNNCell, torch.nn.RNNCell, {"nonlinearity": "tanh"}),
    "relu": (nn.RNNCell, torch.nn.RNNCell, {"nonlinearity": "relu"}),
}
every_cell = pytest.mark.parametrize("name", CELLS)


def twins(name, *args, **kwargs):
    ours, theirs, more = CELLS[name]
    ours, theirs = ours(*args, **more, **kwargs), theirs(*args, **more, **kwargs)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def check(name, B, I, H, *, hx=True, bias=True, dtype=torch.float32):  # noqa: E741
    ours, theirs = twins(name, I, H, bias=bias, dtype=dtype)
    rows = () if B is None else (B,)
    states = 2 if name == "lstm" else 1
    inputs = {"x": torch.randn(*rows, I, dtype=dtype)}
    inputs |= {f"s{i}": torch.randn(*rows, H, dtype=dtype) for i in range(states if hx else 0)}
    names = list(inputs)[1:]
    inputs |= {n: p.detach() for n, p in ours.named_parameters()}

    def call(module):
        def run(x, *rest):
            values = dict(zip(list(inputs)[1:], rest, strict=True))
            given = [values.pop(n) for n in names]
            state = None if not given else given[0] if states == 1 else tuple(given)
            return torch.func.functional_call(module, values, (x, state))

        return run

    cotangents = [torch.randn(*rows, H, dtype=dtype) for _ in range(states)]
    truth = call(copy.deepcopy(theirs).double())
    assert_matches(call(ours), truth, call(theirs), inputs, cotangents, what=f"{name} {B} {I} {H}")


@every_cell
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("B", [None, 0, 1, 5, 17])
def test_values_and_gradients(name, B, dtype):
    for hx in (True, False):
        check(name, B, 4, 9, hx=hx, bias=hx, dtype=dtype)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "by stack"])
@pytest.mark.parametrize("rows", [(), (4,)], ids=["unbatched", "rows"])
def test_states_may_come_as_a_list(rows, direct, monkeypatch):
    if not direct:
        monkeypatch.setattr(backends, "eager_calls_allowed", lambda: False)
    ours, theirs = twins("lstm", 5, 6)
    x, states = torch.randn(*rows, 5), [torch.randn(*rows, 6) for _ in range(2)]
    expected, pair = theirs(x, states), ours(x, tuple(states))
    monkeypatch.setattr(torch.nn.LSTMCell, "forward", None)
    found = ours(x, states)
    assert type(found) is type(expected)
    assert all(map(torch.equal, found, pair))


@every_cell
def test_sizes(name):
    for H in edge_sizes(8, 16):
        check(name, 3, 5, H)


@every_cell
def test_gradgradcheck(name):
    ours, _ = twins(name, 2, 3, dtype=torch.float64)
    x, h = torch.randn(2, 2, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    leaves = (x.requires_grad_(), h.requires_grad_())
    state = (lambda h: (h, h * 2)) if name == "lstm" else (lambda h: h)
    assert torch.autograd.gradgradcheck(lambda x, h: ours(x, state(h)), leaves)


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_torchs_dtype_and_answer(name, dtype):
    ours, theirs = twins(name, 4, 6)
    x = torch.randn(3, 4)
    exact = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast("cpu", dtype=dtype):
        found, by_torch = ours(x), theirs(x)
    triples = (found, exact, by_torch)
    triples = zip(*triples, strict=True) if isinstance(found, tuple) else [triples]
    for got, want, other in triples:
        assert got.dtype == other.dtype
        assert_close_to_reference(got, want, other)


@every_cell
def test_copies_classes_and_checkpoints(name):
    ours, theirs = twins(name, 4, 6)
    x = torch.randn(3, 4)
    assert isinstance(ours, type(theirs)) and type(ours).__name__ == type(theirs).__name__
    assert repr(ours) == repr(theirs)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours)
        assert all(map(torch.equal, again(x), ours(x)))
    assert not ours.load_state_dict(theirs.state_dict()).missing_keys


X, S = torch.zeros(3, 4), torch.zeros(3, 6)
CALLS = {
    "no input": ((), {}),
    "input of three dimensions": ((X[None],), {}),
    "input of another width": ((X[:, :3],), {}),
    "input of another dtype": ((X.double(),), {}),
    "input of integers": ((X.long(),), {}),
    "hx of other rows": ((X, S[:2]), {}),
    "hx of another width": ((X, S[:, :5]), {}),
    "pair of other rows": ((X, (S[:2], S)), {}),
    "pair of another width": ((X, (S, S[:, :5])), {}),
    "pair of another dtype": ((X, (S, S.double())), {}),
    "unknown keyword": ((X,), {"lengths": None}),
    "fine": ((X,), {}),
}


def outcome(call):
    try:
        call()
    except Exception as error:
        return type(error), str(error)


@every_cell
@pytest.mark.parametrize("call", CALLS)
def test_call_errors_are_torchs(name, call):
    args, kwargs = CALLS[call]
    ours, theirs = twins(name, 4, 6)
    assert outcome(lambda: ours(*args, **kwargs)) == outcome(lambda: theirs(*args, **kwargs))
