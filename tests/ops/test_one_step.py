"""A single step, its weights read in place: csrc/cpu/recurrent/one_step*.inl, gemm/in_place.inl."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastseq import _native
from fastseq.testing import assert_matches, recurrent_case
from tests.fuzz_recurrent import ours, with_zoneout
from tests.ops.test_recurrent import (
    DTYPES,
    ISAS,
    assert_same_bits,
    assert_same_bits_for_threads,
    check,
    run,
    same_isa,
)

CELLS = ["lstm", "gru", "rnn_tanh", "rnn_relu", "peephole_lstm"]
__all__ = ["same_isa"]

# B, I, H. Every height of a tile, of the products' in place and beyond; every remainder of H and I.
ROWS = [(b, 40, 33) for b in (1, 2, 3, 5, 6, 7, 12, 13, 25, 37, 73)]
WIDTHS = [(3, 64, 1), (5, 100, 7), (2, 63, 8), (8, 57, 15), (9, 50, 16), (4, 47, 17), (3, 1, 65)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(isa, dtype, cell):
    _native.set_isa(isa)
    for seed, (B, I, H) in enumerate(ROWS + WIDTHS):  # noqa: E741
        check(recurrent_case(cell, 1, B, I, H, dtype=DTYPES[dtype], seed=seed), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_longer_than_a_chain(isa, dtype):
    _native.set_isa(isa)
    for B, I, H in ((2, 600, 3), (7, 2100, 2), (1, 4200, 1)):  # noqa: E741
        # Gates that such sums do not saturate.
        check(recurrent_case("gru", 1, B, I, H, dtype=DTYPES[dtype], scale=0.03), isa)


FORMS = {
    "both directions": {},
    "no bias, no state": dict(bias=False, hx=False),
    "lengths": dict(lengths=[1, 0, 1, 1, 0, 1, 1]),
    "resets": dict(resets=0.5),
    "stacked, no state": dict(hx=False, num_layers=2),
    "lengths and resets": dict(lengths=[0, 1, 1, 0, 1, 1, 1], resets=0.5),
    "nothing in": dict(I=0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_forms(cell, form):
    options = dict(FORMS[form])
    check(recurrent_case(cell, 1, 7, options.pop("I", 31), 65, bidirectional=True, **options))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("lengths", [None, [1, 0, 1, 1, 0]])
def test_zoneout(cell, lengths):
    case = recurrent_case(cell, 1, 5, 31, 40, bidirectional=True, lengths=lengths, resets=0.3)
    pair = (0.2, 0.4) if cell == "lstm" else (0.3, 0.3)
    fn = ours(case, zoneout=pair if cell == "lstm" else 0.3)
    truth = with_zoneout(case, pair, False)
    assert_matches(fn, truth, truth, case.inputs, case.cotangents, names=case.names)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_same_bits_for_any_number_of_threads(cell, bidirectional):
    for B, I, H in ((37, 200, 130), (150, 90, 20), (1, 500, 300)):  # noqa: E741
        assert_same_bits_for_threads(recurrent_case(cell, 1, B, I, H, bidirectional=bidirectional))


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ISAS)
def test_same_bits_of_a_row_whatever_its_neighbours(isa, cell):
    _native.set_isa(isa)
    case = recurrent_case(cell, 1, 90, 70, 33)
    everything = run(case)
    per_row = [*case.names, "grad x", "grad h0", *(["grad c0"] if "c0" in case.inputs else [])]
    for rows in ([0], [89], [3, 4], [7] * 5, list(range(8, 30)), list(range(89, 9, -1))):
        states = ("x", "h0", "c0")
        inputs = {n: t[:, rows] if n in states else t for n, t in case.inputs.items()}
        found = run(replace(case, inputs=inputs, cotangents=[c[:, rows] for c in case.cotangents]))
        for name in per_row:
            assert torch.equal(found[name], everything[name][:, rows]), f"rows {rows}: {name}"


def as_layer(name, save, x, h, c, weights, bias):
    """The same step of the op in its three dimensions."""
    number = _native.cells()[name].number
    wide = [None if t is None else t[None] for t in (x, h, c)]
    rest = (weights, bias, 1, None, None, None, [])
    return torch.ops.fastseq.recurrent_fwd(number, *wide, *rest, save)


def step_arguments(name, bias=True, state=True, I=40):  # noqa: E741
    cell = _native.cells()[name]
    case = recurrent_case(cell.reference, 1, 5, I, 33, bias=bias)
    x, h, c = (case.inputs.get(n) for n in ("x", "h0", "c0"))
    weights = [w for n, w in case.inputs.items() if n.startswith(("weight", "bias"))]
    h, c = (t[0] if t is not None and state else None for t in (h, c))
    return [cell.number, x[0], h, c, weights, bias, 1, None, None, None, []]


@pytest.mark.parametrize("I", [20, 40])  # noqa: E741
@pytest.mark.parametrize("bias,state", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("cell", CELLS)
def test_without_a_dimension_for_time(cell, bias, state, I):  # noqa: E741
    """The bits of a layer of one step, in both passes; the schema, fakes and autograd."""
    forward, backward = torch.ops.fastseq.recurrent_fwd, torch.ops.fastseq.recurrent_bwd
    arguments = step_arguments(cell, bias, state, I)
    number, x, h, c, weights, *rest = arguments
    torch.library.opcheck(forward, (*arguments, False))
    *found, saved = forward(*arguments, True)
    _, *expected, saved_3d = as_layer(cell, True, x, h, c, weights, bias)
    assert len(found) == len(expected) and torch.equal(saved, saved_3d)
    assert all(torch.equal(f, e[0]) for f, e in zip(found, expected, strict=True))
    cotangents = (*[torch.randn_like(f) for f in found], None)[:2]
    need = (True, True, bias, True)
    given = (number, None, *cotangents, x, h, c, weights, *rest, saved, *need)
    torch.library.opcheck(backward, given, test_utils=["test_schema", "test_faketensor"])
    wide = [t if t is None else t[None] for t in (*cotangents, x, h, c)]
    layer = backward(number, None, *wide, weights, *rest, saved, *need)
    for mine, same in zip(backward(*given), layer, strict=True):
        assert torch.equal(mine, same.view_as(mine))
    leaves = [t if t is None else t.clone().requires_grad_() for t in (x, h, c)]
    own = [w.clone().requires_grad_() for w in weights]
    tests = ["test_schema", "test_faketensor", "test_autograd_registration"]
    torch.library.opcheck(forward, (number, *leaves, own, *rest, True), test_utils=tests)


def test_what_a_step_without_time_cannot_have():
    number, x, h, c, weights, bias, _, *rest = step_arguments("lstm")
    forward, backward = torch.ops.fastseq.recurrent_fwd, torch.ops.fastseq.recurrent_bwd
    lengths, resets = torch.ones(5).long(), torch.zeros(5).bool()
    wrong = {
        "of one direction": (number, x, h, c, weights * 2, bias, 2, *rest, False),
        "nothing but states": (number, x, h, c, weights, bias, 1, None, lengths, None, [], False),
        "and weights": (number, x, h, c, weights, bias, 1, None, None, resets, [], False),
        r"h0 of shape \[5, 33\]": (number, x, h[None], c, weights, bias, 1, *rest, False),
        r"c0 of shape \[5, 33\]": (number, x, h, c[:3], weights, bias, 1, *rest, False),
        r"\[T, B, I\] or \[B, I\]": (number, x[0], h, c, weights, bias, 1, *rest, False),
    }
    for said, arguments in wrong.items():
        with pytest.raises(RuntimeError, match=said):
            forward(*arguments)
    *_, saved = forward(number, x, h, c, weights, bias, 1, *rest, True)
    given = (x, h, c, weights, bias, 1, *rest, saved, True, True, True, True)
    with pytest.raises(RuntimeError, match="no dy"):
        backward(number, h[None], None, None, *given)
    with pytest.raises(RuntimeError, match="dh_n of shape"):
        backward(number, None, h[:2], None, *given)


def test_inference_gives_the_bits_of_training():
    number, x, h, c, weights, *rest = step_arguments("lstm")
    plain = torch.ops.fastseq.recurrent_fwd(number, x, h, c, weights, *rest, False)
    *trained, _ = torch.ops.fastseq.recurrent_fwd(number, x, h, c, weights, *rest, True)
    assert_same_bits(dict(enumerate(plain)), dict(enumerate(trained)), "save")
