"""The Triton attention kernels against float64, on a GPU or by Triton's interpreter.

What is checked is the same in both places: with a GPU these tests run as they are, without one
test_attention.py runs them under TRITON_INTERPRET=1, with fewer sizes. See on_device.py. Here is
what is special to these kernels, and their sizes; what every kernel of attention has to do is in
test_functional_attention.py, ops/ and nn/, which run on a GPU too.
"""

from __future__ import annotations

import itertools
import os
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("no GPU", allow_module_level=True)

from fastseq.kernels import _lang, attention  # noqa: E402

from tests.kernels.on_device import (  # noqa: E402
    DEVICE,
    INTERPRETED,
    ONCE,
    instructions_off_by,
    no_call,
    processors,  # noqa: F401
)

BOTH = pytest.mark.parametrize("score", ["additive", "dot"])

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
WHERE = [{}, {"lengths": True}, {"mask": "query"}, {"mask": "source", "lengths": True}]

# B, Q, S, K, C: each extent on both sides of its block, and of several; C, K and Q beyond a tile.
SIZES = [
    (4, 1, 5, 7, 3),
    (4, None, 33, 129, 17),
    (3, 2, 32, 32, 16),
    (3, 17, 31, 33, 5),
    (5, 5, 69, 8, 65),
    (1, 3, 1, 1, 1),
]
# For every dtype: many queries and one, aligned and not.
FEW = [(3, 2, 9, 5, 7), (3, None, 16, 16, 16)]
EDGES = edge_sizes(16, 32, tile=64)
if not INTERPRETED:
    FEW += [(5, 1, 40, 64, 32), (5, None, 40, 64, 32), (3, 17, 31, 33, 5), (64, 40, 41, 512, 130)]
    FEW += [(3, q, 40, 64, 32) for q in EDGES]
    FEW += [(3, 4, s, 64, 32) for s in EDGES]
    FEW += [(3, 4, 40, k, 32) for k in (*EDGES, 257)]
    FEW += [(3, 4, 40, 64, c) for c in (*EDGES, 257)]
    FEW += [(1, 1, 5000, 64, 64), (2, 3, 3001, 130, 70)]


def drawn(*arguments, **options):
    return attention_case(*arguments, **options).to(DEVICE)


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


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "index,size", list(enumerate(SIZES)), ids=lambda v: str(v).replace(" ", "")
)
def test_values_and_gradients(index, size, score):
    where = [{}, {"lengths": True}, {"mask": "source"}, {"mask": "query"}, {"lengths": True}, {}]
    check(
        drawn(
            score,
            *size,
            **where[(index + SCORES.index(score)) % 6],
            extra=index % 2 == 0,
            g=index % 3 == 0,
            scale=0.7,
            seed=index,
        )
    )


