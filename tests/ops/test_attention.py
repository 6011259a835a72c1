"""fastseq::additive_attention_* and dot_attention_*: registration, and what runs where."""

from __future__ import annotations

import pytest
import torch

from fastseq.ops import attention, attention_plain
from fastseq.reference import scores
from fastseq.testing import assert_matches
from fastseq.testing_attention import attention_case

pytestmark = pytest.mark.usefixtures("device")
OPS = torch.ops.fastseq
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def op_arguments(score, B=3, Q=2, S=5, K=4, *, where=True, extra=False, dtype=torch.float32):
    """The forward operator's, and the tensors among them."""
    case = attention_case(score, B, Q, S, K, extra=extra, lengths=where, mask="query", dtype=dtype)
    tensors = list(case.inputs.values())
    if score == "additive" and not extra:
        tensors.append(None)
    mask, lengths = (case.where["mask"], case.where["lengths"]) if where else (None, None)
    return case, tensors, (mask, lengths, 0.7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("where", [False, True])
@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_opcheck(score, extra, where, dtype):
    case, tensors, rest = op_arguments(score, where=where, extra=extra, dtype=dtype)
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    forward = getattr(OPS, f"{score}_attention_fwd").default
    backward = getattr(OPS, f"{score}_attention_bwd").default
    torch.library.opcheck(forward, (*leaves, *rest))
    torch.library.opcheck(forward, (*tensors, *rest))
    weights = forward(*tensors, *rest)[1]
    d_context, d_weights = case.cotangents
    for cotangents in ((d_context, d_weights), (None, d_weights), (d_context, None)):
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(backward, (*cotangents, *tensors, rest[1], weights, 0.7, *needs))


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_runs_on_meta_and_under_fake_tensors(score):
    _, tensors, rest = op_arguments(score)
    meta = [None if t is None else t.to("meta") for t in (*tensors, *rest[:2])]
    context, weights = getattr(OPS, f"{score}_attention_fwd")(*meta, 0.7)
    assert context.is_meta and context.shape == (3, 2, 5) and weights.shape == (3, 2, 5)


def test_a_kernel_for_every_stage_on_every_device():
    for stages in attention.KERNELS.values():
        assert sorted(stages) == ["additive_bwd", "additive_fwd", "dot_bwd", "dot_fwd"]
    for key in ("CPU", "CUDA"):
        for score in ("additive", "dot"):
            for stage in ("fwd", "bwd"):
                name = f"fastseq::{score}_attention_{stage}"
                assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_the_gpu_entry_falls_back_where_triton_cannot_run(score):
    """Called with CPU tensors, as it would be with float64 ones on a GPU."""
    case, tensors, rest = op_arguments(score, dtype=torch.float64)
    stages = attention.KERNELS["CUDA"]
    found = stages[f"{score}_fwd"](*tensors, *rest)
    want = getattr(attention_plain, f"{score}_fwd")(*tensors, *rest)
    assert all(map(torch.equal, found, want))
    backward = (*case.cotangents, *tensors, rest[1], want[1], 0.7, True, True)
    found = stages[f"{score}_bwd"](*backward)
    want = getattr(attention_plain, f"{score}_bwd")(*backward)
    assert all(map(torch.equal, found, want))


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_autograd_of_the_operator_itself(score):
    case, tensors, rest = op_arguments(score, dtype=torch.float32)
    op, oracle = getattr(OPS, f"{score}_attention_fwd"), case.functional(scores)
    case.where["scale"] = 0.7
    none = (None,) * (score == "additive")
    assert_matches(
        lambda *inputs: op(*inputs, *none, *rest),
        oracle,
        oracle,
        case.inputs,
        case.cotangents,
        names=case.names,
    )
