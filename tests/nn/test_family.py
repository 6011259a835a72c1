"""GRU, RNN, PeepholeLSTM and LayerNormLSTM as modules; LSTM's own tests are in test_layers.py."""

from __future__ import annotations

import copy
import functools
import itertools
import pickle

import numpy
import pytest
import torch
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from fastseq import _native, functional, nn
from fastseq.testing import (
    assert_close_to_reference,
    assert_matches,
    recurrent_case,
    run_with_grads,
)
from tests.fuzz_recurrent import MODULES, TORCHS, yardstick
from tests.nn.test_layers import CALLS, CONSTRUCTIONS, PACKED, S, X, outcome

every_cell = pytest.mark.parametrize("cell", MODULES)
TORCH_HAS = [cell for cell, cls in TORCHS.items() if cls is not None]
CONFIGS = [
    dict(num_layers=layers, bidirectional=both, bias=bias, batch_first=first)
    for layers, both, bias, first in itertools.product((1, 2), *[(False, True)] * 3)
]


def build(cell, *args, **options):
    named = {"nonlinearity": cell[4:]} if cell.startswith("rnn_") else {}
    return MODULES[cell](*args, **named, **options)


def check(case):
    run = (case.inputs, case.cotangents)
    found = case.module(MODULES[case.cell])
    return assert_matches(found, case.reference(), yardstick(case), *run, names=case.names)


@every_cell
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: "-".join(map(str, c.values())))
def test_values_and_gradients(cell, config):
    check(recurrent_case(cell, 5, 3, 4, 9, **config))
    check(recurrent_case(cell, 5, 3, 4, 9, **config, hx=False, dtype=torch.float64))
    check(recurrent_case(cell, 5, 3, 4, 9, **config, lengths="random", resets=0.2))
    check(recurrent_case(cell, 5, 3, 4, 9, **config, lengths=[2, 5, 1], resets=0.2).packed())


@every_cell
def test_unbatched_is_a_batch_of_one(cell):
    module, x = build(cell, 4, 6, 2, bidirectional=True), torch.randn(5, 4)
    (y, state), (y1, state1) = module(x), module(x[:, None])
    assert torch.equal(y, y1[:, 0])
    pairs = [(state, state1)] if isinstance(state, torch.Tensor) else zip(state, state1)  # noqa: B905
    assert all(torch.equal(a, b[:, 0]) for a, b in pairs)


@every_cell
def test_unsorted_packing_with_states_is_each_row_alone(cell):
    module = build(cell, 4, 6, 2, bidirectional=True).double()
    rows = [torch.randn(n, 4, dtype=torch.float64) for n in (2, 5, 1, 5)]
    shape = (4, 4, 6)
    states = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    hx = states[0] if cell in ("gru", "rnn_tanh", "rnn_relu") else tuple(states)
    y, after = module(pack_sequence(rows, enforce_sorted=False), hx)
    padded, _ = torch.nn.utils.rnn.pad_packed_sequence(y)
    after = after if isinstance(after, tuple) else (after,)
    for n, row in enumerate(rows):
        pick = [s[:, n : n + 1] for s in (hx if isinstance(hx, tuple) else (hx,))]
        alone, last = module(row[:, None], tuple(pick) if isinstance(hx, tuple) else pick[0])
        assert_close_to_reference(padded[: len(row), n], alone[:, 0])
        for a, b in zip(after, last if isinstance(last, tuple) else (last,), strict=True):
            assert_close_to_reference(a[:, n], b[:, 0])


@pytest.mark.parametrize("cell", TORCH_HAS)
def test_torchs_class_seed_and_checkpoints(cell):
    made = []
    for cls in (MODULES[cell], TORCHS[cell]):
        torch.manual_seed(3)
        made.append(cls(5, 7, 2, bidirectional=True))
    ours, theirs = made
    assert isinstance(ours, TORCHS[cell]) and type(ours).__name__ == type(theirs).__name__
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(map(torch.equal, ours.parameters(), theirs.parameters()))
    for source, target in (made, made[::-1]):
        assert not target.load_state_dict(source.state_dict(), strict=True).missing_keys


@every_cell
@pytest.mark.parametrize("switch", ["high", "medium", "bf16"])
def test_without_amx_float32_stays_ieee_at_every_switch(cell, switch, request):
    if _native.loaded():
        request.addfinalizer(functools.partial(_native.set_tiles, _native.tiles()))
        _native.set_tiles("off")
    case = recurrent_case(cell, 9, 8, 33, 40, num_layers=2, bidirectional=True)
    run = (case.module(MODULES[cell]), case.inputs, case.cotangents)
    expected = run_with_grads(*run, names=case.names)
    if switch == "bf16":  # conftest.py sets it back
        torch.backends.mkldnn.rnn.fp32_precision = switch
    else:
        torch.set_float32_matmul_precision(switch)
    found = run_with_grads(*run, names=case.names)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@every_cell
