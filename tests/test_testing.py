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
