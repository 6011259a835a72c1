"""The recurrent functions and autograd's rules: checks, shared leaves, writes, subsets, graphs."""

from __future__ import annotations

import pytest
import torch

from fastseq import functional
from fastseq.reference import rnn
from fastseq.testing import (
    LSTMCase,
    assert_close_to_reference,
    assert_matches,
    assert_results_close,
    lstm_case,
    recurrent_case,
    run_with_grads,
)
from tests.fuzz_recurrent import ours, seeded, with_zoneout, yardstick

CELLS = list(rnn.CELLS)
FORMS = {
    "plain": {},
    "stacked": dict(num_layers=2, bidirectional=True, bias=False, hx=False, batch_first=True),
    "lengths": dict(lengths=[3, 0], bidirectional=True),
    "packed": dict(lengths=[3, 1], bidirectional=True),
    "resets": dict(resets=0.4, bidirectional=True),
    "projected": dict(proj_size=2, bidirectional=True),
    "zoneout": {},
}


def exact_case(cell, form, T=3):
    """In float64, the function, its leaves (x where no row reads it is 0, not NaN), the reference
    and cotangents."""
    if form == "projected" and "lstm" not in cell or form == "zoneout" and cell not in ZONED:
        pytest.skip("the cell has none")
    case = recurrent_case(cell, T, 2, 2, 3, **FORMS[form], dtype=torch.float64)
    case = case.map(torch.nan_to_num, "x")
    case = case.packed() if form == "packed" else case
    fn, truth = ours(case), case.reference()
    if form == "zoneout":
        fn, truth = ours(case, train=True, zoneout=0.4), with_zoneout(case, (0.4, 0.4), True)
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    return seeded(fn, 5), leaves, seeded(truth, 5), case.cotangents


