"""The decoder with attention against its reference: values, gradients, forcing, errors."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

import fastseq
from fastseq import _native, functional
from fastseq.reference import decoder as reference
from fastseq.testing import assert_close_to_reference, assert_matches, edge_sizes, run_with_grads
from fastseq.testing_decoder import DecoderCase, decoder_case

CELLS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
ORDERS = {
    "before": {},
    "after": {"after": True},
    "feeding": {"after": True, "feeds": True},
}
DTYPES = {"f32": torch.float32, "f64": torch.float64}


def check(case: DecoderCase) -> None:
    """The function against the reference, with the reference in the same dtype as yardstick."""
    ours, oracle = case.function(functional), case.function(reference)
    where = dict(names=case.names, what=str(case))
    if case.inputs["values"].dtype != torch.float64:
        assert_matches(ours, oracle, oracle, case.inputs, case.cotangents, **where)
        return
    truth = run_with_grads(oracle, case.inputs, case.cotangents, names=case.names)
    got = run_with_grads(ours, case.inputs, case.cotangents, names=case.names)
    for name, tensor in got.items():
        assert_close_to_reference(tensor, truth[name], what=f"{case} {name}", terms=case.terms)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cell_order_and_score(cell, order, masked, dtype):
    options = {"masked": masked, "dtype": DTYPES[dtype], **ORDERS[order]}
    for score, K, L, residual in itertools.product(
        ("additive", "dot"), (7, None), (1, 2, 3), (False, True)
    ):
        if residual and L == 1:
            continue
        check(decoder_case(cell, score=score, K=K, L=L, residual=residual, **options))


def sizes() -> list[dict]:
    """Each extent alone through its edges."""
    edges = edge_sizes(8, 16)
    grid = [{"T": n} for n in (1, 2, 17)] + [{"B": n} for n in (0, 1, 2, 13, 25)]
    grid += [{letter: n} for letter in "SEHKC" for n in (1, *edges, 67)]
    grid += [{"S": 0}, {"C": 0}, {"E": 0}, {"A": 1}, {"A": 37}]
    return [*grid, {"T": 9, "B": 26, "S": 21, "E": 33, "H": 130, "K": 65, "C": 70, "A": 90}]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_sizes(cell, order):
    for size in sizes():
        check(decoder_case(cell, masked=size.get("S") != 0, **size, **ORDERS[order]))


@pytest.mark.parametrize("seed", range(4))
def test_random_calls(seed):
    """Every option and extent at once, drawn; the message names the call."""
    draw = random.Random(seed)
    for number in range(12):
        some = {name: draw.choice((1, 2, 3, 5, 8, 15, 17, 33)) for name in "TBSEHCA"}
        order, L = draw.choice(list(ORDERS)), draw.choice((1, 1, 2, 3))
        options = dict(
            K=draw.choice((None, 1, 7, 16, 40)), L=L, score=draw.choice(("additive", "dot")),
            residual=draw.random() < 0.3, bias=draw.random() < 0.8, masked=draw.random() < 0.5,
            scale=draw.choice((0.3, 1.0)), seed=100 * seed + number, **some, **ORDERS[order],
        )  # fmt: skip
        if draw.random() < 0.5:
            options["forced"] = (True, *(draw.random() < 0.5 for _ in range(some["T"] - 1)))
        check(decoder_case(draw.choice(CELLS), dtype=torch.float64, **options))


def test_no_biases_and_given_states_of_every_kind():
    for order in ORDERS.values():
        check(decoder_case("gru", bias=False, **order))


def test_no_steps():
    case = decoder_case(T=0)
    decoded = case.run(functional)
    assert decoded.features.shape == (3, 0, 10) and decoded.weights.shape == (3, 0, 5)
    assert torch.equal(decoded.states[0], case.inputs["h0"])
    assert torch.equal(decoded.states[1], case.inputs["c0"])


FORCED = [
    (True, True, True, True),
    (True, False, False, False),
    (True, False, True, True),
    (True, True, False, True, False),
]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("forced", FORCED, ids=lambda f: "".join("ny"[c] for c in f))
def test_likeliest_tokens_are_fed_back(cell, order, forced):
    case = decoder_case(cell, forced=forced, masked=True, dtype=torch.float64, **ORDERS[order])
    check(case)
    fed, expected = case.run(functional).tokens, case.run(reference)[3]
    assert fed.shape == (3, len(forced))
    assert torch.equal(fed, expected)
    assert not torch.equal(fed[:, :4], case.options["tokens"]) or all(forced)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("forced", FORCED, ids=lambda f: "".join("ny"[c] for c in f))
def test_an_output_layer_that_reads_the_input_too_and_dropout(order, forced, dtype):
    case = decoder_case(forced=forced, masked=True, dtype=torch.float64, **ORDERS[order])
    weight, bias = case.options["output"]
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=DTYPES[dtype])

    wide = normal(7, weight.shape[1] + 3)
    case = case.to(DTYPES[dtype])
    plain, changed = case.run(functional).tokens, False
    for options in (
        {"output": (wide, bias)},
        {"input_factor": 2 * normal(3, 4, 3)},
        {"output_factor": normal(3, 4, weight.shape[1])},
        {"output": (wide, bias), "input_factor": normal(3, 4, 3)}
        | {"output_factor": normal(3, 4, wide.shape[1])},
    ):
        given = {"output": (weight, bias), "input_factor": None, "output_factor": None}
        case.options.update(given | options)
        check(case)
        fed = case.run(functional).tokens
        assert torch.equal(fed, case.run(reference)[3])
        changed |= not torch.equal(fed, plain)
    assert changed != all(forced)


@pytest.mark.parametrize("V", [1, 5, 6, 7, 47, 1000])
@pytest.mark.parametrize("B", [1, 4, 9])
def test_likeliest_token_of_any_vocabulary(V, B):
    case = decoder_case(B=B, V=V, forced=(True, *[False] * 4), dtype=torch.float64)
    assert torch.equal(case.run(functional).tokens, case.run(reference)[3])


def test_first_of_equal_tokens_is_likeliest():
    case = decoder_case(forced=(True, False, False, False))
    weight, bias = case.options["output"]
    decoded = case.run(functional, output=(torch.zeros_like(weight), torch.zeros_like(bias)))
    assert torch.equal(decoded.tokens[:, 1:], torch.zeros(3, 3, dtype=torch.int64))


def test_tokens_that_are_never_fed_may_be_anything():
    case = decoder_case(forced=(True, False, False, True))
    tokens = case.options["tokens"].clone()
    tokens[:, 1:3] = -100
    expected = case.run(functional)
    assert torch.equal(case.run(functional, tokens=tokens).features, expected.features)


@torch.no_grad()
def test_a_sequence_stops_at_its_end_token():
    case = decoder_case(T=12, B=6, V=4, forced=(True, *[False] * 12))
    whole = case.run(functional)
    end_token = int(whole.tokens[0, 3])
    decoded = case.run(functional, end_token=end_token)
    ended = 0
    for b in range(6):
        row = whole.tokens[b].tolist()
        end = next((t for t in range(1, 13) if row[t] == end_token), 12)
        ended += end < 12
        assert decoded.tokens[b, : end + 1].tolist() == row[: end + 1]
        assert torch.equal(decoded.features[b, :end], whole.features[b, :end])
        assert (decoded.tokens[b, end + 1 :] == end_token).all()
        assert not decoded.features[b, end:].any() and not decoded.weights[b, end:].any()
        if end < 12:
            shorter = case.run(
                functional, tokens=whole.tokens[:, :end], forced=(True,) * end, end_token=None
            )
            for state, expected in zip(decoded.states, shorter.states, strict=True):
                assert torch.equal(state[:, b], expected[:, b])
    assert 0 < ended


def test_lengths_are_masks():
    case = decoder_case()
    lengths = torch.tensor([5, 0, 2])
    mask = torch.arange(5) < lengths[:, None]
    by_length = case.run(functional, lengths=lengths)
    for got, expected in zip(by_length, case.run(functional, mask=mask), strict=True):
        if isinstance(got, tuple):
            assert all(map(torch.equal, got, expected))
        else:
            assert got is expected is None or torch.equal(got, expected)
    assert not by_length.weights[1].any()


def test_strides_do_not_matter():
    case = decoder_case(B=3, T=4)
    expected = run_with_grads(case.function(functional), case.inputs, case.cotangents)
    strided = {n: t.mT.contiguous().mT if t.dim() > 1 else t for n, t in case.inputs.items()}
    got = run_with_grads(case.function(functional), strided, case.cotangents)
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


def test_only_gradients_that_are_wanted():
    case = decoder_case(after=True, feeds=True)
    everything = run_with_grads(case.function(functional), case.inputs, case.cotangents)
    for name in case.inputs:
        got = run_with_grads(case.function(functional), case.inputs, case.cotangents, wrt=[name])
        assert torch.equal(got[f"grad {name}"], everything[f"grad {name}"]), name


def test_gradients_of_some_outputs_only():
    case = decoder_case(dtype=torch.float64)
    for i, name in enumerate(case.names):
        only = [c if j == i else torch.zeros_like(c) for j, c in enumerate(case.cotangents)]
        expected = run_with_grads(case.function(reference), case.inputs, only)
        leaves = [t.requires_grad_() for t in case.to(torch.float64).inputs.values()]
        out = case.function(functional)(*leaves)[i]
        found = torch.autograd.grad(out, leaves, only[i], allow_unused=True)
        for wanted, grad in zip(case.inputs, found, strict=True):
            truth = expected[f"grad {wanted}"]
            grad = torch.zeros_like(truth) if grad is None else grad
            assert_close_to_reference(grad, truth, what=f"{name} by {wanted}", terms=500)


@pytest.mark.parametrize("order", ORDERS)
def test_double_backward(order):
    case = decoder_case(T=2, B=2, S=3, E=2, H=2, K=2, C=2, A=2, dtype=torch.float64,
                        **ORDERS[order])  # fmt: skip
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    assert torch.autograd.gradcheck(case.function(functional), leaves)
    assert torch.autograd.gradgradcheck(case.function(functional), leaves)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_are_computed_in_float32(dtype):
    case = decoder_case(dtype=dtype)
    got = run_with_grads(case.function(functional), case.inputs, case.cotangents)
    wide = case.to(torch.float32)
    expected = run_with_grads(wide.function(functional), wide.inputs, wide.cotangents)
    for name, tensor in got.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name].to(dtype)), name


def test_long_targets():
    case = decoder_case(T=700, B=2, H=9)
    check(case)


def test_forced_to_torch_it_is_the_reference():
    case = decoder_case()
    with fastseq.use_backend("torch"):
        got = case.run(functional)
    assert torch.equal(got.features, case.run(reference)[0])


BAD = {
    "cell": (dict(cell="peephole_lstm"), ValueError, "cell"),
    "params": (dict(cell="gru", hx=1), ValueError, "hx"),
    "keys": (dict(keys=torch.zeros(3, 5, 8)), ValueError, "query_weight"),
    "values": (dict(values=torch.zeros(2, 5, 4)), ValueError, "values"),
    "values dtype": (dict(values=torch.zeros(3, 5, 4).double()), TypeError, "dtype"),
    "v": (dict(v=torch.zeros(3)), ValueError, "v of shape"),
    "feeding": (dict(input_feeding=True), ValueError, "combine"),
    "mask shape": (dict(mask=torch.ones(3, 4, dtype=torch.bool)), ValueError, "mask"),
    "mask dtype": (dict(mask=torch.ones(3, 5)), TypeError, "mask"),
    "lengths": (dict(lengths=torch.tensor([1, 2, 6])), ValueError, "lengths between 0 and S = 5"),
    "lengths dtype": (dict(lengths=torch.ones(3)), TypeError, "lengths"),
    "tokens without table": (
        dict(input=torch.zeros(3, 4, dtype=torch.int64)),
        ValueError,
        "embedding",
    ),
    "token beyond": (
        dict(input=torch.full((3, 4), 7), embedding=torch.zeros(7, 3)),
        IndexError,
        "0..6",
    ),
    "negative token": (
        dict(input=torch.full((3, 4), -1), embedding=torch.zeros(7, 3)),
        IndexError,
        "0..6",
    ),
    "first not forced": (
        dict(
            input=torch.zeros(3, 4, dtype=torch.int64),
            embedding=torch.zeros(7, 3),
            forced=[False] * 4,
        ),
        ValueError,
        "first entry",
    ),
    "forced without tokens": (dict(forced=[True] * 4), ValueError, "tokens"),
    "end token with gradients": (dict(end_token=1), ValueError, "end_token"),
    "input factor without tokens": (dict(input_factor=torch.ones(3, 4, 3)), ValueError, "tokens"),
    "output factor alone": (dict(output_factor=torch.ones(3, 4, 10)), ValueError, "output beside"),
    "keys are no tensor": (dict(keys=None), TypeError, "keys"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    changes, error, said = BAD[name]
    case = decoder_case()
    i = dict(case.inputs)
    arguments = dict(
        input=i.pop("x"), hx=(i.pop("h0"), i.pop("c0")), keys=i.pop("keys"), values=i.pop("values"),
        query_weight=i.pop("query_weight"), v=i.pop("v"), params=list(i.values()),
    )  # fmt: skip
    arguments |= changes
    with pytest.raises(error, match=said):
        functional.attention_decoder(**arguments)


@pytest.mark.skipif(not _native.loaded(), reason="no native library")
class TestOp:
    """What the registered op promises."""

    def test_instruction_sets_agree(self):
        before = _native.isa()
        try:
            for cell, order in itertools.product(CELLS, ORDERS.values()):
                case = decoder_case(cell, H=37, K=19, C=21, masked=True, **order)
                oracle = case.function(reference)
                for isa in _native.available_isas():
                    _native.set_isa(isa)
                    assert_matches(
                        case.function(functional), oracle, oracle, case.inputs, case.cotangents,
                        names=case.names, what=f"{isa} {case}",
                    )  # fmt: skip
        finally:
            _native.set_isa(before)

    @pytest.mark.parametrize("order", ORDERS)
    def test_same_bits_for_any_number_of_threads(self, order):
        case = decoder_case("gru", T=9, B=21, H=70, K=40, C=50, S=31, masked=True, **ORDERS[order])
        results = []
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run_with_grads(case.function(functional), case.inputs, case.cotangents))
        for other in results[1:]:
            for name, tensor in results[0].items():
                assert torch.equal(tensor, other[name]), name

    @pytest.mark.parametrize("precision", ["high", "medium"])
    def test_float32_is_ieee_float32_under_every_switch(self, precision):
        case = decoder_case("gru", T=5, B=9, H=40, K=24, after=True)
        expected = run_with_grads(case.function(functional), case.inputs, case.cotangents)
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision(precision)
            got = run_with_grads(case.function(functional), case.inputs, case.cotangents)
        finally:
            torch.set_float32_matmul_precision(before)
        for name, tensor in expected.items():
            assert torch.equal(tensor, got[name]), name

    @pytest.mark.parametrize("order", ORDERS)
    def test_opcheck(self, order):
        from fastseq.ops import decoder as op

        case = decoder_case("lstm", L=2, residual=True, forced=(True, False, True, True),
                            **ORDERS[order])  # fmt: skip
        i = {name: t.requires_grad_() for name, t in case.inputs.items()}
        weights = [t for name, t in i.items() if name.startswith(("weight_", "bias_"))]
        arguments = (
            op.DECODER_CELLS["lstm"].number, None, case.options["tokens"], i["embedding"],
            torch.tensor(case.options["forced"]), i["h0"], i["c0"], i["keys"], i["values"], None,
            weights, True, i["query_weight"], i["v"], i.get("combine_weight"),
            i.get("combine_bias"), i.get("feed"), case.options["input_feeding"], True, 0.7,
            *(t.float() for t in case.options["output"]), None, None, -1, True,
        )  # fmt: skip
        torch.library.opcheck(op.attention_decoder_fwd, arguments)

    def test_compiles_whole(self):
        case = decoder_case(masked=True)
        compiled = torch.compile(case.function(functional), fullgraph=True, backend="aot_eager")
        expected = run_with_grads(case.function(functional), case.inputs, case.cotangents)
        got = run_with_grads(compiled, case.inputs, case.cotangents)
        for name, tensor in expected.items():
            assert torch.equal(tensor, got[name]), name


def test_autocast_lowers_every_argument():
    case = decoder_case(after=True, feeds=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = case.run(functional)
    expected = case.to(torch.bfloat16).run(functional)
    assert got.features.dtype == torch.bfloat16
    assert torch.equal(got.features, expected.features)
