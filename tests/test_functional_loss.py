"""functional.loss.linear_cross_entropy against its reference in float64, torch as the yardstick."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
from torch.nn import functional as F

import fastseq
from fastseq.functional import loss as functional_loss
from fastseq.functional.loss import linear_cross_entropy
from fastseq.ops import linear_cross_entropy as ops
from fastseq.reference.loss import linear_cross_entropy as reference
from fastseq.testing import (
    LAYOUTS,
    assert_close_to_reference,
    assert_matches,
    assert_results_close,
    edge_sizes,
    run_with_grads,
    with_layout,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
REDUCTIONS = ("mean", "sum", "none")
IGNORED = -100


@pytest.fixture(autouse=True)
def walk(monkeypatch):
    """Small problems take the chunked way too."""
    monkeypatch.setattr(functional_loss, "DIRECT_BYTES", -1)


def by_torch(hidden, weight, bias, target, class_weight=None, **options):
    logits = F.linear(hidden, weight, bias)
    found = F.cross_entropy(logits.flatten(0, -2), target.flatten(), class_weight, **options)
    return found.view(target.shape) if found.dim() else found


def draw(N, H, V, *, dtype=torch.float32, bias=True, weights=False, ignored=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    leading = N if isinstance(N, tuple) else (N,)
    normal = partial(torch.randn, generator=generator)
    inputs = {"hidden": normal(*leading, H), "weight": normal(V, H) * (2 / math.sqrt(max(H, 1)))}
    inputs["bias"] = normal(V) if bias else None
    target = torch.randint(V, leading, generator=generator)
    target[torch.rand(leading, generator=generator) < ignored] = IGNORED
    inputs["target"] = target
    if weights:
        inputs["class_weight"] = torch.rand(V, generator=generator) + 0.1
    return {
        name: t.to(dtype) if t.is_floating_point() else t
        for name, t in inputs.items()
        if t is not None
    }


def check(inputs, *, fn=linear_cross_entropy, what="", seed=1, **options):
    def adapted(function):
        def call(*tensors):
            given = dict(zip(inputs, tensors, strict=True))
            return function(
                given["hidden"],
                given["weight"],
                given.get("bias"),
                given["target"],
                given.get("class_weight"),
                **options,
            )

        return call

    generator = torch.Generator().manual_seed(seed)
    shape = inputs["target"].shape if options.get("reduction") == "none" else ()
    cotangent = torch.randn(shape, generator=generator).to(inputs["hidden"].dtype)
    return assert_matches(
        adapted(fn),
        adapted(reference),
        adapted(by_torch),
        inputs,
        [cotangent],
        wrt=[name for name in ("hidden", "weight", "bias") if name in inputs],
        names=["loss"],
        what=f"{what} {[tuple(t.shape) for t in inputs.values()]} {options}",
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [1, 5, 1000])
def test_options(monkeypatch, dtype, reduction, rows):
    monkeypatch.setattr(ops, "chunk_rows", lambda *_: rows)
    choices = itertools.product((0.0, 0.1, 1.0), (True, False), (True, False), (0.0, 0.3))
    for seed, (smoothing, weights, bias, ignored) in enumerate(choices):
        inputs = draw(
            23, 12, 31, dtype=dtype, bias=bias, weights=weights, ignored=ignored, seed=seed
        )
        check(inputs, reduction=reduction, label_smoothing=smoothing, ignore_index=IGNORED)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reference_is_torchs_cross_entropy(reduction):
    for smoothing, weights in itertools.product((0.0, 0.3), (True, False)):
        inputs = draw(9, 5, 7, dtype=torch.float64, weights=weights)
        options = {"label_smoothing": smoothing, "reduction": reduction}
        cotangent = torch.randn(9 if reduction == "none" else (), dtype=torch.float64)
        wrt = ["hidden", "weight", "bias"]
        found, expected = (
            run_with_grads(partial(function, **options), inputs, [cotangent], wrt=wrt)
            for function in (reference, by_torch)
        )
        assert_results_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sizes(dtype):
    edges = edge_sizes(8, 16)
    sizes = [(n, 6, 11) for n in edges] + [(7, h, 11) for h in edges] + [(7, 6, v) for v in edges]
    for seed, size in enumerate(sizes):
        check(draw(*size, dtype=dtype, seed=seed), reduction=REDUCTIONS[seed % 3])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_sizes_of_zero(reduction):
    check(draw(0, 4, 5), reduction=reduction)
    check(draw(3, 0, 5), reduction=reduction)
    check(draw((2, 0), 4, 5), reduction=reduction)


def test_beyond_one_chunk_of_the_real_size():
    inputs = draw(700, 24, 9000)
    assert ops.chunk_rows(9000, 24, 4) < 700
    check(inputs, label_smoothing=0.1)


def test_sums_over_many_chunks_are_wide(monkeypatch):
    """In bfloat16 a running sum of 400 terms would lose digits that torch's products keep."""
    monkeypatch.setattr(ops, "chunk_rows", lambda *_: 1)
    check(draw(400, 5, 7, dtype=torch.bfloat16))


