"""The attention kernels: every instruction set of a CPU, sizes around its vectors, any threads; and
the same of a GPU's, there or by Triton's interpreter."""

from __future__ import annotations

import itertools
import math
import os

import pytest
import torch

from fastseq import _native, functional
from fastseq.reference import scores
from fastseq.testing import assert_close_to_reference, assert_matches, run_with_grads
from fastseq.testing_attention import attention_case

# Under it the kernels for GPUs take the place of the CPU's, which there are none of then.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(
        not (_native.loaded() or INTERPRETED or torch.cuda.is_available()),
        reason=str(_native.why_not_loaded()),
    ),
    pytest.mark.usefixtures("device"),
]
ISAS = [f"cpu {isa}" for isa in _native.available_isas()] if _native.loaded() else ["cpu"]
EVERY_ISA = pytest.mark.parametrize(
    "device", ISAS + ["cuda"] * torch.cuda.is_available(), indirect=True
)
SCORES = ("additive", "dot")
# B, Q, S, K, C: one and few queries and many, around the lanes of each set, beyond the chains of
# the sums, and sources cut into pieces, for the threads' sake or for their length.
SIZES = [
    (2, 1, 3, 5, 7),
    (3, 3, 15, 16, 17),
    (2, 4, 17, 31, 33),
    (2, 5, 8, 33, 1),
    (1, 9, 37, 65, 130),
    (1, 2, 150, 4, 3),
    (1, 131, 5, 9, 6),
    (2, 1, 1030, 8, 9),
    (2, 4, 530, 3, 5),
    (1, 2, 5, 4200, 2),
    (40, 2, 3, 4, 5),
]


def run(case):
    call = case.functional(functional)
    return run_with_grads(call, case.inputs, case.cotangents, names=case.names)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("score", SCORES)
@EVERY_ISA
def test_values_and_gradients(score, size):
    # Scores of the order of 1, so that no weight is all but 1 and hides the others.
    scale = 1.0 if score == "additive" else 1 / math.sqrt(size[3])
    for where in ({}, {"lengths": True, "mask": "query"}):
        for extra in {False, score == "additive"}:
            case = attention_case(score, *size, extra=extra, scale=scale, seed=1, **where)
            oracle = case.functional(scores)
            what = dict(names=case.names, what=str(case))
            assert_matches(
                case.functional(functional), oracle, oracle, case.inputs, case.cotangents, **what
            )
            case = case.to(torch.float64)
            truth = run_with_grads(oracle, case.inputs, case.cotangents, names=case.names)
            for name, tensor in run(case).items():
                assert_close_to_reference(tensor, truth[name], what=name, terms=case.terms)


@pytest.mark.parametrize("size", [(3, 40, 45, 64, 48), (20, 9, 33, 40, 24), (2, 1, 600, 70, 60)])
@pytest.mark.parametrize("score", SCORES)
def test_same_bits_for_any_number_of_threads(score, size):
    case = attention_case(score, *size, extra=True, lengths=True, mask="query")
    torch.set_num_threads(1)
    alone = run(case)
    for threads in (2, 3, 8):
        torch.set_num_threads(threads)
        for name, tensor in run(case).items():
            assert torch.equal(tensor, alone[name]), (threads, name)


@pytest.mark.parametrize("score", SCORES)
def test_same_bits_in_any_company(score):
    """A row's results depend neither on other rows nor on how many queries come along."""
    case = attention_case(score, 5, 13, 21, 24, 19, extra=True, mask="query")
    whole = case.functional(functional)(*case.inputs.values())
    for b, q in itertools.product((slice(2, 3), slice(1, 5)), (slice(0, 13), slice(4, 9))):
        part = {name: t if name == "v" else t[b] for name, t in case.inputs.items()}
        part["query"] = part["query"][:, q]
        function = getattr(functional, f"{score}_attention")
        found = function(**part, mask=case.where["mask"][b, q])
        for one, other in zip(found, whole, strict=True):
            assert torch.equal(one, other[b, q])


