"""GRU, RNN, PeepholeLSTM and LayerNormLSTM as modules; LSTM's own tests are in test_layers.py."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_sequence

from fastseq import functional
from fastseq.testing import assert_close_to_reference, assert_matches, recurrent_case
from tests.fuzz_recurrent import MODULES, TORCHS, yardstick

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
    a, b = (a.data, b.data) if packed else (a, b)
    assert a.dtype == b.dtype
    s, t = (v if isinstance(v, tuple) else (v,) for v in (s, t))
    assert [v.dtype for v in s] == [v.dtype for v in t]


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
