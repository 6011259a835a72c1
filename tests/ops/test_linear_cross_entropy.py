"""fastseq::linear_cross_entropy_fwd and _bwd: registration, and what one promises the other."""

from __future__ import annotations

import itertools

import pytest
import torch

from fastseq.ops import linear_cross_entropy as ops

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
FORWARD = torch.ops.fastseq.linear_cross_entropy_fwd.default
BACKWARD = torch.ops.fastseq.linear_cross_entropy_bwd.default


def arguments(dtype, *, bias=True, weights=True, N=7, H=4, V=5):
    target = torch.randint(V, (N,))
    target[1] = -100
    return [
        torch.randn(N, H).to(dtype),
        torch.randn(V, H).to(dtype),
        torch.randn(V).to(dtype) if bias else None,
        target,
        torch.rand(V).to(dtype) if weights else None,
        -100,
        0.1,
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_opcheck(dtype, reduction):
    inputs = arguments(dtype)
    leaves = [t.clone().requires_grad_() for t in inputs[:3]]
    torch.library.opcheck(FORWARD, (*leaves, *inputs[3:], reduction, True, True, True))
    bare = arguments(dtype, bias=False, weights=False)
    torch.library.opcheck(FORWARD, (*bare, reduction, False, False, False))
    torch.library.opcheck(FORWARD, (*bare, reduction, False, True, False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck_backward(dtype):
    dloss = torch.randn(7, dtype=ops.accumulator_dtype(dtype))
    for needs in itertools.product((True, False), repeat=3):
        torch.library.opcheck(BACKWARD, (dloss, *arguments(dtype), *needs))


def test_only_what_is_asked_for_is_computed():
    inputs = arguments(torch.float32)
    whole = FORWARD(*inputs, "sum", True, True, True)
    for needs in itertools.product((True, False), repeat=3):
        found = FORWARD(*inputs, "sum", *needs)
        assert torch.equal(found[0], whole[0])
        for grad, wanted, needed in zip(found[2:], whole[2:], needs, strict=True):
            assert torch.equal(grad, wanted) if needed else grad.numel() == 0


def test_gradients_of_both_ops_are_the_same():
    """Each row's factor 1: what the forward pass of a sum keeps."""
    inputs = arguments(torch.float64)
    kept = FORWARD(*inputs, "sum", True, True, True)[2:]
    for a, b in zip(kept, BACKWARD(torch.ones(7).double(), *inputs, True, True, True), strict=True):
        assert torch.equal(a, b)


def test_a_gradient_nobody_prepared_for_is_refused():
    inputs = arguments(torch.float32)
    inputs[1].requires_grad_()
    with pytest.raises(RuntimeError, match="expected need_.* = True for inputs that require grad"):
        FORWARD(*inputs, "sum", True, False, True)


def test_rows_of_a_chunk_follow_the_memory_bound():
    for vocabulary, hidden in ((1, 1), (8000, 512), (250_000, 1024), (10**7, 8), (0, 0)):
        for itemsize in (4, 8):
            rows = ops.chunk_rows(vocabulary, hidden, itemsize)
            bound = max(ops.CHUNK_BYTES, vocabulary * hidden * itemsize / 16)
            assert rows >= 1
            assert rows == 1 or rows * vocabulary * itemsize <= bound


def test_meta_tensors_have_the_shapes_of_real_ones():
    inputs = arguments(torch.bfloat16)
    meta = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in inputs]
    for reduction in ("mean", "none"):
        real = FORWARD(*inputs, reduction, True, False, True)
        fake = FORWARD(*meta, reduction, True, False, True)
        for a, b in zip(real, fake, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_autocast_changes_nothing_inside():
    inputs = arguments(torch.float32)
    expected = FORWARD(*inputs, "mean", True, True, True)
    with torch.autocast("cpu"):
        found = FORWARD(*inputs, "mean", True, True, True)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
