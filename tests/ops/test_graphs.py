"""What makes a call of another kind, how many graphs are kept, and what is done without."""

from __future__ import annotations

import random

import pytest
import torch

from fastseq.ops import graphs
from fastseq.ops.graphs import Replayed


@pytest.fixture
def counted():
    """A function, how often it ran, and how often it was captured."""
    runs, captures = [], []

    def function(x, more, factor):
        runs.append(factor)
        return [x * factor + sum(t.sum() for t in more)]

    def capture(function, inputs):
        captures.append(inputs)
        outputs = function(*inputs)
        return lambda: outputs[0].copy_(function(*inputs)[0]), outputs

    return Replayed(function, most=2, capture=capture), runs, captures


def test_first_as_it_is_then_captured_then_replayed(counted):
    replayed, runs, captures = counted
    for i in range(4):
        x, more = torch.full((3,), float(i)), [torch.ones(2)]
        (found,) = replayed(x, more, 2.0)
        assert torch.equal(found, x * 2 + 2)
        assert len(captures) == (i > 0)
        # Its memory is its own, not the caller's.
        x.fill_(100)
    assert len(replayed) == 1


def test_what_makes_another_kind(counted):
    replayed, _, captures = counted
    x, more = torch.ones(3), [torch.ones(2)]
    calls = [
        (x, more, 2.0),
        (x, more, 3.0),
        (torch.ones(4), more, 2.0),
        (x.double(), more, 2.0),
        (x, [*more, *more], 2.0),
        (x, [torch.ones(1, 2)], 2.0),
    ]
    for call in calls:
        replayed(*call)
    assert not captures
    precision, matmul = torch.get_float32_matmul_precision(), torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision("medium")
        replayed(*calls[-1])
        assert not captures
        # torch's new switch, beside which asking for the old one raises.
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = "tf32"
        replayed(*calls[-1])
        assert not captures
    finally:
        matmul.fp32_precision = "none"
        torch.set_float32_matmul_precision(precision)
    # Strides are none: what is given is copied.
    replayed(torch.ones(6)[::2], more, 2.0)
    assert len(captures) == 1


def test_the_graph_used_longest_ago_gives_way(counted):
    replayed, _, captures = counted

    def call(n):
        replayed(torch.ones(n), [], 1.0)

    for n in (1, 2, 1, 2):
        call(n)
    assert len(replayed) == 2 and len(captures) == 2
    call(1)
    # Not before it has been idle, and nothing was captured, for sixteen calls a graph.
    for _ in range(28):
        call(1)
    call(3)
    call(3)
    call(1)
    assert len(captures) == 2
    call(3)
    assert len(replayed) == 2 and len(captures) == 3
    call(1)
    call(3)
    assert len(captures) == 3
    for n in range(100):
        call(n + 10)
    assert len(replayed._kinds) <= 2 + 16 and len(replayed) == 2 and len(captures) == 3


def test_shapes_that_vary_without_end_are_hardly_ever_captured(counted):
    replayed, _, captures = counted
    shapes = random.Random(0)
    for _ in range(2000):
        n = shapes.randint(1, 12)
        (found,) = replayed(torch.ones(n), [], 3.0)
        assert torch.equal(found, torch.full((n,), 3.0))
    assert len(replayed) == 2 and len(captures) <= 2 + 2000 // 32
    # Other shapes, from some call on: they are found, one after the other.
    before = len(captures)
    for _ in range(40):
        for n in (20, 21):
            replayed(torch.ones(n), [], 3.0)
    assert len(captures) == before + 2


def test_graphs_long_idle_give_way_one_after_the_other(counted):
    replayed, _, captures = counted
    for n in (1, 2, 1, 2, *range(100, 140), 20, 20, 21, 21):
        replayed(torch.ones(n), [], 3.0)
    assert len(captures) == 3


def test_without_graphs_the_function_runs(counted):
    replayed, runs, captures = counted
    replayed.enabled = False
    for _ in range(3):
        replayed(torch.ones(3), [], 1.0)
    assert len(runs) == 3 and not captures


def test_where_capturing_fails_the_function_runs():
    tries = []

    def capture(function, inputs):
        tries.append(inputs)
        raise RuntimeError("operation not permitted when stream is capturing\nand so on")

    replayed = Replayed(lambda x: [x + 1], capture=capture)
    for _ in range(4):
        assert torch.equal(replayed(torch.zeros(2))[0], torch.ones(2))
    assert len(tries) == 1 and len(replayed) == 0
    # Nor is each other kind tried at once.
    for n in range(3, 9):
        for _ in range(2):
            replayed(torch.zeros(n))
    assert len(tries) == 1
    assert replayed.refused == "operation not permitted when stream is capturing"
    replayed.clear()
    assert replayed.refused is None


def test_inside_another_capture_it_is_part_of_that(counted, monkeypatch):
    replayed, runs, captures = counted
    monkeypatch.setattr(graphs, "_inside_a_capture", lambda arguments: True)
    for _ in range(3):
        replayed(torch.ones(3), [], 1.0)
    assert len(runs) == 3 and not captures