ZONED = ("lstm", "gru")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradcheck(cell, form):
    fn, leaves, _, _ = exact_case(cell, form)
    assert torch.autograd.gradcheck(fn, leaves, fast_mode=form != "plain")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradgradcheck(cell, form):
    fn, leaves, _, _ = exact_case(cell, form)
    assert torch.autograd.gradgradcheck(fn, leaves, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_that_can_be_differentiated_are_the_references(cell, form):
    """gradgradcheck sees whether they are differentiated rightly, not whether they are right."""
    fn, leaves, truth, cotangents = exact_case(cell, form)
    found, expected = (
        torch.autograd.grad(f(*leaves), leaves, cotangents, create_graph=True) for f in (fn, truth)
    )
    for got, want in zip(found, expected, strict=True):
        assert_close_to_reference(got.detach(), want.detach())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_recompute_keeps_no_gates_and_gives_the_same_bits(cell, form):
    if form == "projected" and "lstm" not in cell or form == "zoneout" and cell not in ZONED:
        pytest.skip("the cell has none")
    T, B, H = 40, 2, 9
    options = dict(FORMS[form])
    if "lengths" in options:
        options["lengths"] = [n * 13 for n in options["lengths"]]
    case = recurrent_case(cell, T, B, 5, H, **options)
    case = case.packed() if form == "packed" else case
    more = dict(train=True, zoneout=0.4) if form == "zoneout" else {}
    kept = []

    def keep(tensor):
        kept[-1] += tensor.numel()
        return tensor

    results = []
    for again in (True, False):
        kept.append(0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            fn = seeded(ours(case, recompute=again, **more), 5)
            results.append(run_with_grads(fn, case.inputs, case.cotangents, names=case.names))
    found, expected = results
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # Of each step and row at least the sums or what became of them.
    steps = len(case.inputs["x"]) if form == "packed" else T * B
    assert kept[0] + steps * H <= kept[1]


SUBSETS = [
    ("x",),
    ("h0",),
    ("weight_ih_l0",),
    ("weight_hh_l0",),
    ("bias_ih_l0",),
    ("bias_hh_l0_reverse",),
    ("weight_hh_l0_reverse", "h0"),
    ("x", "bias_ih_l1"),
    ("weight_ih_l1_reverse",),
]


@pytest.mark.parametrize("wrt", SUBSETS, ids="+".join)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_of_a_subset(cell, wrt):
    case = recurrent_case(cell, 4, 3, 5, 7, num_layers=2, bidirectional=True)
    torchs = yardstick(case)
    run = (case.inputs, case.cotangents)
    assert_matches(ours(case), case.reference(), torchs, *run, wrt=wrt, names=case.names)


@pytest.mark.parametrize("wrt", ["c0", "weight_peephole_l0", "weight_hr_l0"])
def test_gradient_of_what_only_some_cells_have(wrt):
    cell = "peephole_lstm" if "peephole" in wrt else "lstm"
    case = recurrent_case(cell, 4, 3, 5, 7, proj_size=3 if "hr" in wrt else 0)
    run = (case.inputs, case.cotangents)
    assert_matches(ours(case), case.reference(), yardstick(case), *run, wrt=[wrt])


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_through_some_of_the_outputs(cell, used):
    case = recurrent_case(cell, 4, 3, 5, 7, num_layers=2)
    used = [i for i in used if i < len(case.names)]
    if not used:
        pytest.skip("one state")

    def some(fn):
        return lambda *inputs: [fn(*inputs)[i] for i in used]

    truth, cotangents = some(case.reference()), [case.cotangents[i] for i in used]
    assert_matches(some(ours(case)), truth, truth, case.inputs, cotangents)


def carried_over(case: LSTMCase, lstm):
    """Two calls with one set of weights; the second starts from the state of the first."""

    def call(x, h0, c0, *params):
        y1, h_1, c_1 = case.functional(lstm)(x, h0, c0, *params)
        return case.functional(lstm)(x * y1.mean(), h_1, c_1, *params)

    return call


def tied(case: LSTMCase, lstm):
    """One tensor in several places: both biases, both directions, both states."""

    def call(x, state, w_ih, w_hh, b):
        return case.functional(lstm)(x, state, state, *[w_ih, w_hh, b, b] * 2)

    return call


ENTANGLED = [carried_over, tied]


def entangled(wrap, dtype=torch.float64):
    """A function whose arguments to the LSTM depend on each other, and its leaves."""
    case = lstm_case(2, 1, 2, 2, dtype=dtype, bidirectional=wrap is tied)
    names = ["x", "h0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"]
    leaves = [case.inputs[name] for name in (names if wrap is tied else case.inputs)]
    return case, [leaf.requires_grad_() for leaf in leaves]


@pytest.mark.parametrize("wrap", ENTANGLED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_where_the_arguments_depend_on_each_other(wrap, create_graph):
    case, leaves = entangled(wrap)
    found, expected = (
        torch.autograd.grad(
            wrap(case, lstm)(*leaves), leaves, case.cotangents, create_graph=create_graph
        )
        for lstm in (functional.lstm, rnn.lstm)
    )
    for got, want in zip(found, expected, strict=True):
        assert_close_to_reference(got, want)


@pytest.mark.parametrize("wrap", ENTANGLED, ids=lambda f: f.__name__)
def test_gradgradcheck_where_the_arguments_depend_on_each_other(wrap):
    case, leaves = entangled(wrap)
    assert torch.autograd.gradgradcheck(wrap(case, functional.lstm), leaves)


def test_retain_graph_gives_the_same_bits_twice():
    case = lstm_case(5, 3, 4, 9, num_layers=2)
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    outputs = case.functional(functional.lstm)(*leaves)
    first = torch.autograd.grad(outputs, leaves, case.cotangents, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, case.cotangents)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(outputs, leaves, case.cotangents)


def test_accumulated_gradients_share_no_memory():
    case = lstm_case(5, 3, 4, 9, bidirectional=True)
    leaves = {n: t.requires_grad_() for n, t in case.inputs.items()}
    for _ in range(2):
        outputs = case.functional(functional.lstm)(*leaves.values())
        torch.autograd.backward(outputs, case.cotangents)
    grads = {n: t.grad.clone() for n, t in leaves.items()}
    leaves["bias_ih_l0"].grad.zero_()
    leaves["weight_hh_l0"].grad.zero_()
    for name in set(grads) - {"bias_ih_l0", "weight_hh_l0"}:
        assert torch.equal(leaves[name].grad, grads[name]), name
    once = run_with_grads(case.functional(functional.lstm), case.inputs, case.cotangents)
    assert torch.equal(grads["weight_hh_l0"], 2 * once["grad weight_hh_l0"])


def test_outputs_share_no_memory_with_each_other_or_the_arguments():
    case = lstm_case(1, 3, 9, 9)
    y, h_n, c_n = case.functional(functional.lstm)(*case.inputs.values())
    assert torch.equal(y[-1], h_n[0])
    before = [t.clone() for t in (h_n, c_n, *case.inputs.values())]
    y.fill_(7.0)
    assert all(map(torch.equal, before, (h_n, c_n, *case.inputs.values())))


IN_PLACE = ["y", "h_n", "c_n", "x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize("which", IN_PLACE)
def test_a_write_before_backward_is_served_or_refused(which, options, dtype):
    """Where torch gives gradients we do; where it refuses we refuse or are right.

    A parameter may always be refused: torch serves a bias in float64 and refuses it in float32.
    """
    case = lstm_case(5, 3, 4, 8, **options, dtype=dtype)

    def torch_lstm(*inputs):
        y, (h_n, c_n) = case.module(torch.nn.LSTM)(*inputs)
        return y, h_n, c_n

    def gradients(lstm):
        leaves = {n: t.clone().requires_grad_() for n, t in case.inputs.items()}
        used = {n: t * 1 for n, t in leaves.items()}
        outputs = dict(zip(case.names, lstm(*used.values()), strict=True))
        loss = sum(
            (out * c).sum() for out, c in zip(outputs.values(), case.cotangents, strict=True)
        )
        with torch.no_grad():
            (used | outputs)[which].add_(1)
        found = torch.autograd.grad(loss, list(leaves.values()))
        return dict(zip(leaves, found, strict=True))

    untouched = run_with_grads(
        torch_lstm, case.to(torch.float64).inputs, [c.double() for c in case.cotangents]
    )
    right = {n: untouched[f"grad {n}"] for n in case.inputs}
    try:
        by_torch = gradients(torch_lstm)
    except RuntimeError:
        by_torch = None
    try:
        ours = gradients(case.functional(functional.lstm))
    except RuntimeError as error:
        assert "inplace" in str(error)
        parameter = which.startswith(("weight", "bias"))
        assert by_torch is None or parameter, f"torch serves a write into {which}"
    else:
        assert_results_close(ours, right, by_torch, what=f"after a write into {which}")
