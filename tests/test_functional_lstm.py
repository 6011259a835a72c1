"""functional.lstm against the float64 reference: values, gradients, autograd's rules, errors."""

from __future__ import annotations

import itertools
import random
import shutil
from dataclasses import replace

import pytest
import torch

from fastseq import functional
from fastseq.reference import rnn
from fastseq.testing import (
    LAYOUTS,
    LSTMCase,
    assert_close_to_reference,
    assert_matches,
    assert_results_close,
    edge_sizes,
    lstm_case,
    run_with_grads,
    with_layout,
)


def check(case: LSTMCase, **options) -> dict:
    """functional.lstm against the reference, with torch in the same dtype as the yardstick."""
    return assert_matches(
        case.functional(functional.lstm),
        case.functional(rnn.lstm),
        case.module(torch.nn.LSTM),
        case.inputs,
        case.cotangents,
        names=case.names,
        what=str(case),
        **options,
    )


def grid() -> list[tuple[int, int, int, int]]:
    """(T, B, I, H): each extent alone through its edges, then random combinations of edges."""
    edges = edge_sizes(4, 8, 16)
    sizes = [(t, 3, 5, 6) for t in (1, 2, 3, 31)]
    sizes += [(4, b, 5, 6) for b in (*edges, 33, 67)]
    sizes += [(4, 3, i, 6) for i in (*edges, 65, 131)]
    sizes += [(4, 3, 5, h) for h in (*edges, 31, 33, 64, 65, 127)]
    draw = random.Random(0)
    small = [size for size in edges if size < 17]
    sizes += [tuple(draw.choice(small) for _ in "TBIH") for _ in range(24)]
    # Long recurrent sums of small terms, where the order of accumulation shows.
    sizes += [(2, 64, 2, 512), (50, 4, 8, 300), (50, 64, 8, 128)]
    return [*sizes, (1, 1, 1, 1), (3, 0, 3, 4), (9, 130, 33, 40), (40, 2, 70, 129)]


