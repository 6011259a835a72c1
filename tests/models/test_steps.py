"""The draws of teacher forcing."""

from __future__ import annotations

import random

import pytest

from fastseq.models._steps import draw_coins


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_coins_are_the_draws_of_the_reference(ratio):
    random.seed(4)
    expected = [random.random() < ratio for _ in range(50)]
    random.seed(4)
    assert draw_coins(50, ratio) == expected
