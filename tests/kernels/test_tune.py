"""The search for tiles: what it tries, and when it stops."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from fastseq.kernels import tune  # noqa: E402
from fastseq.kernels.attention.tuned import tiles  # noqa: E402


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("stage", tune.CANDIDATES)
def test_the_default_comes_first(stage, single):
    tried = list(tune.candidates(stage, single, True))
    assert tried[0] == tiles(stage, single, True) and len(tried) > 4
    for config in tried:
        assert config.keys() == tried[0].keys() | tune.CANDIDATES[stage].keys()
        assert not single or config.get("BLOCK_Q", 1) == config.get("SUB_Q", 1) == 1


def test_the_fastest_that_runs_wins():
    def measure(config):
        if config["tile"] == 1:
            raise ValueError("does not compile")
        return config["tile"]

    tried = ({"tile": tile} for tile in (3, 1, 2, 4))
    assert tune.search(tried, measure, time.monotonic() + 60) == ({"tile": 2}, 2)


def test_time_is_bounded_and_the_first_always_runs():
    tried = iter([{"tile": 3}, {"tile": 2}])
    assert tune.search(tried, lambda config: config["tile"], 0.0) == ({"tile": 3}, 3)
    with pytest.raises(RuntimeError, match="no candidate runs"):
        tune.search(iter([]), lambda config: 0.0, 0.0)