def test_copies(cell):
    module, x = build(cell, 4, 6, 2), torch.randn(5, 3, 4)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert type(again) is type(module)
        assert torch.equal(again(x)[0], module(x)[0])
    old = copy.deepcopy(module)
    old.__dict__.pop("zoneout", None)
    assert torch.equal(pickle.loads(pickle.dumps(old))(x)[0], module(x)[0])


@every_cell
def test_wrapped_weights(cell):
    x = torch.randn(5, 3, 4)
    module = build(cell, 4, 6)
    parametrizations.weight_norm(module, "weight_hh_l0")
    prune.random_unstructured(module, "weight_ih_l0", 0.5)
    y, _ = module(x)
    y.sum().backward()
    assert module.weight_ih_l0_orig.grad is not None
    assert all(p.grad is not None for p in module.parameters())
    plain = build(cell, 4, 6)
    state = {n: getattr(module, n).detach() for n in plain.state_dict()}
    plain.load_state_dict(state)
    assert torch.equal(plain(x)[0], y)


@pytest.mark.parametrize("cell", TORCH_HAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [None, "even", "ragged"])
def test_autocast_gives_torchs_dtypes(cell, dtype, packed):
    ours = build(cell, 4, 6, 2)
    theirs = TORCHS[cell](4, 6, 2, **({"nonlinearity": cell[4:]} if cell[:3] == "rnn" else {}))
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, 4)
    if packed:
        rows = list(x.unbind(1))
        x = pack_sequence(rows if packed == "even" else [rows[0], rows[1][:3], rows[2][:1]])
    with torch.autocast("cpu", dtype=dtype):
        a, s = ours(x)
        try:
            b, t = theirs(x)
        except RuntimeError as error:
            assert "primitive" in str(error)
            pytest.skip("torch has no such kernel on this machine")
    exact = copy.deepcopy(theirs).double()
    c, _ = exact(x._replace(data=x.data.double()) if packed else x.double())
    a, b, c = (t.data if packed else t for t in (a, b, c))
    assert a.dtype == b.dtype
    assert_close_to_reference(a, c, b)
    s, t = (v if isinstance(v, tuple) else (v,) for v in (s, t))
    assert [v.dtype for v in s] == [v.dtype for v in t]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", [cell for cell in MODULES if cell not in TORCH_HAS])
def test_autocast_of_what_torch_lacks(cell, dtype):
    """No less exact than the reference under the same autocast; gradients in the weights' dtype."""
    case = recurrent_case(cell, 5, 3, 4, 6, num_layers=2, bidirectional=True)
    fns = case.module(MODULES[cell]), case.reference()
    with torch.autocast("cpu", dtype=dtype):
        found, by_torch = (fn(*case.inputs.values()) for fn in fns)
    wide = case.to(torch.float64)
    truth = wide.reference()(*wide.inputs.values())
    found, by_torch = (found[0], *found[1]), (by_torch[0], *by_torch[1:])
    for got, want, other in zip(found, truth, by_torch, strict=True):
        assert_close_to_reference(got, want, other.to(got.dtype))
    module = build(cell, 4, 6)
    with torch.autocast("cpu", dtype=dtype):
        module(case.inputs["x"])[0].sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in module.parameters())


@every_cell
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(cell, dtype):
    check(recurrent_case(cell, 5, 3, 4, 9, dtype=dtype, num_layers=2))
    check(recurrent_case(cell, 5, 3, 4, 9, dtype=dtype, lengths=[2, 5, 1], hx=False).packed())


def assert_refused_as_by_torch(cell, args, kwargs):
    named = {"nonlinearity": cell[4:]} if cell.startswith("rnn_") else {}
    modules = [cls(4, 6, **named) for cls in (MODULES[cell], TORCHS[cell])]
    found, expected = (outcome(lambda m=module: m(*args, **kwargs)) for module in modules)
    assert found[0] == expected[0]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("cell", TORCH_HAS[1:])
def test_call_errors_are_torchs(cell, name):
    assert_refused_as_by_torch(cell, *CALLS[name])


