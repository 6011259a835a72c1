"""The oracle itself: against torch, and by hand where torch has none."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.reference import rnn
from fastseq.testing import assert_close_to_reference, assert_matches, edge_sizes, recurrent_case

TORCH = {
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
    "rnn_tanh": torch.nn.RNN,
    "rnn_relu": torch.nn.RNN,
}
OWN = [cell for cell in rnn.CELLS if cell not in TORCH]
# Cells with every choice of projection they have.
PROJECTED = [(cell, p) for cell, kind in rnn.CELLS.items() for p in (0, 2)[: kind.states]]
F64 = dict(dtype=torch.float64)
OPTIONS = [
    dict(num_layers=layers, bidirectional=both, bias=bias, batch_first=first, hx=hx)
    for layers, both, bias, first, hx in itertools.product((1, 3), *[(False, True)] * 4)
]


def check(case, expected, fn=None, **options) -> None:
    """The reference against ``expected``, both in float64: outputs and every gradient."""
    assert case.inputs["x"].dtype == torch.float64
    fn = fn or case.reference()
    named = dict(names=case.names, what=str(case)) | options
    assert_matches(fn, expected, None, case.inputs, case.cotangents, **named)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("cell,proj_size", [c for c in PROJECTED if c[0] in TORCH])
def test_is_torchs(cell, proj_size, options):
    case = recurrent_case(cell, 4, 3, 2, 5, proj_size=proj_size, **options, **F64)
    check(case, case.module(TORCH[cell]))


@pytest.mark.parametrize("cell,proj_size", [c for c in PROJECTED if c[0] in TORCH])
def test_is_torchs_at_every_size(cell, proj_size):
    edges = edge_sizes(4)
    sizes = [(t, 2, 3, 4) for t in edges] + [(2, b, 3, 4) for b in (0, *edges)]
    sizes += [(3, 2, i, h) for i, h in zip(edges, reversed(edges), strict=True) if h > proj_size]
    for seed, size in enumerate(sizes):
        case = recurrent_case(
            cell, *size, proj_size=proj_size, bidirectional=seed % 2 == 1, seed=seed, **F64
        )
        check(case, case.module(TORCH[cell]))


@pytest.mark.parametrize("scale", [10, 30])
@pytest.mark.parametrize("cell", [cell for cell in TORCH if cell != "rnn_relu"])
def test_is_torchs_where_gates_saturate(cell, scale):
    case = recurrent_case(cell, 6, 4, 3, 5, scale=scale, **F64)
    check(case, case.module(TORCH[cell]))


@pytest.mark.parametrize("cell,fn", [("lstm", rnn.lstm), ("gru", rnn.gru)])
def test_named_functions_are_the_general_one(cell, fn):
    case = recurrent_case(cell, 4, 3, 2, 5, num_layers=2, batch_first=True, **F64)
    check(case, case.module(TORCH[cell]), case.functional(fn))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_rnn_takes_torchs_nonlinearities(nonlinearity):
    case = recurrent_case(f"rnn_{nonlinearity}", 4, 3, 2, 5, bidirectional=True, **F64)
    check(case, case.module(torch.nn.RNN), case.functional(rnn.rnn))
    with pytest.raises(ValueError, match="expected nonlinearity 'tanh' or 'relu', got 'sine'"):
        rnn.rnn(torch.zeros(1, 1, 1), None, [torch.zeros(1, 1)] * 4, nonlinearity="sine")


@pytest.mark.parametrize("cell", TORCH)
@pytest.mark.parametrize("packed", [False, True])
def test_dropout_is_torchs(cell, packed):
    """From the same place in torch's stream of random numbers, the same elements fall out."""
    options = dict(num_layers=3, bidirectional=True, dropout=0.4, **F64)
    case = recurrent_case(cell, 4, 3, 5, 6, lengths=[2, 4, 1] if packed else None, **options)
    case = case.packed() if packed else case

    def seeded(fn):
        def call(*inputs):
            torch.manual_seed(1)
            return fn(*inputs)

        return call

    expected = case.module(TORCH[cell])
    check(case, seeded(expected), seeded(case.reference(train=True)))
    with pytest.raises(AssertionError):
        check(case, seeded(expected), seeded(case.reference(train=False)))


LENGTHS = [[1], [3, 1, 2], [5, 5, 5], [7, 1, 5, 5, 2], [1 + row * 5 % 9 for row in range(13)]]


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("cell,proj_size", [c for c in PROJECTED if c[0] in TORCH])
def test_packed_rows_are_torchs(cell, proj_size, lengths):
    for seed, options in enumerate(OPTIONS[::3]):
        size = (max(lengths), len(lengths), 3, 4)
        case = recurrent_case(
            cell, *size, proj_size=proj_size, lengths=lengths, seed=seed, **options, **F64
        ).packed()
        check(case, case.module(TORCH[cell]))


