"""The GPU's decoder loop on CPU tensors, its steps run on the host; and what its graphs keep."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastseq import _native, functional
from fastseq.ops import attention_plain, decoder_cuda
from fastseq.ops import decoder as op
from fastseq.ops.graphs import Replayed
from fastseq.reference import decoder as reference
from fastseq.testing import assert_close_to_reference, run_with_grads
from fastseq.testing_decoder import decoder_case
from tests import test_functional_decoder as on_cpu
from tests.cuda.on_host import COMPILER, load, on_host

if not _native.loaded():
    pytest.skip(str(_native.why_not_loaded()), allow_module_level=True)
if COMPILER is None:
    pytest.skip("no C++ compiler to build them for the host", allow_module_level=True)


def stand_in(function, inputs):
    """A capture without a device: what is not made anew by a replay is no number."""
    outputs = function(*inputs)
    for tensor in outputs:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    def replay():
        for held, fresh in zip(outputs, function(*inputs), strict=True):
            held.copy_(fresh)

    return replay, outputs


@pytest.fixture(autouse=True)
def loop(monkeypatch):
    load()
    for name in ("forward", "backward"):
        function = getattr(decoder_cuda, f"_{name}")
        monkeypatch.setitem(decoder_cuda.GRAPHS, name, Replayed(function, capture=stand_in))
    monkeypatch.setattr(op, "attention_decoder_fwd", decoder_cuda.forward)
    monkeypatch.setattr(op, "attention_decoder_bwd", decoder_cuda.backward)
    with on_host(layers=False):
        yield


CASES = [
    dict(cell="lstm"),
    dict(cell="gru", L=2),
    dict(cell="rnn_tanh", L=3, residual=True),
    dict(cell="lstm", L=2, residual=True, bias=False),
    dict(cell="gru", H=7, K=None, score="dot"),
    dict(cell="rnn_relu", tokens=True),
]


@pytest.mark.parametrize("order", on_cpu.ORDERS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", on_cpu.DTYPES)
def test_against_the_reference(order, masked, dtype):
    dtype = on_cpu.DTYPES[dtype]
    for options in CASES:
        on_cpu.check(decoder_case(masked=masked, dtype=dtype, **options, **on_cpu.ORDERS[order]))


@pytest.mark.parametrize("order", on_cpu.ORDERS)
def test_sizes(order):
    for letter, n in itertools.product("TBSEHKC", (1, 9)):
        on_cpu.check(decoder_case("lstm", masked=True, **{letter: n}, **on_cpu.ORDERS[order]))
    for size in ({"B": 0}, {"S": 0}, {"E": 0}, {"C": 0}):
        on_cpu.check(decoder_case("gru", **size, **on_cpu.ORDERS[order]))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("order", on_cpu.ORDERS)
def test_likeliest_tokens_are_fed_back(order, cell):
    for forced in on_cpu.FORCED:
        on_cpu.test_likeliest_tokens_are_fed_back(order=order, cell=cell, forced=forced)


@pytest.mark.parametrize(
    "test",
    [
        on_cpu.test_no_steps,
        on_cpu.test_no_biases_and_given_states_of_every_kind,
        on_cpu.test_first_of_equal_tokens_is_likeliest,
        on_cpu.test_tokens_that_are_never_fed_may_be_anything,
        on_cpu.test_lengths_are_masks,
        on_cpu.test_strides_do_not_matter,
        on_cpu.test_only_gradients_that_are_wanted,
        on_cpu.test_gradients_of_some_outputs_only,
    ],
)
def test_as_on_the_cpu(test):
    test()


@pytest.mark.parametrize("order", on_cpu.ORDERS)
@pytest.mark.parametrize("forced", [(True,) * 4, (True, False, True, False, False)])
def test_an_output_layer_that_reads_the_input_too_and_dropout(order, forced):
    on_cpu.test_an_output_layer_that_reads_the_input_too_and_dropout(order, forced, "f32")


@pytest.mark.parametrize("order", on_cpu.ORDERS)
@torch.no_grad()
def test_a_sequence_stops_at_its_end_token(order):
    case = decoder_case(
        T=12, B=6, V=4, L=2, forced=(True, *[False] * 12), dtype=torch.float64,
        **on_cpu.ORDERS[order],
    )  # fmt: skip
    whole = case.run(functional)
    end_token, ended = int(whole.tokens[0, 3]), 0
    decoded = case.run(functional, end_token=end_token)
    for b, row in enumerate(whole.tokens.tolist()):
        end = next((t for t in range(1, 13) if row[t] == end_token), 12)
        ended += end < 12
        assert decoded.tokens[b].tolist() == row[: end + 1] + [end_token] * (12 - end)
        assert torch.equal(decoded.features[b, :end], whole.features[b, :end])
        assert not decoded.features[b, end:].any() and not decoded.weights[b, end:].any()
        if end < 12:
            shorter = case.run(reference, tokens=whole.tokens[:, :end], forced=(True,) * end)
            for state, expected in zip(decoded.states, shorter[1], strict=True):
                assert_close_to_reference(state[:, b], expected[:, b], what="state", terms=500)
    assert 0 < ended


@pytest.mark.parametrize("order", on_cpu.ORDERS)
def test_double_backward(order):
    on_cpu.test_double_backward(order)


def test_what_is_kept_is_as_long_as_said():
    """Compiled graphs know the size from the fake."""
    for options, order in itertools.product(CASES, on_cpu.ORDERS.values()):
        case = decoder_case(**options, **order)
        leaves = [t.requires_grad_() for t in case.inputs.values()]
        features, *_ = case.function(functional)(*leaves)
        saved = features.grad_fn.saved_tensors[2]
        b = case.inputs
        layers = [t for name, t in b.items() if name[:4] in ("weig", "bias")]
        said = op._saved_size(
            op.DECODER_CELLS[case.options["cell"]].number, 4, b["h0"], b["keys"], b["values"],
            layers, b.get("query_weight"), b.get("combine_weight"), case.options["residual"],
        )  # fmt: skip
        assert saved.numel() == said


@pytest.mark.parametrize("order", on_cpu.ORDERS)
def test_without_triton_the_loop_scores_in_plain_pytorch(monkeypatch, order):
    """As a GPU's operators do where Triton has no compiler: see tests/kernels/test_options.py."""

    def attention(self, stage, query, *rest, first=()):
        score, more = ("dot", ()) if self.v is None else ("additive", (self.v, None))
        plain = getattr(attention_plain, f"{score}_{stage}")
        return plain(*first, query, self.keys, self.values, *more, *rest)

    monkeypatch.setattr(decoder_cuda._Decoder, "attention", attention)
    for options in (dict(cell="gru", L=2), dict(K=None, H=7, score="dot")):
        on_cpu.check(decoder_case(masked=True, **options, **on_cpu.ORDERS[order]))


def bits(case):
    return run_with_grads(case.function(functional), case.inputs, case.cotangents, names=case.names)


def test_a_graph_from_the_second_call_on():
    graphs = decoder_cuda.GRAPHS
    for seed in range(4):
        case = decoder_case("gru", masked=True, seed=seed)
        found = bits(case)
        assert len(graphs["forward"]) == len(graphs["backward"]) == (seed > 0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fastseq.ops.graphs._inside_a_capture", lambda arguments: True)
            expected = bits(case)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_results_are_their_own():
    """What a call gave stays when the next one replays the same graph."""
    first = decoder_case(seed=1)
    bits(first)
    kept = bits(first)
    copies = {name: tensor.clone() for name, tensor in kept.items()}
    bits(decoder_case(seed=2))
    assert all(torch.equal(kept[name], tensor) for name, tensor in copies.items())