# With one state, hx is a tensor.
ONE_STATE = {
    "hx of other rows": ((X, S[:, :2]), {}),
    "hx of other layers": ((X, torch.cat((S, S))), {}),
    "hx of another width": ((X, S[..., :5]), {}),
    "hx unbatched for a batch": ((X, S[:, 0]), {}),
    "hx batched for no batch": ((X[:, 0], S), {}),
    "hx of another dtype": ((X, S.double()), {}),
    "hx a number": ((X, 1.0), {}),
    "packed with wrong hx": ((PACKED, S[:, :2]), {}),
    "packed with hx of another dtype": ((PACKED, S.double()), {}),
    "no steps, packed, with hx": (
        (PackedSequence(X[0, :0], torch.zeros(0, dtype=torch.int64)), S),
        {},
    ),
    "fine": ((X, S), {}),
    "fine, packed": ((PACKED, S), {}),
}


@pytest.mark.parametrize("name", ONE_STATE)
@pytest.mark.parametrize("cell", TORCH_HAS[1:])
def test_call_errors_about_one_state_are_torchs(cell, name):
    assert_refused_as_by_torch(cell, *ONE_STATE[name])


@pytest.mark.parametrize("name", CONSTRUCTIONS)
@pytest.mark.parametrize("cls", ["GRU", "RNN"])
def test_constructor_errors_and_warnings_are_torchs(cls, name):
    args, kwargs = CONSTRUCTIONS[name]
    ours, theirs = getattr(nn, cls), getattr(torch.nn, cls)
    assert outcome(lambda: ours(*args, **kwargs)) == outcome(lambda: theirs(*args, **kwargs))


OWN = [cell for cell in MODULES if cell not in TORCH_HAS]
OWN_ERRORS = {
    "input of one dimension": ((X[0, 0],), {}),
    "input of another width": ((X[..., :3],), {}),
    "input of another dtype": ((X.double(),), {}),
    "input not a tensor": (([1.0],), {}),
    "no steps": ((X[:0],), {}),
    "hx a tensor": ((X, S), {}),
    "hx of three": ((X, (S, S, S)), {}),
    "c0 of other rows": ((X, (S, S[:, :2])), {}),
    "hx unbatched for a batch": ((X, (S[:, 0], S[:, 0])), {}),
    "hx batched for no batch": ((X[:, 0], (S, S)), {}),
    "packed with wrong hx": ((PACKED, (S[:, :2], S)), {}),
    "lengths beyond T": ((X,), {"lengths": torch.tensor([6, 1, 1])}),
    "resets of rows first": ((X,), {"resets": torch.zeros(3, 5, dtype=torch.bool)}),
}


@pytest.mark.parametrize("name", OWN_ERRORS)
@pytest.mark.parametrize("cell", OWN)
def test_own_layers_say_what_is_wrong(cell, name):
    args, kwargs = OWN_ERRORS[name]
    with pytest.raises((ValueError, TypeError, RuntimeError), match=rf"fastseq\.{cell}: expected"):
        build(cell, 4, 6)(*args, **kwargs)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_zoneout(cell):
    module, x = build(cell, 4, 6, 2, zoneout=0.3), torch.randn(5, 3, 4)
    assert "zoneout" in repr(module)
    options = (True, 2, 0.0)
    for train in (True, False):
        torch.manual_seed(1)
        found = module.train(train)(x)[0]
        torch.manual_seed(1)
        weights = list(module.parameters())
        fn = getattr(functional, cell)
        assert torch.equal(fn(x, None, weights, *options, train, zoneout=0.3)[0], found)


def test_zoneout_may_be_set_anew():
    module, x = nn.LSTM(3, 5).eval(), torch.randn(4, 2, 3)
    module.zoneout = 0.1
    assert "zoneout=(0.1, 0.1)" in repr(module)
    given = nn.LSTM(3, 5, zoneout=0.1).eval()
    given.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], given(x)[0])
    module.zoneout, given.zoneout = numpy.float32(0.5), 0.5
    assert torch.equal(module(x)[0], given(x)[0])
    module.zoneout = 0
    assert "zoneout" not in repr(module)


@pytest.mark.parametrize("bad", ["a", None, torch.tensor(0.1), (0.1, "a"), [torch.tensor(0.1)] * 2])
def test_a_zoneout_that_is_no_number_is_refused(bad):
    said = pytest.raises(TypeError, match="fastseq.lstm: expected zoneout as a number")
    module = nn.LSTM(3, 5, zoneout=0.1)
    with said:
        nn.LSTM(3, 5, zoneout=bad)
    with said:
        module.zoneout = bad
    with said:
        functional.lstm(torch.randn(4, 2, 3), None, list(module.parameters()), zoneout=bad)
    assert module.zoneout == (0.1, 0.1)