# Dealt out to the sizes in turn, so that each is met at several of them.
OPTIONS = [
    dict(num_layers=layers, bidirectional=both, bias=bias, batch_first=first, hx=hx)
    for layers, both, bias, first, hx in itertools.product((1, 2), *[(False, True)] * 4)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(
    "index,size", list(enumerate(grid())), ids=lambda v: str(v).replace(" ", "")
)
def test_values_and_gradients(index, size, dtype):
    options = OPTIONS[index * 11 % len(OPTIONS)]
    case = lstm_case(*size, **options, dtype=dtype, seed=index)
    check(case)


def test_no_steps_hand_the_state_through():
    """Beyond torch, which refuses T = 0."""
    case = lstm_case(0, 2, 3, 4, bidirectional=True)
    found = run_with_grads(
        case.functional(functional.lstm), case.inputs, case.cotangents, names=case.names
    )
    assert found["y"].shape == (0, 2, 8)
    _, dh, dc = case.cotangents
    through = {"h_n": case.inputs["h0"], "c_n": case.inputs["c0"], "grad h0": dh, "grad c0": dc}
    for name, tensor in found.items():
        assert torch.equal(tensor, through.get(name, torch.zeros_like(tensor))), name


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_combination_of_options(options):
    check(lstm_case(5, 3, 4, 9, **options, seed=1))


def test_three_layers_both_directions():
    check(lstm_case(7, 5, 6, 17, num_layers=3, bidirectional=True))


def test_reference_is_torchs_lstm():
    """The oracle itself, against torch in float64."""
    for seed, options in enumerate(OPTIONS):
        case = lstm_case(4, 3, 2, 5, **options, dtype=torch.float64, seed=seed)
        oracle, torch_lstm = case.functional(rnn.lstm), case.module(torch.nn.LSTM)
        assert_matches(oracle, torch_lstm, None, case.inputs, case.cotangents, what=str(case))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("which", ["x", "h0", "c0", "weight_ih_l0", "weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_strides(which, layout, batch_first):
    case = lstm_case(5, 6, 7, 9, batch_first=batch_first)
    check(case.map(lambda t: with_layout(t, layout), which))


def test_strided_cotangents():
    case = lstm_case(5, 6, 7, 9, bidirectional=True)
    for layout in ("transposed", "strided", "sliced", "expanded"):
        case.cotangents[:] = [with_layout(c, layout) for c in case.cotangents]
        check(case)


SUBSETS = [
    ("x",),
    ("h0",),
    ("c0",),
    ("weight_ih_l0",),
    ("weight_hh_l0",),
    ("bias_ih_l0",),
    ("bias_hh_l0_reverse",),
    ("weight_hh_l0_reverse", "c0"),
    ("x", "bias_ih_l1"),
    ("weight_ih_l1_reverse",),
]


@pytest.mark.parametrize("wrt", SUBSETS, ids="+".join)
def test_gradients_of_a_subset(wrt):
    check(lstm_case(4, 3, 5, 7, num_layers=2, bidirectional=True), wrt=wrt)


@pytest.mark.parametrize("used", [(0,), (1,), (2,), (0, 2), (1, 2)], ids=str)
def test_gradients_through_some_of_the_outputs(used):
    case = lstm_case(4, 3, 5, 7, num_layers=2)

    def some(lstm):
        return lambda *inputs: [lstm(*inputs)[i] for i in used]

    def torch_lstm(*inputs):
        y, (h_n, c_n) = case.module(torch.nn.LSTM)(*inputs)
        return y, h_n, c_n

    assert_matches(
        some(case.functional(functional.lstm)),
        some(case.functional(rnn.lstm)),
        some(torch_lstm),
        case.inputs,
        [case.cotangents[i] for i in used],
    )


LENGTHS = [[1], [3], [2, 1], [7, 5, 5, 1], [4] * 3, [9, 8, 7, 6, 5, 4, 3, 2, 1], [20, *[1] * 16]]
# Enough rows for one long sum over all of them to err more than torch's sums step by step.
LENGTHS += [sorted([1 + row % 12 for row in range(60)], reverse=True)]


def packed_case(lengths: list[int], **options) -> tuple[LSTMCase, torch.Tensor]:
    """A call on packed rows [N, I], and its batch_sizes."""
    sizes = [sum(length > t for length in lengths) for t in range(lengths[0])]
    case = lstm_case(1, len(lengths), 5, 9, **options)
    rows = lstm_case(sum(sizes), None, 5, 9, **options)
    cotangents = [rows.cotangents[0], *case.cotangents[1:]]
    case = case.map(lambda _: rows.inputs["x"], "x")
    return replace(case, cotangents=cotangents), torch.tensor(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda v: "-".join(map(str, v[:9])))
def test_packed_rows(lengths, num_layers, bidirectional, dtype):
    options = dict(num_layers=num_layers, bidirectional=bidirectional)
    case, sizes = packed_case(lengths, **options, dtype=dtype)

    def torch_lstm(x, h0, c0, *params):
        return torch.lstm(x, sizes, (h0, c0), params, True, num_layers, 0.0, False, bidirectional)

    assert_matches(
        case.functional(functional.lstm, batch_sizes=sizes),
        case.functional(rnn.lstm, batch_sizes=sizes.tolist()),
        torch_lstm,
        case.inputs,
        case.cotangents,
        names=case.names,
        what=f"packed {lengths} {options}",
    )


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
def test_wrong_batch_sizes_are_refused(sizes, kind):
    case, right = packed_case([3, 3, 2])
    assert right.tolist() == [3, 3, 2]
    with pytest.raises(kind, match=r"fastseq\.lstm: expected .*(batch_sizes|hx).* got"):
        case.functional(functional.lstm, batch_sizes=torch.tensor(sizes))(*case.inputs.values())


def test_a_long_sequence():
    check(lstm_case(2000, 2, 3, 5))


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1], OPTIONS[13]], ids=str)
def test_gradcheck(options):
    case = lstm_case(3, 2, 2, 3, **options, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    assert torch.autograd.gradcheck(case.functional(functional.lstm), leaves)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_gradgradcheck(options):
    case = lstm_case(2, 1, 2, 2, **options, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    assert torch.autograd.gradgradcheck(case.functional(functional.lstm), leaves)


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


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_dropout_draws_what_torch_draws(p, bidirectional):
    case = lstm_case(6, 5, 4, 8, num_layers=3, dropout=p, bidirectional=bidirectional)

    def seeded(lstm):
        def call(*inputs):
            torch.manual_seed(7)
            return lstm(*inputs)

        return call

    found = assert_matches(
        seeded(case.functional(functional.lstm, train=True)),
        seeded(case.functional(rnn.lstm, train=True)),
        seeded(case.module(torch.nn.LSTM)),
        case.inputs,
        case.cotangents,
        names=case.names,
    )
    ours = torch.get_rng_state()
    seeded(case.module(torch.nn.LSTM))(*case.inputs.values())
    assert torch.equal(ours, torch.get_rng_state())
    calm = case.functional(functional.lstm)(*case.inputs.values())[0]
    assert not torch.equal(calm, found["y"])


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
}


@pytest.mark.parametrize("name", SPECIALS)
def test_special_values_as_in_the_reference(name):
    which, change = SPECIALS[name]
    for hidden in (7, 16, 21):
        case = lstm_case(5, 3, 4, hidden).map(torch.clone)
        change(case.inputs[which])
        assert_matches(
            case.functional(functional.lstm),
            case.functional(rnn.lstm),
            case.module(torch.nn.LSTM),
            case.inputs,
            names=case.names,
            what=name,
        )


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


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_into_one_graph(backend):
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    # Each kernel that inductor generates is a run of the C++ compiler: few of them will do.
    options = {} if backend == "inductor" else dict(num_layers=2, bidirectional=True)
    case = lstm_case(3, 2, 4, 5, **options)
    fn = case.functional(functional.lstm)
    compiled = torch.compile(fn, backend=backend, fullgraph=True)
    run = dict(inputs=case.inputs, cotangents=case.cotangents, names=case.names)
    eager = run_with_grads(fn, **run)
    # The compiler's cache on disk does not see that an op's schema has changed since.
    with torch.compiler.config.patch(force_disable_caches=True):
        found = run_with_grads(compiled, **run)
    exact = case.to(torch.float64)
    truth = run_with_grads(
        exact.functional(rnn.lstm), exact.inputs, exact.cotangents, names=case.names
    )
    assert_results_close(found, truth, eager)
