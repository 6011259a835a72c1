"""The Triton kernels by Triton's interpreter, on CPU tensors: numbers against float64.

Run by test_attention.py in a process of its own, with TRITON_INTERPRET=1. It shows no race and no
bank conflict, and multiplies bfloat16 tiles in float32.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from fastseq.kernels import _lang, _launch, attention
from fastseq.kernels.attention import launch

from fastseq.ops import attention_plain

assert _lang.INTERPRET, "expected TRITON_INTERPRET=1"
attention.why_not_available = lambda: None


def interpreted(stage):
    plain, first = getattr(attention_plain, stage), 0 if stage.endswith("fwd") else 2

    def call(*arguments):
        run = (
            plain if attention.obstacle(*arguments[first : first + 3]) else attention.kernel(stage)
        )
        CALLS.append(stage if run is not plain else f"plain {stage}")
        return run(*arguments)

    return call


CALLS: list[str] = []
# Before the operators are registered: what would run on a GPU now runs on CPU tensors.
for _stage in attention.STAGES:
    setattr(attention_plain, _stage, interpreted(_stage))

from fastseq import functional  # noqa: E402
from fastseq.reference import scores  # noqa: E402
from fastseq.testing import assert_matches, run_with_grads, with_layout  # noqa: E402
from fastseq.testing_attention import SCORES, attention_case  # noqa: E402
from tests.kernels.ordered_accesses import Accesses  # noqa: E402

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


@pytest.fixture(params=[0, 64], ids=["whole", "parts"], autouse=True)
def processors(request, monkeypatch):
    """Multiprocessors there seem to be: with many, a source is split into parts."""
    monkeypatch.setattr(launch, "_device", lambda index: ("interpreter", request.param))
    monkeypatch.setattr(launch, "_LEAST_SPAN", 1)
    # Plans know how many there were.
    _launch.forget()
    CALLS.clear()
    yield request.param
    assert CALLS and not any(call.startswith("plain") for call in CALLS)


def check(case):
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


# Where parts make no difference.
ONCE = pytest.mark.parametrize("processors", [pytest.param(64, id="parts")], indirect=True)


# Each extent on both sides of its block, and of several blocks; C, K and Q beyond one tile.
SIZES = [
    (4, 1, 5, 7, 3),
    (4, None, 33, 129, 17),
    (3, 2, 32, 32, 16),
    (3, 17, 31, 33, 5),
    (5, 5, 69, 8, 65),
    (1, 3, 1, 1, 1),
]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "index,size", list(enumerate(SIZES)), ids=lambda v: str(v).replace(" ", "")
)
def test_values_and_gradients(index, size, score):
    where = [{}, {"lengths": True}, {"mask": "source"}, {"mask": "query"}, {"lengths": True}, {}]
    check(
        attention_case(
            score,
            *size,
            **where[(index + SCORES.index(score)) % 6],
            extra=index % 2 == 0,
            g=index % 3 == 0,
            scale=0.7,
            seed=index,
        )
    )


@pytest.mark.parametrize("where", [{"lengths": True}, {"lengths": True, "mask": "query"}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_every_dtype(score, dtype, where):
    options = dict(extra=True, dtype=DTYPES[dtype], **where)
    check(attention_case(score, 5, 6, 40, 24, 20, **options))
    check(attention_case(score, 5, None, 40, 24, 20, **options))


@pytest.mark.parametrize("layout", ["transposed", "strided", "sliced", "offset", "expanded"])
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_strides(score, layout):
    case = attention_case(score, 3, 4, 6, 8, extra=True, mask="query", lengths=True)
    case = case.map(lambda t: with_layout(t, layout))
    case.where["mask"] = case.where["mask"].mT.contiguous().mT
    kind = torch.int32 if layout == "sliced" else torch.int64
    case.where["lengths"] = case.where["lengths"].to(kind).repeat_interleave(2)[::2]
    case.cotangents[:] = [with_layout(c, layout) for c in case.cotangents]
    check(case)


@pytest.mark.parametrize("score", SCORES)
def test_nowhere_to_look(score):
    for where in ({"lengths": True}, {"mask": "source"}):
        case = attention_case(score, 1, 2, 40, 4, **where)
        found = run_with_grads(case.functional(functional), case.inputs, case.cotangents)
        for name, tensor in found.items():
            assert not tensor.any() and tensor.isfinite().all(), f"{case} {name}"


@ONCE
def test_a_part_that_sees_nothing_has_no_say():
    """Its maximum is no maximum: here all scores are some -300, and exp of them is 0."""
    case = attention_case("dot", 4, 2, 150, 8, lengths=True)
    case.inputs["query"] = case.inputs["query"].abs() + 6.0
    case.inputs["keys"] = -case.inputs["keys"].abs() - 6.0
    check(case)


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_one_cotangent_alone(score):
    case = attention_case(score, 3, 4, 40, 8, lengths=True)
    for kept in (0, 1):

        def one(module, kept=kept):
            return lambda *tensors: case.functional(module)(*tensors)[kept]

        wrt = [name for name in case.inputs if kept == 0 or name != "values"]
        assert_matches(
            one(functional), one(scores), one(scores), case.inputs, [case.cotangents[kept]], wrt=wrt
        )


class Softmax(torch.autograd.Function):
    """Over the last dimension; its gradient by differences, p_i sum_j p_j (g_i - g_j), which loses
    nothing where one weight is nearly 1. Neither float64 nor torch's float32 has the rest then."""

    @staticmethod
    def forward(ctx, scores):
        weights = torch.softmax(scores, -1)
        ctx.save_for_backward(weights)
        return weights

    @staticmethod
    def backward(ctx, g):
        (p,) = ctx.saved_tensors
        return p * ((g.unsqueeze(-1) - g.unsqueeze(-2)) * p.unsqueeze(-2)).sum(-1)