@pytest.mark.parametrize("Q", [None, 2, 7])
@pytest.mark.parametrize("score", SCORES)
def test_nothing_beyond_a_length_is_read(score, Q, device):
    case = attention_case(score, 4, Q, 19, 18, 11, extra=True, lengths=True)
    beyond = torch.arange(19) >= case.where["lengths"].unsqueeze(1)

    # On a GPU the dot score's gradient of the query is a product of torch's with all of the keys:
    # they have to be finite, as documented.
    by_torch = score == "dot" and (device == "cuda" or INTERPRETED)

    def poisoned(t):
        finite = by_torch and t is case.inputs["keys"]
        return t.masked_fill(beyond.unsqueeze(2), 3e38 if finite else math.nan)

    clean, dirty = (
        run(case),
        run(case.map(poisoned, *({"keys", "values", "extra"} & {*case.inputs}))),
    )
    for name, tensor in clean.items():
        assert torch.equal(dirty[name], tensor), name


@EVERY_ISA
@pytest.mark.parametrize("size", [1e19, 1e30, math.inf])
@pytest.mark.parametrize("score", SCORES)
def test_numbers_beyond_the_range(score, size):
    """What torch answers where scores overflow or keys are infinite: zeros, ones or NaN."""
    for sign, where in itertools.product((1.0, -1.0), ({}, {"mask": "query"})):
        case = attention_case(score, 3, 4, 21, 18, 7, **where)
        case.inputs["keys"][1, 5] = sign * size
        case.inputs["query"].abs_()
        truth = case.functional(scores)(*case.inputs.values())
        found = case.functional(functional)(*case.inputs.values())
        for one, other in zip(found, truth, strict=True):
            assert torch.equal(one.isnan(), other.isnan())
            torch.testing.assert_close(one, other, equal_nan=True)


@EVERY_ISA
def test_gradients_of_scores_sum_to_zero():
    """Of the gradient of a query whose keys are all alike nothing is left but what the sum lost."""
    case = attention_case("dot", 8, 3, 37, 4, 9, seed=2)
    inputs = {"query": case.inputs["query"], "keys": torch.ones(8, 37, 4)}
    inputs["values"] = 1000 + case.inputs["values"]
    lost = []
    for module in (functional, scores):
        got = run_with_grads(
            module.dot_attention, inputs, [case.cotangents[0], torch.zeros(8, 3, 37)]
        )
        lost.append(float(got["grad query"].norm()))
    assert lost[0] < lost[1] / 8


@EVERY_ISA
def test_small_terms_under_a_large_v():
    """The scores' error follows the terms, not 1, where v would carry it into the weights."""
    case = attention_case("additive", 3, 6, 17, 40, 9)
    case = case.map(lambda t: t * 1e-3, "query", "keys").map(lambda t: t * 200, "v")
    oracle = case.functional(scores)
    call = case.functional(functional)
    assert_matches(call, oracle, oracle, case.inputs, case.cotangents, names=case.names)


@pytest.mark.parametrize("changes", ["keys", "values", "v", "extra", "lengths", "mask", "dtype"])
def test_the_operator_refuses_what_does_not_fit(changes):
    arguments = dict(
        query=torch.zeros(2, 3, 4),
        keys=torch.zeros(2, 5, 4),
        values=torch.zeros(2, 5, 6),
        v=torch.zeros(4),
        extra=torch.zeros(2, 5, 4),
        mask=torch.ones(2, 1, 5, dtype=torch.bool),
        lengths=torch.tensor([1, 2]),
    )
    wrong = arguments["keys"].double() if changes == "dtype" else arguments[changes][:1]
    arguments["keys" if changes == "dtype" else changes] = wrong
    if changes == "v":
        arguments["v"] = torch.zeros(5)
    with pytest.raises(RuntimeError, match="fastseq.additive_attention_fwd: expected"):
        torch.ops.fastseq.additive_attention_fwd(*arguments.values(), 1.0)
