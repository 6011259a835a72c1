"""The attention functions against the float64 reference: values, gradients, masks, errors."""

from __future__ import annotations

import itertools
import math
import os
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq
from fastseq import functional
from fastseq.ops import attention, attention_plain
from fastseq.reference import scores
from fastseq.testing import (
    LAYOUTS,
    assert_close_to_reference,
    assert_matches,
    edge_sizes,
    run_with_grads,
    with_layout,
)
from fastseq.testing_attention import SCORES, AttentionCase, attention_case

pytestmark = pytest.mark.usefixtures("device")
# Triton's, on CPU tensors: see tests/kernels/on_device.py.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
}


def check(case: AttentionCase) -> None:
    """The function against the reference, with the reference in the same dtype as yardstick."""
    ours, oracle = case.functional(functional), case.functional(scores)
    where = dict(names=case.names, what=str(case))
    assert_matches(ours, oracle, oracle, case.inputs, case.cotangents, **where)


def run(case: AttentionCase, module=functional) -> dict:
    return run_with_grads(case.functional(module), case.inputs, case.cotangents, names=case.names)


def grid() -> list[tuple[int, int | None, int, int, int]]:
    """(B, Q, S, K, C): each extent alone through its edges, then random combinations."""
    edges = edge_sizes(4, 8, 16)
    sizes = [(b, 3, 5, 6, 4) for b in (0, 1, 2, 7)]
    sizes += [(3, q, 5, 6, 4) for q in (None, 0, 1, 2, 17)]
    sizes += [(3, 2, s, 6, 4) for s in (0, *edges, 67)]
    sizes += [(3, 2, 5, k, 4) for k in (0, *edges, 131)]
    sizes += [(3, 2, 5, 6, c) for c in (0, 1, 3, 33)]
    draw = random.Random(0)
    sizes += [tuple(draw.choice(edges) for _ in range(5)) for _ in range(8)]
    # More terms than a tile holds: a part of the queries, then a part of the rows.
    return [*sizes, (4, 9, 61, 300, 7), (5, 3, 130, 700, 2)]


WHERE = [
    {"lengths": lengths, "mask": mask}
    for lengths, mask in itertools.product((False, True), (None, "source", "query"))
]
OPTIONS = [
    dict(extra=extra, bias=bias, g=g, scale=scale)
    for extra, bias, g, scale in itertools.product(*[(False, True)] * 3, (1.0, 0.3))
]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(
    "index,size", list(enumerate(grid())), ids=lambda v: str(v).replace(" ", "")
)
def test_values_and_gradients(index, size, score):
    for turn, dtype in enumerate((torch.float32, torch.float64)):
        where, options = WHERE[(index + turn) % 6], OPTIONS[index * 5 % 16]
        if 0 in size:
            # The norm of an empty v has no gradient.
            options = options | {"g": False}
        check(attention_case(score, *size, **where, **options, dtype=dtype, seed=index))


@pytest.mark.parametrize("where", WHERE, ids=lambda w: "-".join(map(str, w.values())))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_every_mask_and_dtype(score, dtype, where):
    options = dict(extra=True, bias=True, g=True, scale=0.5, dtype=DTYPES[dtype])
    check(attention_case(score, 5, 7, 19, 24, 9, **where, **options))
    check(attention_case(score, 5, None, 19, 24, 9, **where | {"mask": None}, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_nowhere_to_look(score, dtype):
    """Zero context and weights, and gradients that are zero rather than NaN."""
    for where in ({"lengths": True}, {"mask": "source"}, {"mask": "query"}):
        case = attention_case(score, 1, 2, 3, 4, **where, dtype=DTYPES[dtype])
        for name, tensor in run(case).items():
            assert not tensor.any() and tensor.isfinite().all(), f"{case} {name}"


def test_scores_beyond_the_range_of_exp():
    """The softmax of large scores is the softmax of their differences."""
    for score in ("additive", "dot"):
        case = attention_case(score, 2, 3, 9, 8, scale=300.0, lengths=True)
        check(case)


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "contiguous"])
@pytest.mark.parametrize("score", SCORES)
def test_strides(score, layout):
    case = attention_case(score, 3, 4, 6, 8, extra=True, bias=True, lengths=True)
    for name in case.inputs:
        check(case.map(lambda t: with_layout(t, layout), name))
    case = attention_case(score, 3, 4, 6, 8, extra=True, bias=True, lengths=True, mask="query")
    case = case.map(lambda t: with_layout(t, layout))
    case.where["mask"] = case.where["mask"].mT.contiguous().mT
    kind = torch.int32 if layout == "sliced" else torch.int64
    case.where["lengths"] = case.where["lengths"].to(kind).repeat_interleave(2)[::2]
    case.cotangents[:] = [with_layout(c, layout) for c in case.cotangents]
    check(case)