def resolved(call):
    """``call`` of the reference, with that gradient."""

    def differing(*tensors):
        with mock.patch.object(scores.F, "softmax", lambda e, dim: Softmax.apply(e)):
            return call(*tensors)

    return differing


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_gradients_of_scores_sum_to_zero(score):
    """Nearly one-hot weights: a mean taken off once leaves the largest weight's gradient at what
    rounding made of it, where it should be minus the sum of the others'."""
    case = attention_case(score, 4, 5, 70, 16, scale=12.0)
    case.inputs["values"] += 30.0
    wrt = ["query", "keys"]
    found = run_with_grads(case.functional(functional), case.inputs, case.cotangents, wrt=wrt)
    wide = case.to(torch.float64)
    truth = run_with_grads(resolved(wide.functional(scores)), wide.inputs, wide.cotangents, wrt=wrt)
    by_torch = run_with_grads(case.functional(scores), case.inputs, case.cotangents, wrt=wrt)
    for name in ("grad query", "grad keys"):
        ours, theirs = (
            (got[name] - truth[name]).norm() / truth[name].norm() for got in (found, by_torch)
        )
        assert ours < 0.5 * theirs


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_large_scores_and_nan(score):
    check(attention_case(score, 3, 4, 40, 8, scale=20.0, lengths=True))
    case = attention_case(score, 3, 4, 40, 8, scale=200.0, lengths=True)
    oracle = case.functional(scores)
    assert_matches(
        case.functional(functional), resolved(oracle), oracle, case.inputs, case.cotangents
    )
    case = attention_case(score, 3, 4, 40, 8)
    case.inputs["keys"][1, 33, 2] = float("nan")
    context, weights = case.functional(functional)(*case.inputs.values())
    for tensor in (context, weights):
        assert tensor[1].isnan().all() and tensor[0::2].isfinite().all()


@ONCE
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["query", "keys", "values", "extra", "mask"])
def test_offsets_beyond_31_bits(name, dim):
    """Strides fit 32 bits and their multiples do not; what lies between is never touched."""
    case = attention_case("additive", 3, 3, 3, 8, 5, extra=True, mask="query", dtype=torch.float16)
    near = run_with_grads(case.functional(functional), case.inputs, case.cotangents)
    tensors = case.where if name == "mask" else case.inputs
    strides = list(tensors[name].stride())
    strides[dim] = 2**30
    memory = torch.empty(2**31 + 2**20, dtype=tensors[name].dtype)
    far = memory.as_strided(tensors[name].shape, strides)
    tensors[name] = far.copy_(tensors[name])
    found = run_with_grads(case.functional(functional), case.inputs, case.cotangents)
    for what, expected in near.items():
        assert torch.equal(found[what], expected), what


