"""One sequence and small weights: threads work ahead of the loop over time, and behind it.

csrc/cpu/support/lanes.h, csrc/cpu/recurrent/deferred_by_chunks.inl
"""

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

# T, I, H: stretches of 128 steps from 257 on, whole ones and all kinds of a last one; input
# products are made 48 steps (24, 16, 8 with narrower vectors) ahead. All remainders of I and H, and
# weights about as large as this is for.
SIZES = [(257, 16, 32), (384, 7, 33), (385, 17, 16), (520, 3, 15), (300, 64, 64), (1000, 40, 24)]
SIZES += [(256, 9, 23), (288, 1, 1)]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_against_reference(isa, dtype, cell):
    _native.set_isa(isa)
    for seed, (T, I, H) in enumerate(SIZES):  # noqa: E741
        check(recurrent_case(cell, T, 1, I, H, dtype=DTYPES[dtype], seed=seed), isa)


FORMS = {
    "no bias, no state": dict(bias=False, hx=False),
    "shorter than T": dict(lengths=[290]),
    "both directions": dict(bidirectional=True),
    "both directions, shorter": dict(bidirectional=True, lengths=[270]),
    "resets": dict(resets=0.1),
    "resets in both directions": dict(resets=0.1, bidirectional=True, hx=False),
    "stacked, batch first": dict(num_layers=2, batch_first=True),
    "nothing in": dict(I=0),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", CELLS)
def test_forms(cell, form):
    options = dict(FORMS[form])
    check(recurrent_case(cell, 300, 1, options.pop("I", 19), 34, **options))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_same_bits_for_any_number_of_threads(cell, form):
    options = dict(FORMS[form])
    inputs = options.pop("I", 40)
    assert_same_bits_for_threads(recurrent_case(cell, 400, 1, inputs, 34, **options), (2, 3, 5))


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU])
def test_wanted_gradients_are_those_of_a_call_that_wants_all(cls, wanted):
    assert_same_bits_for_wanted(cls(12, 20, bidirectional=True), 300, 1, wanted)
