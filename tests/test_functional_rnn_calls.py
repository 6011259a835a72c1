"""The recurrent functions called in odd ways: special values, bad arguments, compiled."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch

from fastseq import functional
from fastseq.reference import rnn
from fastseq.testing import (
    assert_matches,
    assert_results_close,
    lstm_case,
    recurrent_case,
    run_with_grads,
)
from tests.fuzz_recurrent import ours, yardstick

NAN, INF = float("nan"), float("inf")
SPECIALS = {
    "nan in x": ("x", lambda t: t[2, 1].fill_(NAN)),
    "nan in one feature": ("x", lambda t: t[2, 1, :1].fill_(NAN)),
    "nan in h0": ("h0", lambda t: t[0, 0].fill_(NAN)),
    "nan in c0": ("c0", lambda t: t[0, 1, :2].fill_(NAN)),
    "inf in x": ("x", lambda t: t[1, 0, :1].fill_(INF)),
    "-inf in x": ("x", lambda t: t[1, 0, :1].fill_(-INF)),
    "inf in c0": ("c0", lambda t: t[0, 1, :2].fill_(INF)),
    "-inf in bias": ("bias_ih_l0", lambda t: t[:3].fill_(-INF)),
    "inf in bias": ("bias_hh_l0", lambda t: t.fill_(INF)),
    "nan in weights": ("weight_hh_l0", lambda t: t[5, 3].fill_(NAN)),
    "huge x": ("x", lambda t: t.mul_(1e30)),
    "large x": ("x", lambda t: t.mul_(300.0)),
    "huge c0": ("c0", lambda t: t.mul_(1e30)),
    "denormal x": ("x", lambda t: t.mul_(1e-40)),
    "denormal h0": ("h0", lambda t: t.mul_(1e-42)),
    "zero weights": ("weight_hh_l0", lambda t: t.zero_()),
    "saturated": ("x", lambda t: t.mul_(30.0)),
}


@pytest.mark.parametrize("name", SPECIALS)
@pytest.mark.parametrize("cell", rnn.CELLS)
def test_special_values_as_in_the_reference(cell, name):
    which, change = SPECIALS[name]
    # Its gradient in float32 is NaN by torch: the square of such a variance overflows.
    no_yardstick = (cell, name) == ("layer_norm_lstm", "huge c0")
    for hidden in (7, 16, 21):
        case = recurrent_case(cell, 5, 3, 4, hidden).map(torch.clone)
        if which not in case.inputs:
            pytest.skip("the cell has none")
        change(case.inputs[which])
        assert_matches(
            ours(case),
            case.reference(),
            # (torch's layer_norm makes NaN of huge values.)
            case.reference() if cell == "layer_norm_lstm" else yardstick(case),
            case.inputs,
            None if no_yardstick else case.cotangents,
            names=case.names,
            what=name,
        )


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("cell", rnn.CELLS)
def test_nothing_passes_where_a_row_is_cut_or_ends_whatever_the_weights(cell, T):
    """(Zero times NaN is not zero.)"""
    projections = (0, 3) if rnn.CELLS[cell].states == 2 else (0,)
    forms = (dict(resets=0.5), dict(lengths=[1, T, 0]))
    for form, P, H in itertools.product(forms, projections, (7, 20)):
        case = recurrent_case(cell, T, 3, 4, H, bidirectional=True, proj_size=P, **form)
        case = case.map(torch.clone)
        if "resets" in form:
            case.keywords["resets"][0] = torch.tensor([True, True, False])
        case.inputs["weight_hh_l0"][5, 2] = NAN
        exact = case.to(torch.float64)
        found = run_with_grads(ours(case), case.inputs, case.cotangents)
        truth = run_with_grads(exact.reference(), exact.inputs, exact.cotangents)
        rounded = {name: t.float() for name, t in truth.items()}
        torch.testing.assert_close(found, rounded, equal_nan=True)


def wrong(**changes):
    """Arguments of a good call, [5, 3, 4] with H = 6, with some replaced."""
    case = lstm_case(5, 3, 4, 6, num_layers=2)
    arguments = {
        "input": case.inputs["x"],
        "hx": (case.inputs["h0"], case.inputs["c0"]),
        "params": [t for n, t in case.inputs.items() if n.startswith(("weight", "bias"))],
        "num_layers": 2,
    }
    for name, change in changes.items():
        arguments[name] = change(arguments[name]) if callable(change) else change
    return arguments


def at(index: int, change):
    return lambda tensors: [change(t) if i == index else t for i, t in enumerate(tensors)]


ERRORS = {
    "input with one dimension": (dict(input=torch.randn(4)), ValueError, "input"),
    "input of another width": (dict(input=torch.randn(5, 3, 7)), ValueError, "7"),
    "input of integers": (dict(input=lambda x: x.long()), TypeError, "int64"),
    "input not a tensor": (dict(input=[1.0]), TypeError, "list"),
    "hx not a tuple": (dict(hx=lambda hx: hx[0]), TypeError, "hx"),
    "hx of three": (dict(hx=lambda hx: (*hx, hx[0])), (TypeError, ValueError), "hx"),
    "h0 of other rows": (dict(hx=lambda hx: (hx[0][:, :2], hx[1])), ValueError, "h0|hx"),
    "c0 of other width": (dict(hx=lambda hx: (hx[0], hx[1][..., :5])), ValueError, "c0|hx"),
    "c0 of another dtype": (dict(hx=lambda hx: (hx[0], hx[1].double())), TypeError, "float64"),
    "too few params": (dict(params=lambda p: p[:-1]), ValueError, "params"),
    "no params": (dict(params=[]), ValueError, "params"),
    "biases not announced": (dict(has_biases=False), ValueError, "params"),
    "w_ih of other rows": (dict(params=at(0, lambda t: t[:-1])), ValueError, "weight_ih_l0"),
    "w_hh not square": (dict(params=at(1, lambda t: t[:, :-1])), ValueError, "weight_"),
    "w_ih of layer 1": (dict(params=at(4, lambda t: t[:, 1:])), ValueError, "weight_ih_l1"),
    "bias too long": (dict(params=at(2, lambda t: t.repeat(2))), ValueError, "bias_ih_l0"),
    "w_hh of another dtype": (dict(params=at(5, lambda t: t.double())), TypeError, "weight_hh_l1"),
    "no layers": (dict(num_layers=0), ValueError, "num_layers"),
    "dropout above 1": (dict(dropout=1.5, train=True), ValueError, "dropout"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors_name_op_argument_expected_and_got(name):
    changes, kind, said = ERRORS[name]
    with pytest.raises(kind, match=rf"fastseq\.lstm: expected (?s:.*)({said})(?s:.*)") as failure:
        functional.lstm(**wrong(**changes))
    assert "got" in str(failure.value)
    functional.lstm(**wrong())


LENGTHS = torch.tensor([5, 0, 3])
RESETS = torch.zeros(5, 3, dtype=torch.bool)
BEYOND = {
    "lengths of other rows": (dict(lengths=LENGTHS[:2]), ValueError, r"lengths .*\[3\].*\[2\]"),
    "lengths of two dimensions": (dict(lengths=LENGTHS[None]), ValueError, "lengths"),
    "lengths of int32": (dict(lengths=LENGTHS.int()), TypeError, "lengths.*int32"),
    "lengths of floats": (dict(lengths=LENGTHS.float()), TypeError, "lengths.*float32"),
    "lengths a list": (dict(lengths=[5, 0, 3]), TypeError, "lengths"),
    "lengths beyond T": (dict(lengths=LENGTHS + 1), ValueError, "lengths .*T = 5, got 6"),
    "lengths below zero": (dict(lengths=LENGTHS - 1), ValueError, "lengths .*got -1"),
    "resets of other steps": (dict(resets=RESETS[:4]), ValueError, "resets"),
    "resets of rows first": (dict(resets=RESETS.T), ValueError, "resets"),
    "resets of integers": (dict(resets=RESETS.long()), TypeError, "resets.*int64"),
    "resets a list": (dict(resets=RESETS.tolist()), TypeError, "resets.*list"),
    "zoneout above one": (dict(zoneout=1.5), ValueError, "zoneout"),
    "zoneout of three": (dict(zoneout=(0.1, 0.1, 0.1)), ValueError, "zoneout"),
    "lengths and batch_sizes": (
        dict(lengths=LENGTHS, input=torch.randn(15, 4), batch_sizes=torch.tensor([3] * 5)),
        ValueError,
        "lengths or batch_sizes",
    ),
}


@pytest.mark.parametrize("name", BEYOND)
def test_errors_of_what_torch_lacks(name):
    changes, kind, said = BEYOND[name]
    with pytest.raises(kind, match=rf"fastseq\.lstm: expected (?s:.*){said}") as failure:
        functional.lstm(**wrong(**changes))
    assert "got" in str(failure.value)


@pytest.mark.parametrize(
    "sizes,kind",
    [
        ([2, 3, 2], ValueError),
        ([3, 2, 1], ValueError),
        ([3, 3, 2, 0], ValueError),
        ([4, 4], ValueError),
        ([3.0, 3.0, 2.0], TypeError),
        ([[3, 3, 2]], TypeError),
    ],
    ids=str,
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_wrong_batch_sizes_are_refused(cell, sizes, kind):
    case = recurrent_case(cell, 3, 3, 5, 9, lengths=[3, 3, 2]).packed()
    case.keywords["batch_sizes"] = torch.tensor(sizes)
    with pytest.raises(kind, match=rf"fastseq\.{cell}: expected .*(batch_sizes|hx).* got"):
        ours(case)(*case.inputs.values())


COMPILED = [
    ("lstm", "aot_eager"),
    ("gru", "aot_eager"),
    ("peephole_lstm", "aot_eager"),
    ("lstm", "inductor"),
]


@pytest.mark.parametrize("cell,backend", COMPILED, ids="-".join)
def test_compiles_into_one_graph(cell, backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    # Each kernel that inductor generates is a run of the C++ compiler: few of them will do.
    options = {} if backend == "inductor" else dict(num_layers=2, bidirectional=True)
    case = recurrent_case(cell, 3, 2, 4, 5, **options)
    fn = ours(case)
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    run = dict(inputs=case.inputs, cotangents=case.cotangents, names=case.names)
    eager = run_with_grads(fn, **run)
    # The compiler's cache on disk does not see that an op's schema has changed since.
    with torch.compiler.config.patch(force_disable_caches=True):
        found = run_with_grads(compiled, **run)
    exact = case.to(torch.float64)
    truth = run_with_grads(exact.reference(), exact.inputs, exact.cotangents, names=case.names)
    assert_results_close(found, truth, eager)