def test_lengths_beyond_the_source_read_nothing_beyond_it(processors):
    """Lengths on a GPU are not checked; the kernels clamp them."""
    case = attention_case("additive", 3, 4, 40, 8)
    full = case.functional(functional)(*case.inputs.values())
    tensors = [*case.inputs.values(), None, None, torch.tensor([40, 41, 10**12]), 1.0]
    found = torch.ops.fastseq.additive_attention_fwd(*tensors)
    assert all(map(torch.equal, found, full))


@pytest.mark.parametrize("near", [0.0, 0.3999, 0.4, 8.0, 9.5, 44.0, 1e4, 3e38, float("inf")])
def test_tanh_at_its_edges(near):
    """Through a score of one term: q + k = x, v = 1, and the weights' ratio gives tanh back."""
    if near == float("inf"):
        x = torch.tensor([near, -near])
    else:
        x = torch.tensor([near, -near, near * 1.0001, near * 0.9999])
    case = attention_case("additive", 1, 1, len(x), 1, 1)
    case.inputs.update(query=torch.zeros(1, 1, 1), keys=x.view(1, -1, 1), v=torch.ones(1))
    case.inputs["values"] = torch.arange(len(x), dtype=torch.float32).view(1, -1, 1)
    check(case)


@triton.jit
def _tanh_kernel(x, y, N: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, _lang.tanh(tl.load(x + i), "exact"))


@ONCE
def test_the_error_of_tanh_is_as_documented():
    """kernels/README.md: at most 3.7 units of 2^-24, with an exp2 that is rounded correctly."""
    x = torch.cat([torch.linspace(-12, 12, 3 << 13), torch.linspace(-0.5, 0.5, 1 << 13)])
    y = torch.empty_like(x)
    _tanh_kernel[len(x) // 1024,](x, y, 1024)
    exact = x.double().tanh()
    error = (y.double() - exact).abs() / torch.clamp(exact.abs(), min=2.0**-126) * 2**24
    CALLS.append("tanh")
    assert 1 < error.max() < 4.5, error.max()


RACED = [(2, 3, 40, 35, 33), (2, None, 40, 35, 33), (1, 17, 70, 33, 5)]


@pytest.mark.parametrize("dtype", ["f32", "f16"])
@pytest.mark.parametrize("score", ["additive", "dot"])
def test_nothing_depends_on_which_thread_comes_first(score, dtype):
    for size in RACED:
        where = {"lengths": True, "mask": "query" if size[1] else "source"}
        case = attention_case(score, *size, extra=True, dtype=DTYPES[dtype], **where)
        with Accesses() as accesses:
            run_with_grads(case.functional(functional), case.inputs, case.cotangents)
        assert not accesses.conflicts, f"{case}: {accesses.conflicts[:3]}"
        assert accesses.launches >= 2


def test_a_missing_barrier_is_seen(processors):
    """Each of those of each kernel."""
    for score in ("additive", "dot"):
        case = attention_case(score, 1, 3, 70, 35, 33)
        leaves = [t.clone().requires_grad_() for t in case.inputs.values()]
        for without in range(1 if processors else 2):
            with Accesses(without) as forward:
                outputs = case.functional(functional)(*leaves)
            assert 0 in {launch for launch, _ in forward.conflicts}, (score, without)
        # One that walks over a source in parts of a block each has nothing to wait for.
        expected = {0} if score == "dot" or processors else {0, 1}
        for without in range(2):
            with Accesses(without) as backward:
                torch.autograd.grad(outputs, leaves, case.cotangents, retain_graph=True)
            assert {launch for launch, _ in backward.conflicts} == expected, (score, without)
