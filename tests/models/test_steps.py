"""Cutting a target into runs of known inputs."""

from __future__ import annotations

import random

import pytest

from fastseq.models._steps import draw_coins, forced_runs


@pytest.mark.parametrize(
    ("coins", "runs"),
    [
        ([], []),
        ([True], [(1, 2)]),
        ([False], [(1, 2)]),
        ([True, True, True], [(1, 4)]),
        ([True, True, False], [(1, 4)]),
        ([False, False, True], [(1, 2), (2, 3), (3, 4)]),
        ([True, False, True, True], [(1, 3), (3, 5)]),
    ],
)
def test_runs_end_where_an_argmax_is_fed_back(coins, runs):
    assert forced_runs(coins) == runs


@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_coins_are_the_draws_of_the_reference(ratio):
    random.seed(4)
    expected = [random.random() < ratio for _ in range(50)]
    random.seed(4)
    assert draw_coins(50, ratio) == expected
