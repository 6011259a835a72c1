"""The error budgets must let another order of summation pass and a real defect fail."""

from __future__ import annotations

import math

import pytest
import torch

from fastseq.reference import rnn
from fastseq.testing import (
    LAYOUTS,
    assert_close_to_reference,
    assert_matches,
    assert_results_close,
    edge_sizes,
    lstm_case,
    recurrent_case,
    run_with_grads,
    with_layout,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def matmul_in_blocks(a: torch.Tensor, b: torch.Tensor, block: int) -> torch.Tensor:
    """a [M, K] times b [K, N], the sum over K taken from the last block to the first."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=torch.promote_types(a.dtype, torch.float32))
    for k in reversed(range(0, a.shape[1], block)):
        total += a[:, k : k + block].to(total) @ b[k : k + block].to(total)
    return total.to(a.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows,cols", [(1, 1), (1, 2), (2, 2), (1, 8), (4, 4), (16, 33), (100, 64)])
@pytest.mark.parametrize("k", [1, 7, 64, 1000])
def test_another_order_of_summation_passes(dtype, rows, cols, k):
    for seed in range(20):
        torch.manual_seed(seed)
        a, b = torch.randn(rows, k).to(dtype), torch.randn(k, cols).to(dtype)
        truth, torch_result = a.double() @ b.double(), a @ b
        for block in (5, 16, 64):
            result = matmul_in_blocks(a, b, block)
            assert_close_to_reference(result, truth, torch_result, what="blocked matmul")
            assert_close_to_reference(result, truth, terms=k, what="blocked matmul")


def lstm_with(defect: str):
    """The reference LSTM with one planted defect."""

    def lstm(input, hx, params, **options):
        params = list(params)
        w_ih, w_hh, b_ih, b_hh = params[:4]
        hidden = w_hh.shape[1]
        if defect == "wrong gate in one column":
            order = torch.arange(4 * hidden)
            order[[hidden, 2 * hidden]] = order[[2 * hidden, hidden]]
            params[0] = w_ih[order]
        elif defect == "missed bias":
            params[3] = torch.zeros_like(b_hh)
        elif defect == "last input ignored":
            input = input.clone()
            input[-1, -1] = 0
        y, h, c = rnn.lstm(input, hx, params, **options)
        if defect == "stale row":
            y = torch.cat((y[:-1], torch.cat((y[-1:, :-1], y[-2:-1, -1:]), 1)))
        elif defect == "state of the step before":
            h = y[-2:-1]
        elif defect == "half precision":
            y = y.bfloat16().to(y.dtype)
        return y, h, c

    return lstm


DEFECTS = [
    "wrong gate in one column",
    "missed bias",
    "last input ignored",
    "stale row",
    "state of the step before",
    "half precision",
]


@pytest.mark.parametrize("size", [(2, 1, 1, 1), (5, 3, 4, 7), (6, 32, 33, 65)], ids=str)
@pytest.mark.parametrize("defect", [None, *DEFECTS])
def test_a_planted_defect_fails(size, defect):
    case = lstm_case(*size)

    def compare():
        assert_matches(
            case.functional(lstm_with(defect)),
            case.functional(rnn.lstm),
            case.module(torch.nn.LSTM),
            case.inputs,
            case.cotangents,
            names=case.names,
        )

    if defect is None:
        compare()
    else:
        with pytest.raises(AssertionError, match="error .* > budget"):
            compare()


def test_a_small_error_in_one_gradient_fails():
    case = lstm_case(5, 4, 8, 16)
    run = dict(inputs=case.inputs, cotangents=case.cotangents, names=case.names)
    torch_result = run_with_grads(case.module(torch.nn.LSTM), **run)
    exact = case.to(torch.float64)
    truth = run_with_grads(
        exact.functional(rnn.lstm), exact.inputs, exact.cotangents, names=case.names
    )
    for name in truth:
        broken = {key: value.clone() for key, value in torch_result.items()}
        broken[name].view(-1)[1] += 1e-4 * broken[name].abs().max()
        with pytest.raises(AssertionError, match=f"^{name}: largest error"):
            assert_results_close(broken, truth, torch_result)
        broken[name] = torch_result[name] * (1 + 1e-5)
        with pytest.raises(AssertionError, match=f"^{name}: "):
            assert_results_close(broken, truth, torch_result)


def test_the_message_names_tensor_budget_and_worst_element():
    truth = torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)
    actual = truth.float()
    actual[2, 1] += 0.5
    with pytest.raises(AssertionError) as failure:
        assert_close_to_reference(actual, truth, truth.float(), what="grad weight")
    for part in ("grad weight", "error 0.5 > budget", "2 x torch's", "[2, 1]", "got 2.3", "1.8"):
        assert part in str(failure.value)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf, 3.0])
@pytest.mark.parametrize("right", [math.nan, math.inf, -math.inf, 2.0])
def test_specials_must_stand_where_the_reference_has_them(wrong, right):
    truth = torch.tensor([1.0, right, 0.5], dtype=torch.float64)
    actual = truth.float()
    assert_close_to_reference(actual, truth, actual)
    actual[1] = wrong
    if wrong == right or (math.isnan(wrong) and math.isnan(right)):
        assert_close_to_reference(actual, truth)
    else:
        with pytest.raises(AssertionError, match=r"\[1\]"):
            assert_close_to_reference(actual, truth)


def test_overflow_of_the_dtype_is_not_an_error():
    truth = torch.tensor([1e300, 1.0], dtype=torch.float64)
    assert_close_to_reference(truth.float(), truth)
    with pytest.raises(AssertionError):
        assert_close_to_reference(torch.tensor([3e38, 1.0]), truth)


def test_specials_in_torchs_result_do_not_widen_the_budget():
    truth = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    broken_torch = torch.tensor([1.0, math.nan, math.inf])
    with pytest.raises(AssertionError, match="error"):
        assert_close_to_reference(torch.tensor([1.0, 2.0, 3.5]), truth, broken_torch)


def test_shapes_dtypes_and_names_are_compared():
    truth = torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"expected shape \[2, 3\], got \[3, 2\]"):
        assert_close_to_reference(torch.ones(3, 2), truth)
    with pytest.raises(AssertionError, match="must be float64"):
        assert_close_to_reference(torch.ones(2, 3), truth.float())
    with pytest.raises(AssertionError, match="float32"):
        assert_close_to_reference(truth, truth, torch.ones(2, 3))
    with pytest.raises(AssertionError, match="expected None"):
        assert_results_close({"grad x": truth}, {"grad x": None})
    with pytest.raises(AssertionError, match="expected"):
        assert_results_close({}, {"grad x": truth})
    assert_close_to_reference(torch.ones(0, 3), truth[:0])


def test_layouts_keep_values_and_change_strides():
    tensor = torch.randn(4, 3, 5)
    for name in LAYOUTS:
        other = with_layout(tensor, name)
        assert other.shape == tensor.shape
        if name == "expanded":
            assert other.stride(0) == 0 and torch.equal(other[2], tensor[0])
        else:
            assert torch.equal(other, tensor)
    assert not any(with_layout(tensor, n).is_contiguous() for n in ("transposed", "strided"))
    assert with_layout(tensor, "offset").storage_offset() == 1


def test_edge_sizes_surround_each_width():
    assert edge_sizes(8) == [1, 2, 3, 5, 7, 8, 9, 13]
    assert {15, 16, 17, 64, 65, 131} <= set(edge_sizes(tile=64))


def test_run_with_grads_respects_wrt_and_leaves_the_inputs_alone():
    inputs = {"a": torch.randn(3).requires_grad_(), "b": torch.randn(3), "i": torch.arange(3)}
    ones = [torch.ones(3)]
    found = run_with_grads(lambda a, b, i: (a * b + i,), inputs, ones)
    assert list(found) == ["out0", "grad a", "grad b"]
    assert torch.equal(found["grad a"], inputs["b"])
    assert list(run_with_grads(lambda a, b, i: a * b, inputs, ones, wrt=["b"])) == [
        "out0",
        "grad b",
    ]
    assert run_with_grads(lambda a, b, i: a * 1, inputs, ones)["grad b"] is None
    assert list(run_with_grads(lambda a, b, i: a * b, inputs)) == ["out0"]
    assert inputs["a"].grad is None and not inputs["b"].requires_grad


MODULES = {
    "lstm": torch.nn.LSTM,
    "gru": torch.nn.GRU,
    "rnn_tanh": torch.nn.RNN,
    "rnn_relu": torch.nn.RNN,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("proj_size", [0, 3])
@pytest.mark.parametrize("cell", MODULES)
def test_cases_have_torchs_parameters(cell, proj_size, bias):
    options = dict(num_layers=2, bidirectional=True, bias=bias)
    if proj_size and cell != "lstm":
        with pytest.raises(ValueError, match=f"expected proj_size 0 for {cell}, got 3"):
            recurrent_case(cell, 2, 3, 4, 5, proj_size=proj_size)
        return
    case = recurrent_case(cell, 2, 3, 4, 5, proj_size=proj_size, **options)
    module = case.build(MODULES[cell])
    states = ["x", "h0", "c0"][: len(case.names)]
    assert list(case.inputs) == [*states, *module.state_dict()]
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, case.inputs[name]) and parameter is not case.inputs[name]
    torch_module = case.module(MODULES[cell])
    outputs = assert_matches(case.reference(), torch_module, torch_module, case.inputs)
    assert [t.shape for t in outputs.values()] == [c.shape for c in case.cotangents]


@pytest.mark.parametrize("cell", rnn.CELLS)
def test_parameters_of_a_cell_stand_behind_the_biases(cell):
    case = recurrent_case(cell, 2, 3, 4, 5, num_layers=2, bidirectional=True)
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", *rnn.CELLS[cell].extras]
    names = [f"{k}_l{n}{side}" for n in range(2) for side in ("", "_reverse") for k in kinds]
    assert list(case.inputs)[len(case.names) :] == names
    for name, shape in rnn.CELLS[cell].extras.items():
        assert case.inputs[f"{name}_l1_reverse"].shape == shape(5)
    weights = case.weights(1, "_reverse")
    assert all(w is case.inputs[f"{k}_l1_reverse"] for k, w in zip(kinds, weights, strict=True))


def test_one_case_in_many_dtypes():
    """float64 cases hold the numbers of float32 cases; to() and map() keep what is not floating."""
    options = dict(num_layers=2, bidirectional=True, lengths="random", resets=0.5)
    case = recurrent_case("layer_norm_lstm", 5, 4, 3, 2, **options)
    wide = recurrent_case("layer_norm_lstm", 5, 4, 3, 2, **options, dtype=torch.float64)
    for name, tensor in case.to(torch.float64).inputs.items():
        assert torch.equal(tensor.nan_to_num(), wide.inputs[name].nan_to_num()), name
    half = wide.to(torch.bfloat16)
    assert {t.dtype for t in (*half.inputs.values(), *half.cotangents)} == {torch.bfloat16}
    assert half.keywords == wide.keywords and set(half.keywords) == {"lengths", "resets"}
    zero = wide.map(torch.zeros_like, "h0")
    assert not zero.inputs["h0"].any() and zero.inputs["c0"] is wide.inputs["c0"]
    with pytest.raises(ValueError, match="no input named .'h9'"):
        wide.map(torch.zeros_like, "h9")


@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_and_resets_of_a_case(batch_first):
    case = recurrent_case("gru", 6, 50, 2, 3, lengths="random", resets=0.2, batch_first=batch_first)
    lengths, resets = case.keywords["lengths"], case.keywords["resets"]
    assert set(lengths.tolist()) == set(range(7))
    x = case.inputs["x"] if batch_first else case.inputs["x"].transpose(0, 1)
    assert resets.shape == case.inputs["x"].shape[:2] and 0.1 < resets.double().mean() < 0.3
    for row, length in zip(x, lengths.tolist(), strict=True):
        assert row[:length].isfinite().all() and row[length:].isnan().all()
    again = recurrent_case("gru", 6, 50, 2, 3, seed=1, lengths=[4] * 50, resets=0.0)
    assert again.keywords["lengths"].tolist() == [4] * 50 and not again.keywords["resets"].any()
    assert "lengths" in str(case) and "resets" in str(case) and str(case).startswith("gru x[")
    with pytest.raises(ValueError, match="batch of rows"):
        recurrent_case("gru", 6, None, 2, 3, lengths="random")


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("hx", [False, True])
def test_a_packed_case_is_torchs_packing(hx, batch_first):
    options = dict(lengths=[2, 5, 1, 5], hx=hx, batch_first=batch_first)
    case = recurrent_case("lstm", 5, 4, 3, 6, **options)
    packed = case.packed()
    lengths, order = case.keywords["lengths"], torch.tensor([1, 3, 0, 2])
    expected = torch.nn.utils.rnn.pack_padded_sequence(
        case.inputs["x"], lengths, batch_first, enforce_sorted=False
    )
    assert torch.equal(packed.inputs["x"], expected.data)
    assert torch.equal(packed.keywords["batch_sizes"], expected.batch_sizes)
    for name in ("h0", "c0") if hx else ():
        assert torch.equal(packed.inputs[name], case.inputs[name][:, order])
    for found, whole in zip(packed.cotangents[1:], case.cotangents[1:], strict=True):
        assert torch.equal(found, whole[:, order])
    assert packed.cotangents[0].shape == (13, 6) and "lengths" not in packed.keywords
    assert packed.inputs["weight_ih_l0"] is case.inputs["weight_ih_l0"]
    for lengths in (None, [0, 5, 1, 5]):
        with pytest.raises(ValueError, match="positive lengths"):
            recurrent_case("lstm", 5, 4, 3, 6, lengths=lengths).packed()