def torch_over_padding(case):
    """torch's module over rows packed in any order, and padded again."""
    module, names = TORCH[case.cell](**case.options).double(), list(case.inputs)
    lengths, first = case.keywords["lengths"], case.options["batch_first"]

    def call(*inputs):
        values = dict(zip(names, inputs, strict=True))
        x = values.pop("x")
        hx = [values.pop(name) for name in ("h0", "c0") if name in values]
        hx = None if not hx else hx[0] if len(hx) == 1 else tuple(hx)
        rows = pack_padded_sequence(x, lengths, first, enforce_sorted=False)
        y, state = torch.func.functional_call(module, values, (rows, hx))
        return pad_packed_sequence(y, first, total_length=x.shape[1 if first else 0])[0], state

    return call


@pytest.mark.parametrize("cell,proj_size", [c for c in PROJECTED if c[0] in TORCH])
def test_lengths_are_torchs_unsorted_packing(cell, proj_size):
    for options in OPTIONS:
        case = recurrent_case(
            cell, 6, 5, 3, 4, proj_size=proj_size, lengths=[2, 5, 1, 5, 3], **options, **F64
        )
        check(case, torch_over_padding(case))


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def dot(row, vector) -> float:
    return sum(float(a) * float(b) for a, b in zip(row, vector, strict=True))


def normalised(values: list[float], gain, bias=None) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / len(values)
    scale = 1 / math.sqrt(variance + 1e-5)
    bias = [0.0] * len(values) if bias is None else bias
    terms = zip(values, gain, bias, strict=True)
    return [(v - mean) * scale * float(g) + float(b) for v, g, b in terms]


def by_hand(cell: str, x, h, c, weights) -> tuple[list[float], list[float]]:
    """One step of one row, unit by unit, in Python's own floats."""
    w_ih, w_hh, b_ih, b_hh, *own = weights
    H = len(c)
    from_x, from_h = [dot(row, x) for row in w_ih], [dot(row, h) for row in w_hh]
    if cell == "layer_norm_lstm":
        from_x, from_h = normalised(from_x, own[0]), normalised(from_h, own[1])
    gates = [sum(map(float, terms)) for terms in zip(from_x, from_h, b_ih, b_hh, strict=True)]
    new_h, new_c = [], []
    for unit in range(H):
        i, f, g, o = (gates[k * H + unit] for k in range(4))
        old = float(c[unit])
        if cell == "peephole_lstm":
            i += float(own[0][0, unit]) * old
            f += float(own[0][1, unit]) * old
        new = sigmoid(f) * old + sigmoid(i) * math.tanh(g)
        if cell == "peephole_lstm":
            o += float(own[0][2, unit]) * new
        new_c.append(new)
        new_h.append(sigmoid(o))
    squashed = normalised(new_c, own[2], own[3]) if cell == "layer_norm_lstm" else new_c
    return [o * math.tanh(v) for o, v in zip(new_h, squashed, strict=True)], new_c


@pytest.mark.parametrize("cell", ["lstm", *OWN])
def test_steps_by_hand(cell):
    for H in (1, 2, 5):
        case = recurrent_case(cell, 1, 3, 4, H, scale=2, **F64)
        x, h, c = case.inputs["x"][0], case.inputs["h0"][0], case.inputs["c0"][0]
        weights = case.weights()
        rows = [by_hand(cell, x[b], h[b], c[b], weights) for b in range(3)]
        expected = zip(*rows, strict=True)
        for found, values in zip(rnn.step(cell, x, (h, c), weights), expected, strict=True):
            assert_close_to_reference(found, torch.tensor(values, **F64), terms=4 * H)


def test_peephole_by_fixed_numbers():
    """Graves 2013, equations 7-11, worked out on paper for one unit without input or recurrence."""
    zero, states = torch.zeros(4, 1, **F64), (torch.zeros(1, 1, **F64), torch.ones(1, 1, **F64))
    b = torch.tensor([0.0, 0.0, math.inf, 0.0], **F64)  # tanh(g) is 1
    ln3 = math.log(3)  # whose sigmoid is 3/4
    weights = (zero, zero, b, None, torch.tensor([[-ln3], [ln3], [ln3]], **F64))
    h, c = rnn.step("peephole_lstm", torch.zeros(1, 1, **F64), states, weights)
    # f = 3/4, i = 1/4, so c = 3/4 + 1/4 = 1 and o = sigmoid(ln 3 * 1) = 3/4.
    assert_close_to_reference(c, torch.tensor([[1.0]], **F64))
    assert_close_to_reference(h, torch.tensor([[0.75 * math.tanh(1)]], **F64))


