"""The Triton attention kernels on a GPU: the grid of the interpreter, and what only a GPU shows."""

from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

from fastseq.kernels import attention as kernels  # noqa: E402

from fastseq import functional  # noqa: E402
from fastseq.reference import scores  # noqa: E402
from fastseq.testing import (  # noqa: E402
    assert_close_to_reference,
    assert_matches,
    edge_sizes,
    run_with_grads,
)
from fastseq.testing_attention import SCORES, attention_case  # noqa: E402

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
EDGES = edge_sizes(16, 32, tile=64)
SIZES = [(5, 1, 40, 64, 32), (5, None, 40, 64, 32), (3, 17, 31, 33, 5), (64, 40, 41, 512, 130)]
SIZES += [(3, q, 40, 64, 32) for q in EDGES]
SIZES += [(3, 4, s, 64, 32) for s in EDGES]
SIZES += [(3, 4, 40, k, 32) for k in (*EDGES, 257)]
SIZES += [(3, 4, 40, 64, c) for c in (*EDGES, 257)]
# Few rows and a long source: split into parts.
SIZES += [(1, 1, 5000, 64, 64), (2, 3, 3001, 130, 70)]
WHERE = [{}, {"lengths": True}, {"mask": "source"}, {"mask": "query", "lengths": True}]


@pytest.fixture(autouse=True)
def triton_runs():
    assert kernels.obstacle(torch.zeros(1, device="cuda")) is None


def check(case):
    case = case.to("cuda")
    oracle = case.functional(scores)
    return assert_matches(
        case.functional(functional),
        oracle,
        oracle,
        case.inputs,
        case.cotangents,
        names=case.names,
        what=str(case),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_values_and_gradients(score, dtype):
    for index, size in enumerate(SIZES):
        where = WHERE[index % len(WHERE)] if size[1] else {"lengths": True}
        options = dict(extra=index % 2 == 0, g=index % 3 == 0, scale=0.7, seed=index)
        check(attention_case(score, *size, **where, **options, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_small(score):
    """For compute-sanitizer: every kernel once or twice."""
    check(attention_case(score, 2, 3, 33, 35, 17, extra=True, mask="query", lengths=True))
    check(attention_case(score, 1, None, 300, 35, 17, lengths=False))


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_same_bits_every_time(score):
    case = attention_case(score, 4, 33, 700, 130, 65, lengths=True).to("cuda")
    call = case.functional(functional)
    first = run_with_grads(call, case.inputs, case.cotangents)
    for _ in range(20):
        for name, tensor in run_with_grads(call, case.inputs, case.cotangents).items():
            assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize("score", ["additive", "dot"])
@pytest.mark.parametrize("size", [(4, None, 40, 64, 32), (1, None, 5000, 64, 32)], ids=str)
def test_graph_capture_of_a_decoding_step(score, size):
    """Captured once, replayed on other numbers and other lengths."""
    case = attention_case(score, *size, lengths=True).to("cuda")
    call = case.functional(functional)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                call(*case.inputs.values())
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call(*case.inputs.values())
        for seed in (1, 2):
            other = attention_case(score, *size, lengths=True, seed=seed).to("cuda")
            for name, tensor in case.inputs.items():
                tensor.copy_(other.inputs[name])
            case.where["lengths"].copy_(other.where["lengths"])
            graph.replay()
            expected = call(*case.inputs.values())
            assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_opcheck(score):
    case = attention_case(score, 3, 4, 9, 8, 6, lengths=True, mask="query").to("cuda")
    leaves = [t.clone().requires_grad_() for t in case.inputs.values()]
    none = [None] * (score == "additive")
    forward = getattr(torch.ops.fastseq, f"{score}_attention_fwd").default
    arguments = (*leaves, *none, case.where["mask"], case.where["lengths"], 1.0)
    torch.library.opcheck(forward, arguments)


def test_the_fast_tanh_is_as_good_as_documented():
    """Under "medium" a score is off by at most sum |v| 2^-11, a weight by e to twice that."""
    case = attention_case("additive", 4, 5, 40, 64).to("cuda")
    exact = case.to(torch.float64).functional(scores)(*case.to(torch.float64).inputs.values())[1]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = case.functional(functional)(*case.inputs.values())[1]
    finally:
        torch.set_float32_matmul_precision(before)
    error = 2.0**-11 + torch.finfo(torch.float32).eps
    bound = torch.expm1(2 * error * case.inputs["v"].double().abs().sum())
    assert ((found - exact).abs() <= bound * exact).all()


def test_more_than_two_to_the_31_elements():
    """Offsets are 64 bits wide: the last row of keys lies beyond."""
    rows = 2**31 // (1024 * 512) + 2
    keys = torch.empty(rows, 1024, 512, device="cuda", dtype=torch.float16)
    keys[-1].normal_()
    query = torch.randn(rows, 512, device="cuda", dtype=torch.float16)
    v = torch.randn(512, device="cuda", dtype=torch.float16)
    lengths = torch.zeros(rows, dtype=torch.int64, device="cuda")
    lengths[-1] = 1024
    found = functional.additive_attention(query, keys, keys, v, lengths=lengths)
    last = [t[-1:] for t in (query, keys, keys)]
    truth = scores.additive_attention(*(t.double() for t in last), v.double())
    yardstick = scores.additive_attention(*last, v)
    for tensor, exact, baseline in zip(found, truth, yardstick, strict=True):
        assert_close_to_reference(tensor[-1:], exact, baseline)
        assert not tensor[:-1].any()