@pytest.mark.parametrize("where", WHERE, ids=lambda where: "+".join(where) or "everywhere")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_every_dtype(score, dtype, where):
    for index, size in enumerate(FEW):
        # Beyond the first sizes a quarter of the places to look at each: there are many.
        if index < 4 or WHERE[index % len(WHERE)] == where:
            options = dict(extra=index % 2 == 0, g=index % 3 == 0, scale=0.7, seed=index)
            check(drawn(score, *size, **where, **options, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("size", [1.0, 1e-4])
@pytest.mark.parametrize("dtype", ["bf16", "f16"])
@BOTH
def test_scores_gradients_in_half_are_rounded_once(score, dtype, size):
    """kernels/README.md: what the products of the dot score lose by taking d_e in half precision
    is no more than u |d_e| |k| and u |d_e|^T |q|, and the additive score loses nothing by it; the
    rest is one rounding of the result."""
    case = drawn(score, 2, 3, 40, 16, 16, scale=0.25, dtype=DTYPES[dtype])
    case.cotangents[:] = [c * size for c in case.cotangents]
    found = check(case)
    query, keys, values, *v = (t.double() for t in case.inputs.values())
    upstream, weights = [c.double() for c in case.cotangents], found["weights"].double()
    d_p = upstream[0] @ values.mT + upstream[1]
    for _ in range(2):
        d_p -= (weights * d_p).sum(-1, keepdim=True)
    d_e = 0.25 * weights * d_p
    limits = torch.finfo(DTYPES[dtype])
    u, least = limits.eps / 2, limits.smallest_normal * limits.eps
    if score == "dot":
        truths = d_e @ keys, d_e.mT @ query
        # A number too small to be normal is rounded to a multiple of the least.
        lost = u * d_e.abs() + least / 2
        lost = lost @ keys.abs(), lost.mT @ query.abs()
    else:
        terms = d_e.unsqueeze(-1) * v[0]
        slopes = 1 - torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) ** 2
        truths = (terms * slopes).sum(2), (terms * slopes).sum(1)
        # Sums, and tanh, in float32.
        lost = 2e-6 * terms.abs().sum(2), 2e-6 * terms.abs().sum(1)
    for name, truth, by_d_e in zip(("grad query", "grad keys"), truths, lost, strict=True):
        most = by_d_e + u * truth.abs() + least
        # cuBLAS may add parts of a sum in half precision; the interpreter cuts bfloat16 off.
        most *= 1.02 if INTERPRETED and dtype == "f16" else 2.0
        error = (found[name].double() - truth).abs()
        assert (error <= most).all(), (name, float((error / most).max()))


@ONCE
def test_a_part_that_sees_nothing_has_no_say():
    """Its maximum is no maximum: here all scores are some -300, and exp of them is 0."""
    case = drawn("dot", 4, 2, 150, 8, lengths=True)
    case.inputs["query"] = case.inputs["query"].abs() + 6.0
    case.inputs["keys"] = -case.inputs["keys"].abs() - 6.0
    check(case)


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


@BOTH
def test_gradients_of_scores_sum_to_zero(score, processors):  # noqa: F811
    """Nearly one-hot weights: a mean taken off once leaves the largest weight's gradient at what
    rounding made of it, where it should be minus the sum of the others'."""
    case = drawn(score, 4, 5, 70, 16, scale=12.0)
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
        # A GPU's special functions are less exact; one mean alone is behind torch all the same.
        assert ours < (0.5 if INTERPRETED and not processors else 0.9) * theirs, (ours, theirs)


@BOTH
def test_large_scores(score):
    check(drawn(score, 3, 4, 40, 8, scale=20.0, lengths=True))
    case = drawn(score, 3, 4, 40, 8, scale=200.0, lengths=True)
    oracle = case.functional(scores)
    assert_matches(
        case.functional(functional), resolved(oracle), oracle, case.inputs, case.cotangents
    )


@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@BOTH
def test_special_values_stay_in_their_row(score, special):
    case = drawn(score, 3, 4, 40, 8)
    case.inputs["keys"][1, 33, 2] = special
    check(case)
    context, weights = case.functional(functional)(*case.inputs.values())
    for tensor in (context, weights):
        assert tensor[0::2].isfinite().all()
        if special != special:
            assert tensor[1].isnan().all()


@ONCE
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("name", ["query", "keys", "values", "extra", "mask"])
def test_offsets_beyond_31_bits(name, dim):
    """Strides fit 32 bits and their multiples do not; what lies between is never touched."""
    case = drawn("additive", 3, 3, 3, 8, 5, extra=True, mask="query", dtype=torch.float16)
    near = run_with_grads(case.functional(functional), case.inputs, case.cotangents)
    tensors = case.where if name == "mask" else case.inputs
    strides = list(tensors[name].stride())
    strides[dim] = 2**30
    memory = torch.empty(2**31 + 2**20, dtype=tensors[name].dtype, device=DEVICE)
    far = memory.as_strided(tensors[name].shape, strides)
    tensors[name] = far.copy_(tensors[name])
    found = run_with_grads(case.functional(functional), case.inputs, case.cotangents)
    for what, expected in near.items():
        assert torch.equal(found[what], expected), what


def test_results_beyond_31_bits():
    """Only the last row's source is not empty, and it lies beyond."""
    rows = 4 if INTERPRETED else 2**31 // (1024 * 512) + 2
    S, K = (40, 8) if INTERPRETED else (1024, 512)
    keys = torch.empty(rows, S, K, device=DEVICE, dtype=torch.float16)
    keys[-1].normal_()
    query = torch.randn(rows, K, device=DEVICE, dtype=torch.float16)
    v = torch.randn(K, device=DEVICE, dtype=torch.float16)
    lengths = torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    lengths[-1] = S
    found = functional.additive_attention(query, keys, keys, v, lengths=lengths)
    last = [t[-1:] for t in (query, keys, keys)]
    truth = scores.additive_attention(*(t.double() for t in last), v.double())
    yardstick = scores.additive_attention(*last, v)
    for tensor, exact, baseline in zip(found, truth, yardstick, strict=True):
        assert_close_to_reference(tensor[-1:], exact, baseline)
        assert not tensor[:-1].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@BOTH
def test_lengths_beyond_the_source(score, dtype):
    """Lengths on a GPU are not checked; the kernels take 10**12 for S, and -1 for 0."""
    case = drawn(score, 5, 3, 40, 8)
    op = getattr(torch.ops.fastseq, f"{score}_attention_fwd")
    none = [None] * (score == "additive")
    most = 10**12 if dtype == torch.int64 else 2**31 - 1

    def call(*lengths):
        found = torch.tensor(lengths, device=DEVICE, dtype=dtype)
        return lambda *tensors: op(*tensors, *none, None, found, 1.0)

    expected, found = (
        run_with_grads(call(*lengths), case.inputs, case.cotangents)
        for lengths in ((40, 40, 40, 0, 0), (40, 41, most, 0, -1))
    )
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert not found["out0"][3:].any() and not found["grad keys"][3:].any()


# An argument made such as does not fit the rest.
WRONG = {
    "fewer": lambda t: t[..., :-1],
    "rows": lambda t: t[:1],
    "dimension": lambda t: t.unsqueeze(0),
    "dtype": lambda t: t.to(torch.float64),
    "device": lambda t: t.to("meta"),
}
ARGUMENTS = {
    "fwd": "query keys values v extra mask lengths".split(),
    "bwd": "d_context d_weights query keys values v extra lengths weights".split(),
}


@ONCE
@pytest.mark.parametrize("stage", ARGUMENTS)
@BOTH
def test_arguments_that_do_not_go_together_are_refused(score, stage):
    """A kernel has addresses: nothing else keeps it inside its tensors."""
    case = drawn(score, 2, 3, 5, 8, 6, extra=True, mask="query", lengths=True)
    kernel = attention.kernel(f"{score}_{stage}")
    context, weights = case.functional(functional)(*case.inputs.values())
    known = case.inputs | case.where
    known |= {"d_context": context, "d_weights": weights, "weights": weights}
    given = {name: known[name] for name in ARGUMENTS[stage] if name in known}
    rest = (0.7,) if stage == "fwd" else (0.7, True, True)
    kernel(*given.values(), *rest)
    # A width that is nobody else's; and what torch's own products look after, these in their way.
    free = {("values", "fewer")} if stage == "fwd" else set()
    if (score, stage) == ("dot", "bwd"):
        free = set(itertools.product(("query", "keys"), ("fewer", "device")))
    for name, (kind, change) in itertools.product(given, WRONG.items()):
        if (name, kind) in free:
            continue
        wrong = given | {name: change(given[name])}
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            kernel(*wrong.values(), *rest)
            pytest.fail(f"{name}: {kind}")
    if stage == "fwd":
        for mask in (given["mask"].long(), given["mask"][:, :2], given["mask"][0]):
            with pytest.raises(RuntimeError, match=f"fastseq.{score}_attention_fwd: expected mask"):
                kernel(*(given | {"mask": mask}).values(), *rest)


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
    check(case.to(DEVICE))


@triton.jit
def _tanh_kernel(x, y, N: tl.constexpr, TANH: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + i, _lang.tanh(tl.load(x + i), TANH))


# Where the forms of tanh are worst, by a search through all float32.
WORST = [0.5502050518989563, 0.4007117748260498, 0.4003302752971649, 0.2774137556552887]
# Form, units in the last place of ex2 and rcp, error of the result in units of 2^-24, all of it in
# kernels/README.md. On a GPU the instructions' own errors take the place of these.
FORMS = [("exact", 0, 0, 3.6), ("rcp", 0, 0, 3.6), ("rcp", -2, 1, 9.9), ("rcp", 2, -1, 9.5)]
FORMS += [("fast", 0, 0, 2.0**13 + 1)]


@no_call
@ONCE
@pytest.mark.parametrize("form,ex2,rcp,most", FORMS)
def test_the_error_of_tanh_is_as_documented(form, ex2, rcp, most):
    if _lang.BACKEND == "hip" and form != "exact":
        pytest.skip("an instruction of NVIDIA's")
    x = torch.cat([torch.linspace(-12, 12, 3 << 13), torch.linspace(-0.5, 0.5, 1 << 13)])
    x[:4] = torch.tensor(WORST)
    x = x.to(DEVICE)
    y = torch.empty_like(x)
    with instructions_off_by(ex2, rcp):
        _tanh_kernel[len(x) // 1024,](x, y, 1024, form)
    exact = x.double().tanh()
    error = (y.double() - exact).abs() / torch.clamp(exact.abs(), min=2.0**-126) * 2**24
    found = float(error.max())
    assert found < (most if INTERPRETED else max(most, 9.9)), found
    # Near zero no special function has a part in it.
    assert form == "fast" or float(error[x.abs() < 0.4].max()) < 3.0
    # What is documented is no more than there is.
    assert not INTERPRETED or form == "fast" or found > most - 0.1, found


@pytest.mark.parametrize("fits", [True, False], ids=["aligned", "unaligned"])
@pytest.mark.parametrize(
    "score,dtype",
    # The other scores have no kernels of their own.
    [*itertools.product(("additive", "dot"), DTYPES), *((score, "f32") for score in SCORES[2:])],
)
def test_small(score, dtype, fits):
    """For compute-sanitizer: every kernel, as few times as show it."""
    K, C = (32, 16) if fits else (35, 17)
    options = dict(extra=True, lengths=True, dtype=DTYPES[dtype])
    check(drawn(score, 2, 3, 48 if fits else 33, K, C, mask="query", **options))
    check(drawn(score, 2, None, 48 if fits else 33, K, C, **options))


@BOTH
def test_same_bits_every_time(score):
    size = (2, 3, 70, 33, 17) if INTERPRETED else (4, 33, 700, 130, 65)
    case = drawn(score, *size, lengths=True)
    call = case.functional(functional)
    first = run_with_grads(call, case.inputs, case.cotangents)
    for _ in range(1 if INTERPRETED else 20):
        for name, tensor in run_with_grads(call, case.inputs, case.cotangents).items():
            assert torch.equal(tensor, first[name]), name


def captured(call):
    """What replays ``call`` by a CUDA graph, and its outputs; without a GPU, by calling it."""
    if INTERPRETED:
        outputs = call()
        return lambda: [o.copy_(new) for o, new in zip(outputs, call(), strict=True)], outputs
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


@BOTH
@pytest.mark.parametrize("S", [40, 150 if INTERPRETED else 5000])
def test_graph_capture_of_a_decoding_step(score, S):
    """Captured once, replayed on other numbers and other lengths."""
    size = (3, None, S, 64, 32)
    case = drawn(score, *size, lengths=True)
    with torch.no_grad():
        replay, outputs = captured(lambda: case.functional(functional)(*case.inputs.values()))
        for seed in (1, 2):
            other = drawn(score, *size, lengths=True, seed=seed)
            for name, tensor in case.inputs.items():
                tensor.copy_(other.inputs[name])
            case.where["lengths"].copy_(other.where["lengths"])
            replay()
            expected = case.functional(functional)(*case.inputs.values())
            assert all(map(torch.equal, outputs, expected))


# What results may be off by, relative, in the Frobenius norm: those of the kernels, and gradients
# that are products of torch's. For them cuBLAS rounds both factors to TF32, under either switch:
# 2^-11 each, so twice that.
SWITCH = {"high": (2e-5, 1e-3), "medium": (3e-3, 3e-3)}
BY_TORCH = {
    "additive": {"grad values"},
    "dot": {"grad values", "grad query", "grad keys"},
}


def as_tf32(t):
    """Rounded to its 10 bits after the leading one."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("switch", SWITCH)
@BOTH
def test_the_precision_switch(score, switch, monkeypatch):
    """Where nothing else would, torch's products round as cuBLAS does: so the table is seen to name
    them all and no other."""
    case = drawn(score, 2, 17, 20, 64, 32, scale=1.0 if score == "additive" else 0.125)
    wide = case.to(torch.float64)
    exact = run_with_grads(wide.functional(scores), wide.inputs, wide.cotangents)
    if INTERPRETED:
        bmm = torch.bmm
        monkeypatch.setattr(torch, "bmm", lambda *factors: bmm(*map(as_tf32, factors)))
    torch.set_float32_matmul_precision(switch)
    try:
        found = run_with_grads(case.functional(functional), case.inputs, case.cotangents)
    finally:
        torch.set_float32_matmul_precision("highest")
    kernels, torchs = SWITCH[switch]
    for name, truth in exact.items():
        error = (found[name] - truth).norm() / truth.norm()
        assert error < (torchs if name in BY_TORCH[score] else kernels), (name, error)
        if INTERPRETED and switch == "high":
            assert (error > kernels) == (name in BY_TORCH[score]), (name, error)


def test_the_fast_tanh_is_as_good_as_documented():
    """Under "medium" a score is off by at most sum |v| 2^-11, a weight by e to twice that."""
    case = drawn("additive", 4, 5, 40, 64)
    wide = case.to(torch.float64)
    exact = wide.functional(scores)(*wide.inputs.values())[1]
    torch.set_float32_matmul_precision("medium")
    try:
        found = case.functional(functional)(*case.inputs.values())[1]
    finally:
        torch.set_float32_matmul_precision("highest")
    error = 2.0**-11 + torch.finfo(torch.float32).eps
    bound = torch.expm1(2 * error * case.inputs["v"].double().abs().sum())
    assert ((found - exact).abs() <= bound * exact).all()