def test_zoneout_by_hand():
    """One unit of one row: h is made of the c that is not mixed yet."""
    case = recurrent_case("lstm", 1, 1, 2, 1, **F64)
    x, h, c = case.inputs["x"][0], case.inputs["h0"][0], case.inputs["c0"][0]
    weights = case.weights()
    (new_h,), (new_c,) = by_hand("lstm", x[0], h[0], c[0], weights)
    keep = torch.tensor(0.25, **F64), torch.tensor(0.5, **F64)
    y, h_n, c_n = rnn.layer("lstm", x[None], (h, c), weights, zoneout=keep)
    expected_h = 0.25 * float(h) + 0.75 * new_h
    expected_c = 0.5 * float(c) + 0.5 * new_c
    assert_close_to_reference(h_n, torch.tensor([[expected_h]], **F64))
    assert_close_to_reference(c_n, torch.tensor([[expected_c]], **F64))
    assert torch.equal(y[0], h_n)


def test_peepholes_of_zero_are_an_lstm():
    case = recurrent_case("peephole_lstm", 5, 3, 4, 6, num_layers=2, bidirectional=True, **F64)
    names = [name for name in case.inputs if "peephole" in name]
    case = case.map(torch.zeros_like, *names)
    plain = recurrent_case("lstm", 5, 3, 4, 6, num_layers=2, bidirectional=True, **F64)
    module = plain.module(torch.nn.LSTM)

    def lstm(*inputs):
        return module(*(t for n, t in zip(case.inputs, inputs, strict=True) if n not in names))

    check(case, lstm, wrt=[n for n in case.inputs if n not in names])


def test_layer_norm_lstm_from_torchs_modules():
    """Ba et al., equations 20-22, of torch.nn.LayerNorm; and its units' order is torch's."""
    case = recurrent_case("layer_norm_lstm", 4, 3, 5, 6, **F64)

    def run(x, h0, c0, w_ih, w_hh, b_ih, b_hh, gain_ih, gain_hh, gain_c, bias_c):
        norms = {n: torch.nn.LayerNorm(n, elementwise_affine=False, **F64) for n in (24, 6)}
        h, c, ys = h0[0], c0[0], []
        for x_t in x:
            by_x, by_h = norms[24](x_t @ w_ih.T) * gain_ih, norms[24](h @ w_hh.T) * gain_hh
            gates = (by_x + by_h + b_ih + b_hh).view(-1, 4, 6)
            c = gates[:, 1].sigmoid() * c + gates[:, 0].sigmoid() * gates[:, 2].tanh()
            h = gates[:, 3].sigmoid() * (norms[6](c) * gain_c + bias_c).tanh()
            ys.append(h)
        return torch.stack(ys), h[None], c[None]

    check(case, run)


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_third_derivative(cell):
    case = recurrent_case(cell, 2, 1, 1, 2, **F64)
    leaves = [t.requires_grad_() for t in case.inputs.values()]

    def gradient(*inputs):
        y, *_ = case.reference()(*inputs)
        return torch.autograd.grad(y.square().sum(), inputs[0], create_graph=True)

    assert torch.autograd.gradgradcheck(gradient, leaves)


def test_second_derivative_in_forward_mode():
    """Of LayerNorm's cell, along one direction, against that through two backward passes."""
    case = recurrent_case("layer_norm_lstm", 3, 2, 4, 3, **F64)
    x, *rest = case.inputs.values()
    direction = x.cos()

    def run(x):
        return case.reference()(x, *rest)[0].square().sum()

    def along(x):
        return torch.func.jvp(run, (x,), (direction,))[1]

    def slope(x):
        return (torch.func.grad(run)(x) * direction).sum()

    twice = torch.func.jvp(along, (x,), (direction,))[1]
    backward = (torch.func.grad(slope)(x) * direction).sum()
    assert_close_to_reference(twice, backward)


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_vmap_over_models(cell):
    options = dict(num_layers=2, bidirectional=True, lengths=[2, 4, 0], resets=0.3, **F64)
    case = recurrent_case(cell, 4, 3, 2, 5, **options)
    models = [case, case.map(lambda t: t * 1.1)]
    stacked = [torch.stack(pair) for pair in zip(*(m.inputs.values() for m in models), strict=True)]
    found = torch.func.vmap(case.reference())(*stacked)
    for k, model in enumerate(models):
        for together, alone in zip(found, model.reference()(*model.inputs.values()), strict=True):
            assert_close_to_reference(together[k], alone)


