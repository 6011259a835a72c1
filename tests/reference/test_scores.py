"""The attention oracle against the formulas, written out one number at a time."""

from __future__ import annotations

import math

import pytest
import torch

from fastseq.reference import scores
from fastseq.testing import assert_close_to_reference, run_with_grads
from fastseq.testing_attention import SCORES, attention_case


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def product(matrix, vector):
    return [dot(row, vector) for row in matrix]


def score_of(case, b, i, s):
    """One score, from Python numbers."""
    x = {name: t.tolist() for name, t in case.inputs.items()}
    scale = case.where.get("scale", 1.0)
    q, k = x["query"][b][i], x["keys"][b][s]
    if case.score == "dot":
        return scale * dot(q, k)
    if case.score == "general":
        return scale * dot(q, product(x["weight"], k))
    if case.score == "concat":
        terms = product(x["weight"], q + k)
    else:
        terms = [a + c for a, c in zip(q, k, strict=True)]
    if case.score == "location":
        previous = x["previous"][b]
        kinds = previous if isinstance(previous[0], list) else [previous]
        filters = x["filters"]
        found = []
        for one in filters:
            total = 0.0
            for kind, taps in zip(kinds, one, strict=True):
                for n, tap in enumerate(taps):
                    at = s + n - len(taps) // 2
                    total += tap * kind[at] if 0 <= at < len(kind) else 0.0
            found.append(total)
        terms = [a + c for a, c in zip(terms, product(x["weight"], found), strict=True)]
    if "extra" in x:
        terms = [a + c for a, c in zip(terms, x["extra"][b][s], strict=True)]
    if "bias" in x:
        terms = [a + c for a, c in zip(terms, x["bias"], strict=True)]
    v = x["v"]
    if "g" in x:
        v = [x["g"] * one / math.sqrt(dot(v, v)) for one in v]
    return scale * dot(v, [math.tanh(t) for t in terms])


def by_hand(case):
    (B, Q), S = case.inputs["query"].shape[:2], case.inputs["keys"].shape[1]
    values = case.inputs["values"].tolist()
    lengths = case.where.get("lengths", torch.full((B,), S)).tolist()
    mask = case.where.get("mask", torch.ones(B, S, dtype=torch.bool))
    mask = mask.unsqueeze(1).expand(B, Q, S) if mask.dim() == 2 else mask
    weights = torch.zeros(B, Q, S, dtype=torch.float64)
    context = torch.zeros_like(case.cotangents[0])
    for b in range(B):
        for i in range(Q):
            where = [s for s in range(lengths[b]) if mask[b, i, s]]
            powers = {s: math.exp(score_of(case, b, i, s)) for s in where}
            for s in where:
                weights[b, i, s] = powers[s] / math.fsum(powers.values())
                context[b, i] += weights[b, i, s] * torch.tensor(values[b][s]).double()
    return context, weights


@pytest.mark.parametrize("options", [{}, dict(extra=True, bias=True, g=True, scale=0.7)], ids=str)
@pytest.mark.parametrize(
    "where",
    [{}, {"lengths": True}, {"mask": "source"}, {"mask": "query", "lengths": True}],
    ids=str,
)
@pytest.mark.parametrize("score", SCORES)
def test_every_number(score, where, options):
    case = attention_case(score, 3, 2, 4, 3, **where, **options, dtype=torch.float64)
    found = case.functional(scores)(*case.inputs.values())
    for name, tensor, truth in zip(case.names, found, by_hand(case), strict=True):
        assert_close_to_reference(tensor, truth, what=f"{case} {name}")


@pytest.mark.parametrize("where", [{}, {"lengths": True, "mask": "query"}], ids=str)
@pytest.mark.parametrize("score", SCORES)
def test_differentiable_twice(score, where):
    options = dict(extra=True, bias=True, g=True, scale=0.7)
    case = attention_case(score, 2, 2, 3, 2, 2, **where, **options, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in case.inputs.values()]
    assert torch.autograd.gradcheck(case.functional(scores), leaves)
    assert torch.autograd.gradgradcheck(case.functional(scores), leaves)


@pytest.mark.parametrize("score", SCORES)
def test_one_query_a_row(score):
    case = attention_case(score, 3, None, 4, 5, lengths=True, dtype=torch.float64)
    single = run_with_grads(case.functional(scores), case.inputs, case.cotangents)
    many = case.map(lambda t: t.unsqueeze(1), "query")
    cotangents = [c.unsqueeze(1) for c in case.cotangents]
    found = run_with_grads(many.functional(scores), many.inputs, cotangents)
    for name, tensor in single.items():
        assert torch.equal(found[name].view_as(tensor), tensor), name


@pytest.mark.parametrize("score", SCORES)
def test_nowhere_to_look(score):
    """Zero context and weights, and gradients that are zero rather than NaN."""
    for case in (
        attention_case(score, 1, 2, 3, 4, lengths=True),
        attention_case(score, 1, 2, 3, 4, mask="source"),
        attention_case(score, 1, 2, 3, 4, mask="query"),
        attention_case(score, 2, 2, 0, 4),
    ):
        for name, tensor in run_with_grads(
            case.functional(scores), case.inputs, case.cotangents
        ).items():
            assert not tensor.any() and tensor.isfinite().all(), f"{case} {name}"


def test_where_is_both_lengths_and_mask():
    keys, mask = torch.zeros(2, 3, 1), torch.tensor([[True, False, True], [True, True, True]])
    assert scores.attended(keys, None, None) is None
    found = scores.attended(keys, torch.tensor([3, 1]), mask)
    assert found.tolist() == [[[True, False, True]], [[True, False, False]]]
