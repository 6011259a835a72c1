"""The yardstick of what ran under TF32: what TF32 may do passes, and what it may not doesn't."""

from __future__ import annotations

import pytest
import torch

from fastseq.testing import (
    TF32Products,
    allow_tf32,
    assert_matches,
    assert_results_close,
    recurrent_case,
    run_with_grads,
)
from fastseq.testing.tf32 import cut
from tests.cuda.on_host import COMPILER, load, on_host
from tests.cuda.test_recurrent import RUNS
from tests.fuzz_recurrent import ours


def nearest(t):
    """A float32 rounded to ten bits of a fraction."""
    return ((t.view(torch.int32) + (1 << 12)) >> 13 << 13).view(torch.float32)


def shorter(t):
    """... cut to eight."""
    return (t.view(torch.int32) >> 15 << 15).view(torch.float32)


def same(t):
    return t


def judge(case, round_, fn=None, yardstick=cut):
    """The reference with products that round so, or fn among them, by such a yardstick."""
    reference, rest = case.reference(), dict(names=case.names)
    wide = {name: t.double() for name, t in case.inputs.items()}
    truth = run_with_grads(reference, wide, [c.double() for c in case.cotangents], **rest)
    with TF32Products(round_):
        found = run_with_grads(fn or reference, case.inputs, case.cotangents, **rest)
    with TF32Products(yardstick):
        baseline = run_with_grads(reference, case.inputs, case.cotangents, **rest)
    assert_results_close(found, truth, baseline)


def case_of(cell):
    return recurrent_case(cell, 12, 16, 24, 40, bidirectional=True, resets=0.1)


@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh", "peephole_lstm"])
def test_what_tf32_may_do_passes_and_less_does_not(cell):
    case = case_of(cell)
    for round_ in (cut, nearest, same):
        judge(case, round_)
    with pytest.raises(AssertionError, match="budget"):
        judge(case, shorter)
    with pytest.raises(AssertionError, match="budget"):
        judge(case, nearest, yardstick=same)


def test_a_defect_fails_under_tf32_too():
    case = case_of("lstm")

    def wrong(x, *rest):
        y, *states = case.reference()(x, *rest)
        return y * 1.01, *states

    with pytest.raises(AssertionError, match="^y: "):
        judge(case, cut, wrong)


def test_a_yardstick_that_changed_nothing_is_refused():
    with pytest.raises(RuntimeError, match="met none"), TF32Products():
        torch.ones(2, 2).double() @ torch.ones(2, 2).double()
    case = recurrent_case("gru", 2, 2, 2, 2, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="met none"):
        given = case.reference(), case.reference(), case.reference(), case.inputs
        assert_matches(*given, case.cotangents, baseline_under=TF32Products)
    assert cut(torch.tensor([1 + 2**-10, 1 + 2**-11, -1 - 2**-11])).tolist() == [1 + 2**-10, 1, -1]


def test_switches_are_put_back():
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = matmul.fp32_precision, cudnn.fp32_precision
    for allowed, said in ((True, "tf32"), (False, "ieee")):
        with allow_tf32(allowed):
            assert (matmul.fp32_precision, cudnn.fp32_precision) == (said, said)
        assert (matmul.fp32_precision, cudnn.fp32_precision) == before


@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler to build the kernels for the host")
@pytest.mark.parametrize("way, cell", [run for run in RUNS if "norm" not in run[1]], ids=str)
def test_kernels_between_products_of_tf32(way, cell):
    """Those over all tokens; the host's steps multiply as they are."""
    load()
    case = recurrent_case(cell, 5, 6, 20, 32, bidirectional=True)
    with on_host(way):
        judge(case, nearest, ours(case))
        with pytest.raises(AssertionError, match="budget"):
            judge(case, nearest, ours(case), same)