@pytest.mark.parametrize("hx", [False, True])
@pytest.mark.parametrize("how", ["no steps", "no lengths", "no rows"])
@pytest.mark.parametrize("cell,proj_size", PROJECTED)
def test_nothing_to_run_hands_the_state_through(cell, proj_size, how, hx):
    """Every gradient is there, zero for whatever had no part."""
    T, B = {"no steps": (0, 3), "no lengths": (4, 3), "no rows": (4, 0)}[how]
    lengths = [0] * B if how == "no lengths" else None
    case = recurrent_case(
        cell, T, B, 2, 4, proj_size=proj_size, hx=hx, lengths=lengths, num_layers=2, **F64
    )
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    outputs = case.reference()(*leaves)
    assert [o.shape for o in outputs] == [c.shape for c in case.cotangents]
    assert not outputs[0].any()
    pairs = [(o, c) for o, c in zip(outputs, case.cotangents, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], leaves, [c for _, c in pairs])
    grads = dict(zip(case.inputs, grads, strict=True))
    for name, output, cotangent in zip(
        ("h0", "c0"), outputs[1:], case.cotangents[1:], strict=False
    ):
        if hx:
            assert torch.equal(output, case.inputs[name])
            assert torch.equal(grads.pop(name), cotangent)
        else:
            assert not output.any()
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("cell", rnn.CELLS)
def test_every_dtype_stays_what_it_is(cell, dtype):
    options = dict(bidirectional=True, lengths="random", resets=0.2, dtype=dtype)
    case = recurrent_case(cell, 5, 3, 4, 6, **options)
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    outputs = case.reference()(*leaves)
    grads = torch.autograd.grad(outputs, leaves, case.cotangents)
    assert {t.dtype for t in (*outputs, *grads)} == {dtype}
    assert all(t.isfinite().all() for t in (*outputs, *grads))


@pytest.mark.parametrize("cell", OWN)
def test_without_biases_as_with_biases_of_zero(cell):
    options = dict(num_layers=2, bidirectional=True, **F64)
    case = recurrent_case(cell, 4, 3, 5, 6, bias=False, **options)
    biased = recurrent_case(cell, 4, 3, 5, 6, **options).map(torch.zeros_like)

    def with_zeros(*inputs):
        values = biased.inputs | dict(zip(case.inputs, inputs, strict=True))
        return biased.reference()(*values.values())

    check(case, with_zeros)


X, STATE, WEIGHTS = (
    torch.zeros(3, 2, 4),
    torch.zeros(2, 5),
    [torch.zeros(20, 4), torch.zeros(20, 5)],
)
WEIGHTS += [None, None]
NO_CUTS = torch.zeros(3, 2, dtype=torch.bool)


@pytest.mark.parametrize(
    "error,said,cell,keywords",
    [
        (ValueError, r"cell to be one of lstm, .*, got 'lstn'", "lstn", {}),
        (ValueError, r"w_hh, b_ih, b_hh, weight_peephole .*got 4 w", "peephole_lstm", {}),
        (ValueError, r"x of shape \[N, I\], got \[3, 2, 4\]", "lstm", dict(batch_sizes=[2, 1])),
        (TypeError, r"lengths of int64, got .*int32", "lstm", dict(lengths=torch.ones(2).int())),
        (ValueError, r"lengths of shape \[B\] = \[2\], got \[1\]", "lstm", dict(lengths=[3])),
        (ValueError, r"lengths from 0 to T = 3, got \[1, 4\]", "lstm", dict(lengths=[1, 4])),
        (ValueError, r"lengths from 0 to T = 3, got \[-1, 3\]", "lstm", dict(lengths=[-1, 3])),
        (TypeError, r"resets of bool, got .*int64", "lstm", dict(resets=NO_CUTS.long())),
        (ValueError, r"\[T, B\] = \[3, 2\], got \[2, 3\]", "lstm", dict(resets=NO_CUTS.T)),
        (ValueError, r"each of 2 states in zoneout, got 1", "lstm", dict(zoneout=(None,))),
    ],
)
def test_bad_arguments_are_refused(error, said, cell, keywords):
    if isinstance(keywords.get("lengths"), list):
        keywords = {"lengths": torch.tensor(keywords["lengths"])}
    with pytest.raises(error, match=f"^fastseq.reference.rnn: expected .*{said}"):
        rnn.layer(cell, X, (STATE, STATE), WEIGHTS, **keywords)


def test_lengths_and_batch_sizes_exclude_each_other():
    with pytest.raises(ValueError, match="expected lengths or batch_sizes, got both"):
        rnn.layer("lstm", X[0], None, WEIGHTS, batch_sizes=[2], lengths=torch.ones(2).long())


def test_params_that_do_not_share_out_are_refused():
    with pytest.raises(ValueError, match="for each of 2 layers and 1 directions, got 5"):
        rnn.lstm(X, None, [torch.zeros(1)] * 5, num_layers=2)