def test_the_bias_of_a_class_that_most_rows_share(monkeypatch):
    """A sum of thousands of terms near -1: as exact as its own rounding, which torch's is not."""
    monkeypatch.setattr("fastseq.functional.loss.DIRECT_BYTES", -1)
    inputs = draw(4099, 6, 70)
    inputs["target"][torch.rand(4099, generator=torch.Generator().manual_seed(0)) < 0.9] = 3
    exact = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    cotangents = [torch.ones((), dtype=torch.float64)]
    by_sum = partial(reference, reduction="sum")
    truth = run_with_grads(by_sum, exact, cotangents, wrt=["bias"])["grad bias"]
    for reduction in ("sum", "none"):
        ones = torch.ones(4099) if reduction == "none" else torch.ones(())
        call = partial(linear_cross_entropy, reduction=reduction)
        got = run_with_grads(call, inputs, [ones], wrt=["bias"])["grad bias"]
        assert_close_to_reference(got, truth, terms=1)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
def test_layouts(monkeypatch, layout):
    monkeypatch.setattr(ops, "chunk_rows", lambda *_: 4)
    for ignored in (0.0, 0.4):
        inputs = draw(11, 9, 13, weights=True, ignored=ignored)
        for name in ("hidden", "weight", "bias", "class_weight"):
            check(inputs | {name: with_layout(inputs[name], layout)}, what=layout)
    spaced = torch.stack((inputs["target"], inputs["target"] + 5), 1)[:, 0]
    check(inputs | {"target": spaced})


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_leading_dimensions(reduction):
    inputs = draw((2, 3, 4), 5, 7)
    check(inputs, reduction=reduction)
    turned = {"hidden": inputs["hidden"].transpose(0, 1), "target": inputs["target"].mT.mT}
    turned["target"] = inputs["target"].transpose(0, 1)
    check(inputs | turned, reduction=reduction)
    row = linear_cross_entropy(
        inputs["hidden"][0, 0, 1],
        inputs["weight"],
        inputs["bias"],
        torch.tensor(3),
        reduction=reduction,
    )
    assert row.shape == ()
    assert_close_to_reference(
        row, F.cross_entropy(F.linear(*_double(inputs, (0, 0, 1))), torch.tensor(3))
    )


def _double(inputs, at):
    return inputs["hidden"][at].double(), inputs["weight"].double(), inputs["bias"].double()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [True, False])
def test_every_row_ignored(smoothing, weights):
    inputs = draw(6, 4, 5, weights=weights, ignored=1.1)
    for reduction in REDUCTIONS:
        found = check(inputs, label_smoothing=smoothing, reduction=reduction)
        assert found["loss"].isnan().all() == (reduction == "mean")
        for name in ("hidden", "weight", "bias"):
            assert found[f"grad {name}"].count_nonzero() == 0


def test_an_ignored_id_inside_the_vocabulary():
    inputs = draw(40, 4, 5, ignored=0.0)
    check(inputs, ignore_index=2)
    assert (inputs["target"] == 2).any()


