"""Gradients that each task makes of its own sequences: csrc/cpu/recurrent/deferred_by_rows.inl."""

from __future__ import annotations

import pytest

from fastseq import _native, nn
from fastseq.testing import recurrent_case
from tests.ops.test_recurrent import (
    DTYPES,
    ISAS,
    WANTED,
    assert_same_bits_for_threads,
    assert_same_bits_for_wanted,
    check,
    same_isa,
)

CELLS = ["lstm", "gru", "rnn_tanh", "rnn_relu", "peephole_lstm"]
__all__ = ["same_isa"]

# T, B, I, H: from 64 rows on there are two leaves, to eight from 256 on; sums are added up every 32
# steps; all remainders of I and H, and weights just small enough.
SIZES = [(5, 64, 16, 32), (3, 67, 7, 33), (33, 65, 17, 16), (70, 64, 3, 15), (2, 130, 1, 31)]
SIZES += [(4, 257, 15, 17), (2, 600, 9, 23), (3, 71, 33, 1), (9, 64, 31, 48)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(isa, dtype, cell):
    _native.set_isa(isa)
    for seed, (T, B, I, H) in enumerate(SIZES):  # noqa: E741
        check(recurrent_case(cell, T, B, I, H, dtype=DTYPES[dtype], seed=seed), isa)


FORMS = {
    "no bias, no state": dict(bias=False, hx=False),
    "lengths": dict(lengths="random"),
    "most rows without a step": dict(lengths=[5, 4] + [0] * 64),
    "resets": dict(resets=0.3),
    "stacked, batch first": dict(num_layers=2, batch_first=True),
    "lengths and resets": dict(lengths="random", resets=0.3, hx=False),
    "nothing in": dict(I=0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_forms(cell, form):
    options = dict(FORMS[form])
    check(recurrent_case(cell, 5, 66, options.pop("I", 19), 34, **options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_same_bits_for_any_number_of_threads(cell, form):
    options = dict(FORMS[form], I=FORMS[form].get("I", 19))
    for B in (66,) if "lengths" in options else (66, 300):
        inputs = options["I"]
        more = {k: v for k, v in options.items() if k != "I"}
        assert_same_bits_for_threads(recurrent_case(cell, 5, B, inputs, 34, **more), (2, 3, 5))


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_wanted_gradients_are_those_of_a_call_that_wants_all(cls, wanted):
    assert_same_bits_for_wanted(cls(12, 20), 6, 70, wanted)