@pytest.mark.parametrize("score", SCORES)
def test_strides_of_a_single_length(score):
    """A tensor of one element is contiguous whatever its stride."""
    for kind in (torch.int64, torch.int32):
        case = attention_case(score, 1, 4, 6, 8, lengths=True)
        case.where["lengths"] = case.where["lengths"].to(kind).repeat_interleave(2)[::2]
        check(case)


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_beyond_lengths_no_gradient_of_any_cotangent(score):
    case = attention_case(score, 2, 3, 20, 8)
    case.where["lengths"] = torch.tensor([7, 20], device=case.inputs["keys"].device)
    case.cotangents[0][0, 1, 2] = math.inf
    found = run(case)
    assert not found["grad keys"][0, :7].isfinite().all()
    assert not found["grad keys"][0, 7:].any()


@pytest.mark.parametrize("score", SCORES)
def test_gradients_of_some_inputs(score):
    case = attention_case(score, 3, 4, 6, 8, extra=True, bias=True, g=True, lengths=True)
    whole = run(case)
    for name in case.inputs:
        found = run_with_grads(
            case.functional(functional), case.inputs, case.cotangents, wrt=[name]
        )
        assert torch.equal(found[f"grad {name}"], whole[f"grad {name}"]), name


@pytest.mark.parametrize("unused", [0, 1], ids=["weights alone", "context alone"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", SCORES)
def test_one_output_alone(score, dtype, unused):
    case = attention_case(score, 3, 4, 20, 8, lengths=True, dtype=DTYPES[dtype])

    def one(module):
        call = case.functional(module)
        return lambda *tensors: call(*tensors)[1 - unused]

    cotangent = [case.cotangents[1 - unused]]
    if unused == 0:
        case.inputs["values"] = case.inputs["values"].detach()
        wrt = [name for name in case.inputs if name != "values"]
    else:
        wrt = None
    assert_matches(
        one(functional), one(scores), one(scores), case.inputs, cotangent, wrt=wrt, what=str(case)
    )


@pytest.mark.parametrize("where", WHERE[1:5:3], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_differentiable_twice(score, where):
    options = dict(extra=True, bias=True, g=True, scale=0.7, dtype=torch.float64)
    case = attention_case(score, 2, 2, 3, 2, 2, **where, **options)
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    assert torch.autograd.gradcheck(case.functional(functional), leaves)
    assert torch.autograd.gradgradcheck(case.functional(functional), leaves)


def test_second_gradients_stop_at_the_call():
    """Where an input was made from another, each path is counted once."""
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def chained(module):
        def call(x):
            first, _ = module.dot_attention(x, x, x)
            return module.additive_attention(first, x * first, x, x[0, 0])[0]

        return call

    assert torch.autograd.gradgradcheck(chained(functional), [x])


@pytest.mark.parametrize("score", ["additive", "dot"])
def test_memory_stays_below_the_terms(score, device):
    """No tensor of size B x Q x S x K, in float32, forward or backward."""
    stages = attention.KERNELS.get(device.upper(), vars(attention_plain))
    plain = stages["additive_fwd"] is attention_plain.additive_fwd and not INTERPRETED
    B, Q, S, K = (3, 40, 50, 200) if plain else (2, 12, 20, 40)
    case = attention_case(score, B, Q, S, K, lengths=True)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            outputs = func(*args, **(kwargs or {}))
            for out in outputs if isinstance(outputs, (tuple, list)) else (outputs,):
                if isinstance(out, torch.Tensor):
                    largest = max(largest, out.untyped_storage().nbytes() // 4)
            return outputs

    leaves = [t.requires_grad_() for t in case.inputs.values()]
    with Watch():
        outputs = case.functional(scores)(*leaves)
    assert score == "dot" or largest >= B * Q * S * K
    largest = 0
    # A mode would stand in front of the operator; what runs inside is called as it is.
    tensors = tuple(t.detach() for t in case.inputs.values())
    more = (None,) if score == "additive" else ()
    with Watch():
        fwd, bwd = (stages[f"{score}_{stage}"] for stage in ("fwd", "bwd"))
        _, weights = fwd(*tensors, *more, None, case.where["lengths"], 1.0)
        bwd(*case.cotangents, *tensors, *more, None, weights, 1.0, True, True)
    limit = max(attention_plain._TILE, B * S * K) if plain else B * S * K
    assert 0 < largest <= limit < B * Q * S * K
    del outputs


@pytest.mark.parametrize("score", SCORES)
def test_same_bits_twice(score):
    case = attention_case(score, 5, 7, 19, 24, 9, extra=True, lengths=True)
    first, second = run(case), run(case)
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name


def test_results_share_no_memory_with_the_arguments():
    case = attention_case("dot", 2, 1, 1, 4, 4)
    before = {name: t.clone() for name, t in case.inputs.items()}
    context, weights = case.functional(functional)(*case.inputs.values())
    context.fill_(7.0)
    weights.fill_(7.0)
    assert all(torch.equal(t, before[name]) for name, t in case.inputs.items())


@pytest.mark.parametrize("score", SCORES)
def test_function_transforms(score):
    """vmap, jvp and vjp run the reference."""
    case = attention_case(score, 2, 3, 4, 5, extra=True, dtype=torch.float64)
    tensors = tuple(case.inputs.values())
    stacked = tuple(torch.stack((t, 2 * t)) for t in tensors)
    tangents = tuple(torch.ones_like(t) for t in tensors)

    def transformed(module):
        call = case.functional(module)
        return *torch.vmap(call)(*stacked), *torch.func.jvp(call, tensors, tangents)[1]

    for found, truth in zip(transformed(functional), transformed(scores), strict=True):
        assert_close_to_reference(found, truth, what=str(case), terms=case.terms)


@pytest.mark.parametrize("score", SCORES)
def test_torch_backend_is_the_reference(score):
    case = attention_case(score, 2, 3, 4, 5, extra=True, bias=True, g=True, lengths=True)
    with fastseq.use_backend("torch"):
        found = case.functional(functional)(*case.inputs.values())
    if score not in ("general", "concat"):
        # Those project first, in another order than the reference.
        truth = case.functional(scores)(*case.inputs.values())
        assert all(map(torch.equal, found, truth))


def test_a_forced_backend_that_cannot_run_raises(device):
    case = attention_case("dot", 2, 3, 4, 5)
    call = case.functional(functional)
    with fastseq.use_backend(device):
        call(*case.inputs.values())
        with pytest.raises(RuntimeError, match="fastseq.dot_attention: .*torch.func"):
            torch.vmap(call)(*(t.unsqueeze(0) for t in case.inputs.values()))


@pytest.mark.parametrize("score", SCORES)
def test_autocast(score, device):
    """As if every tensor had been given in autocast's dtype."""
    case = attention_case(score, 3, 4, 6, 8, extra=True, bias=True, lengths=True)
    half = case.to(torch.bfloat16)
    expected = half.functional(functional)(*half.inputs.values())
    with torch.autocast(device, dtype=torch.bfloat16):
        found = case.functional(functional)(*case.inputs.values())
        mixed = case.map(lambda t: t.bfloat16(), "query")
        mixed = mixed.functional(functional)(*mixed.inputs.values())
    assert all(t.dtype == torch.bfloat16 for t in found)
    for name, one, other, want in zip(case.names, found, mixed, expected, strict=True):
        assert torch.equal(one, other), name
        if score != "location":
            assert torch.equal(one, want), name


@pytest.mark.parametrize("score", SCORES)
def test_compiles_whole(score):
    """One graph, the same numbers, and no new graph for other sizes."""
    torch._dynamo.reset()
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    function = getattr(functional, f"{score}_attention")
    compiled = torch.compile(function, backend=counting, fullgraph=True, dynamic=True)
    # Sizes unequal among each other: torch takes equal ones for one and the same.
    for size in ((6, 14, 9, 8, 10), (11, 12, 13, 8, 10)):
        case = attention_case(score, *size, extra=True, lengths=True, mask="source")
        found = compiled(**case.inputs, **case.where)
        assert all(map(torch.equal, found, function(**case.inputs, **case.where)))
    assert len(graphs) == 1


def test_exports():
    class Model(torch.nn.Module):
        def forward(self, query, keys, v, lengths):
            return functional.additive_attention(query, keys, keys, v, lengths=lengths)

    tensors = torch.randn(3, 4, 6), torch.randn(3, 5, 6), torch.randn(6), torch.tensor([1, 5, 2])
    program = torch.export.export(Model(), tensors)
    assert all(map(torch.equal, program.module()(*tensors), Model()(*tensors)))
    assert "additive_attention_fwd" in str(program.graph)


Q, K, V = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6)
WRONG = {
    "keys of other rows": (
        dict(keys=torch.zeros(3, 5, 4)),
        ValueError,
        r"expected keys of shape \[B, S, K\] = \[2, S, 4\], got \[3, 5, 4\]",
    ),
    "keys of another width": (
        dict(keys=torch.zeros(2, 5, 3)),
        ValueError,
        r"expected keys of shape \[B, S, K\] = \[2, S, 4\], got \[2, 5, 3\]",
    ),
    "values of another length": (
        dict(values=torch.zeros(2, 4, 6)),
        ValueError,
        r"expected values of shape \[B, S, C\] = \[2, 5, C\], got \[2, 4, 6\]",
    ),
    "query without rows": (
        dict(query=torch.zeros(4)),
        ValueError,
        r"expected query of shape \[B, Q, K\], got \[4\]",
    ),
    "v a matrix": (
        dict(v=torch.zeros(1, 4)),
        ValueError,
        r"expected v of shape \[K\] = \[4\], got \[1, 4\]",
    ),
    "extra too short": (
        dict(extra=torch.zeros(2, 4, 4)),
        ValueError,
        r"expected extra of shape \[B, S, K\] = \[2, 5, 4\], got \[2, 4, 4\]",
    ),
    "g a vector": (dict(g=torch.ones(4)), ValueError, r"expected g to be a scalar, got \[4\]"),
    "mask of another length": (
        dict(mask=torch.ones(2, 4, dtype=torch.bool)),
        ValueError,
        r"expected mask of shape \[B, S\] = \[2, 5\] or \[B, Q, S\] = \[2, 3, 5\], got \[2, 4\]",
    ),
    "mask of integers": (
        dict(mask=torch.ones(2, 5, dtype=torch.int64)),
        TypeError,
        r"expected mask to be a bool tensor \(True = attend\), got torch.int64",
    ),
    "mask a list": (dict(mask=[[True] * 5] * 2), TypeError, "bool tensor .* got list"),
    "lengths too many": (
        dict(lengths=torch.tensor([1, 2, 3])),
        ValueError,
        r"expected lengths of shape \[B\] = \[2\], got \[3\]",
    ),
    "lengths beyond the source": (
        dict(lengths=torch.tensor([1, 6])),
        ValueError,
        "expected lengths between 0 and S = 5, got 1 to 6",
    ),
    "lengths below zero": (dict(lengths=torch.tensor([-1, 3])), ValueError, "got -1 to 3"),
    "lengths of floats": (
        dict(lengths=torch.tensor([1.0, 2.0])),
        TypeError,
        "expected lengths to be an int64 tensor, got torch.float32",
    ),
    "another dtype": (
        dict(keys=K.double()),
        TypeError,
        "expected keys of the query's dtype torch.float32, got torch.float64",
    ),
    "integers": (dict(query=Q.long()), TypeError, "expected query of a floating dtype"),
    "another device": (
        dict(values=V.to("meta")),
        ValueError,
        "values on the query's device {device}",
    ),
    "a mask elsewhere": (
        dict(mask=torch.ones(2, 5, dtype=torch.bool, device="meta")),
        ValueError,
        "expected mask on the keys' device {device}, got meta",
    ),
    "lengths elsewhere": (
        dict(lengths=torch.ones(2, dtype=torch.int64, device="meta")),
        ValueError,
        "expected lengths on the keys' device {device}, got meta",
    ),
    "no tensor": (dict(keys=[1.0]), TypeError, "expected keys to be a tensor, got list"),
    "no query": (dict(query=None), TypeError, "expected query to be a tensor, got NoneType"),
    "scale a tensor": (dict(scale=torch.tensor(2.0)), TypeError, "expected scale to be a number"),
}


def on(device, tensors):
    """Those of a dictionary that are not somewhere else on purpose."""
    return {n: t.to(device) if hasattr(t, "cpu") and t.is_cpu else t for n, t in tensors.items()}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused(name, device):
    changes, kind, said = WRONG[name]
    if device != "cpu" and name in ("lengths beyond the source", "lengths below zero"):
        pytest.skip("the host would have to wait for them; kernels take them for S and for 0")
    arguments = on(device, dict(query=Q, keys=K, values=V, v=torch.zeros(4)) | changes)
    said = said.replace("{device}", str(arguments["query"].device) if "{" in said else "")
    with pytest.raises(kind, match=f"fastseq.additive_attention: .*{said}"):
        functional.additive_attention(**arguments)
    if changes.keys() <= {"query", "keys", "values", "lengths", "mask", "scale"}:
        del arguments["v"]
        with pytest.raises(kind, match=f"fastseq.dot_attention: .*{said}"):
            functional.dot_attention(**arguments)


def test_weights_that_do_not_fit_are_refused():
    h, y = torch.zeros(2, 3, 4), torch.zeros(2, 5, 7)
    q, k, values = torch.zeros(2, 3, 4), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6)
    with pytest.raises(ValueError, match=r"weight of shape \[H, E\] = \[4, 7\], got \[7, 4\]"):
        functional.general_attention(h, y, y, torch.zeros(7, 4))
    with pytest.raises(ValueError, match=r"weight of shape \[K, H\+E\] = \[K, 11\], got \[6, 10\]"):
        functional.concat_attention(h, y, y, torch.zeros(6, 10), torch.zeros(6))
    location = dict(previous=torch.zeros(2, 5), filters=torch.zeros(3, 1, 5))
    location["weight"] = torch.zeros(4, 3)
    functional.location_attention(q, k, values, torch.zeros(4), **location)
    with pytest.raises(ValueError, match=r"previous of shape \[B, J, S\] = \[2, J, 5\]"):
        functional.location_attention(
            q, k, values, torch.zeros(4), **location | {"previous": torch.zeros(2, 4)}
        )
    with pytest.raises(ValueError, match="filters of an odd width"):
        functional.location_attention(
            q, k, values, torch.zeros(4), **location | {"filters": torch.zeros(3, 1, 4)}
        )
