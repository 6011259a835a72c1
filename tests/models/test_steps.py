"""The draws of teacher forcing."""

from __future__ import annotations

import random

import pytest

from fastseq.models._steps import draw_forced


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_coins_are_the_draws_of_the_reference(ratio):
    random.seed(4)
    coins = [random.random() < ratio for _ in range(50)]
    drawn = random.getstate()
    random.seed(4)
    assert draw_forced(50, ratio) == (None if ratio == 1 else [True, *coins[:-1]])
    assert random.getstate() == drawn
    assert draw_forced(0, ratio) is None
    assert random.getstate() == drawn