def test_ignored_rows_may_hold_anything():
    inputs = draw(9, 4, 5, ignored=0.4)
    rows = inputs["target"] == IGNORED
    expected = check(inputs)
    inputs["hidden"][rows] = math.nan
    found = run_with_grads(
        linear_cross_entropy, inputs, [torch.ones(())], wrt=["hidden", "weight", "bias"]
    )
    assert torch.equal(found["out0"], expected["loss"])
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_far_from_zero(dtype):
    """Softmax neither overflows nor underflows; -inf in the bias rules a word out."""
    for shift in (-3e4, 3e4):
        inputs = draw(13, 6, 9, dtype=dtype, ignored=0.0)
        inputs["bias"] += shift
        check(inputs, what=str(shift))
    inputs = draw(13, 6, 9, dtype=dtype, ignored=0.0)
    inputs["hidden"] *= 300
    check(inputs, what="saturated")
    inputs = draw(13, 6, 9, dtype=dtype, ignored=0.0)
    inputs["bias"][4] = -math.inf
    inputs["target"][inputs["target"] == 4] = 3
    found = check(inputs, what="-inf")
    assert found["grad bias"][4] == 0


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_set_of_gradients(reduction):
    inputs = draw(17, 6, 9)
    cotangents = [torch.randn(17) if reduction == "none" else torch.randn(())]
    everything = ("hidden", "weight", "bias")
    call = partial(linear_cross_entropy, reduction=reduction)
    whole = run_with_grads(call, inputs, cotangents, wrt=everything)
    for count in (1, 2):
        for wrt in itertools.combinations(everything, count):
            found = run_with_grads(call, inputs, cotangents, wrt=wrt)
            assert len(found) == 1 + count
            for name, tensor in found.items():
                assert torch.equal(tensor, whole[name]), (wrt, name)
    assert torch.equal(run_with_grads(call, inputs)["out0"], whole["out0"])


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_twice_over_one_graph(reduction):
    inputs = draw(17, 6, 9)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    loss = linear_cross_entropy(*leaves, inputs["target"], reduction=reduction)
    cotangent = torch.randn(loss.shape)
    first = torch.autograd.grad(loss, leaves, cotangent, retain_graph=True)
    kept = [t.clone() for t in first]
    for t in first:
        t.zero_()
    for a, b in zip(torch.autograd.grad(loss, leaves, cotangent), kept, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradients_of_gradients(reduction):
    inputs = draw(7, 3, 4, dtype=torch.float64, weights=True, ignored=0.3)
    target, weights = inputs["target"], inputs["class_weight"]
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]

    def call(*tensors):
        return linear_cross_entropy(*tensors, target, weights, IGNORED, 0.2, reduction)

    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


def test_second_gradients_stop_at_the_call():
    """Where hidden was itself made from weight."""
    inputs = draw(3, 3, 4, dtype=torch.float64, ignored=0.0)
    found = []
    for function in (linear_cross_entropy, reference):
        leaf = inputs["weight"].clone().requires_grad_()
        hidden = leaf[:3] * leaf[1:]
        loss = function(hidden, leaf, None, inputs["target"])
        d = torch.autograd.grad(loss, (hidden, leaf), create_graph=True)
        found.append(torch.autograd.grad(sum((t**2).sum() for t in d), leaf)[0])
    assert_close_to_reference(*found)


def largest_allocation(call) -> tuple[int, int]:
    """Bytes of the largest block taken while ``call`` runs, and the peak beyond the start."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = list(itertools.accumulate(sizes))
    return max(sizes), max(held)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_logits_of_all_rows(monkeypatch, reduction, dtype):
    monkeypatch.setattr(ops, "CHUNK_BYTES", 1 << 18)
    N, H, V = 4000, 16, 1024
    for ignored in (0.0, 0.5):
        inputs = draw(N, H, V, dtype=dtype, ignored=ignored)
        call = partial(linear_cross_entropy, reduction=reduction, label_smoothing=0.1)
        cotangents = [torch.randn(N if reduction == "none" else ())]
        wrt = ["hidden", "weight", "bias"]
        block, peak = largest_allocation(partial(run_with_grads, call, inputs, cotangents, wrt=wrt))
        # oneDNN sums a bfloat16 product on AMX in a float32 scratch of its own, and aligns that.
        assert block <= (1 << 18) + 128
        # Gradients twice (kept, then scaled), the rows' losses and a chunk in two dtypes.
        assert peak < N * V * dtype.itemsize / 8
    full, _ = largest_allocation(lambda: by_torch(*inputs.values()))
    assert full >= N * V * dtype.itemsize


def test_same_bits_every_run():
    inputs = draw(300, 33, 500)
    cotangents, wrt = [torch.randn(())], ["hidden", "weight", "bias"]
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        first = run_with_grads(linear_cross_entropy, inputs, cotangents, wrt=wrt)
        again = run_with_grads(linear_cross_entropy, inputs, cotangents, wrt=wrt)
        assert all(torch.equal(again[name], t) for name, t in first.items())


@pytest.mark.parametrize("direct", [-1, 1 << 20])
@pytest.mark.parametrize(("bad", "said"), [(5, "5"), (-1, "-1"), (-101, "-101"), (2**40, "")])
def test_ids_outside_the_vocabulary(monkeypatch, direct, bad, said):
    monkeypatch.setattr(functional_loss, "DIRECT_BYTES", direct)
    inputs = draw(9, 4, 5)
    inputs["target"][6] = bad
    for reduction in REDUCTIONS:
        with pytest.raises(IndexError, match=rf"^fastseq.*ids in 0\.\.4 or .*-100, got.*{said}"):
            linear_cross_entropy(*inputs.values(), reduction=reduction)


def test_small_problems_give_the_same(monkeypatch):
    monkeypatch.setattr(functional_loss, "DIRECT_BYTES", 1 << 20)
    for reduction in REDUCTIONS:
        check(draw((3, 5), 6, 9, weights=True), label_smoothing=0.1, reduction=reduction)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_in_one_graph(dynamic):
    compiled = torch.compile(
        linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic
    )
    for N in (9, 14):
        check(draw(N, 4, 5), fn=compiled, label_smoothing=0.1)
        check(draw(N, 4, 5, weights=True, bias=False), fn=compiled, reduction="none")
    inputs = draw(9, 4, 5)
    inputs["target"][0] = 5
    with pytest.raises(IndexError, match=r"got 5"):
        compiled(*inputs.values())


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_transforms_and_the_torch_backend():
    inputs = draw((3, 7), 4, 5)
    hidden, weight, bias, target = inputs.values()
    each = torch.vmap(lambda h, y: linear_cross_entropy(h, weight, bias, y))(hidden, target)
    alone = [linear_cross_entropy(h, weight, bias, y) for h, y in zip(hidden, target, strict=True)]
    for a, b in zip(each, alone, strict=True):
        assert_close_to_reference(a, b.double())
    grad = torch.func.grad(linear_cross_entropy)(hidden, weight, bias, target)
    leaf = hidden.clone().requires_grad_()
    linear_cross_entropy(leaf, weight, bias, target).backward()
    assert_close_to_reference(grad, leaf.grad.double())
    _, tangent = torch.func.jvp(
        lambda h: linear_cross_entropy(h, weight, bias, target), (hidden,), (hidden,)
    )
    assert_close_to_reference(tangent, (leaf.grad.double() * hidden).sum())
    with fastseq.use_backend("torch"):
        same = linear_cross_entropy(hidden, weight, bias, target, reduction="none")
    assert torch.equal(same, by_torch(hidden, weight, bias, target, reduction="none"))


def test_autocast():
    inputs = draw(50, 16, 40)
    leaves = [inputs[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    results = []
    for function in (linear_cross_entropy, by_torch):
        with torch.autocast("cpu"):
            loss = function(*leaves, inputs["target"])
        results.append([loss, *torch.autograd.grad(loss, leaves)])
    lower = [t.detach().bfloat16().double().requires_grad_() for t in leaves]
    truth = reference(*lower, inputs["target"])
    truth = [truth, *torch.autograd.grad(truth, lower)]
    for name, ours, theirs, exact in zip(
        ("loss", "hidden", "weight", "bias"), *results, truth, strict=True
    ):
        assert ours.dtype == theirs.dtype == torch.float32
        assert_close_to_reference(
            ours.bfloat16().detach(), exact.detach(), theirs.bfloat16().detach(), what=name
        )


BAD = [
    ({"hidden": [1.0]}, TypeError, "hidden to be a tensor, got list"),
    ({"target": None}, TypeError, "target to be a tensor, got NoneType"),
    ({"hidden": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "floating dtype"),
    ({"hidden": torch.tensor(1.0)}, ValueError, r"\[\.\., H\], got a scalar"),
    ({"target": torch.zeros(3)}, TypeError, "torch.int64 .*got torch.float32"),
    ({"target": torch.zeros(3, dtype=torch.int32)}, TypeError, "got torch.int32"),
    ({"target": torch.zeros(2, dtype=torch.int64)}, ValueError, r"\[3\], got \[2\]"),
    ({"weight": torch.ones(5, 3)}, ValueError, r"H = 4, got \[5, 3\]"),
    ({"weight": torch.ones(5)}, ValueError, r"got \[5\]"),
    ({"weight": torch.ones(5, 4).double()}, TypeError, "hidden's dtype torch.float32"),
    ({"bias": torch.ones(4)}, ValueError, r"bias of shape \[V\] = \[5\], got \[4\]"),
    ({"bias": torch.ones(5).half()}, TypeError, "bias of hidden's dtype"),
    ({"class_weight": torch.ones(5, 1)}, ValueError, r"class_weight of shape \[V\] = \[5\]"),
    ({"class_weight": torch.ones(5).requires_grad_()}, ValueError, "has no gradient"),
    ({"reduction": "average"}, ValueError, "'mean', 'sum', 'none'.*got 'average'"),
    ({"label_smoothing": 1.5}, ValueError, "between 0 and 1, got 1.5"),
    ({"label_smoothing": math.nan}, ValueError, "between 0 and 1, got nan"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[row[2] for row in BAD])
def test_bad_arguments(change, kind, message):
    good = {"hidden": torch.ones(3, 4), "weight": torch.ones(5, 4), "bias": torch.ones(5)}
    good |= {"target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(kind, match=f"^fastseq.linear_cross_entropy: expected.*{message}"):
        linear_cross_entropy(**(good | change))
