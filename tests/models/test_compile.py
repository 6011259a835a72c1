"""The models under torch.compile: one graph, forward and backward, whatever B, S and T are."""

from __future__ import annotations

import random

import pytest
import torch
import torch._dynamo
from torch.export import Dim, export

from fastseq.testing import assert_close_to_reference

KINDS = ["plain", "attention", "bahdanau"]
WITH_LENGTHS = KINDS[1:]
CALLS = [(kind, False) for kind in KINDS] + [(kind, True) for kind in WITH_LENGTHS]
SHAPES = [(3, 5, 6), (4, 7, 5), (2, 4, 9), (7, 9, 4)]


def compiled(module, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(module, backend=backend, fullgraph=True, dynamic=True)


def compiling(number: int):
    """From the call of this number on, to compile again is an error."""
    return torch.compiler.set_stance("fail_on_recompile" if number else "default")


def tokens(rows, columns):
    return torch.randint(11, (rows, columns))


def gradients(fn, owner, *args):
    """Output and gradients of the parameters, from a given state of the coins."""
    random.seed(1)
    y = fn(*args)
    return [y, *torch.autograd.grad(y.square().sum(), list(owner.parameters()))]


def check(fast, fn, exact, *args):
    runs = [(fn, fast), (exact, exact), (fast, fast)]
    for got, want, eager in zip(*(gradients(*run, *args) for run in runs), strict=True):
        assert_close_to_reference(got, want, eager)


def pairs(make_pair, kind):
    """A fast model in float32 and the reference with its weights, in float64."""
    _, fast = make_pair(kind, dtype=torch.float32)
    exact, _ = make_pair(kind)
    exact.load_state_dict(fast.state_dict())
    return fast, exact


@pytest.mark.parametrize(("kind", "with_lengths"), CALLS)
def test_whole_for_any_shape(kind, with_lengths, make_pair):
    fast, exact = pairs(make_pair, kind)
    fn = compiled(fast)
    for i, (B, S, T) in enumerate(SHAPES):
        lengths = (torch.arange(B) % S + 1,) if with_lengths else ()
        with compiling(i):
            check(fast, fn, exact, tokens(B, S), tokens(B, T), 1.0, *lengths)


@pytest.mark.parametrize("kind", KINDS)
def test_coins_are_tossed_at_each_run(kind, make_pair):
    fast, exact = pairs(make_pair, kind)
    fn = compiled(fast)
    for i, (B, S, T) in enumerate(SHAPES):
        src, trg = tokens(B, S), tokens(B, T)
        with compiling(i):
            check(fast, fn, exact, src, trg, 0.5)
        states = []
        for model in (fast, fn):
            random.seed(2)
            model(src, trg, 0.5)
            states.append(random.getstate())
        assert states[0] == states[1]
        outputs = [fn(src, trg, 0.5).detach() for _ in range(8)]
        assert any(not torch.equal(outputs[0], other) for other in outputs[1:])


def test_a_decoder_that_is_called_each_step_compiles_for_one_number_of_steps(make_pair):
    fast, exact = pairs(make_pair, "attention")
    fast.decoder.register_forward_hook(lambda *_: None)
    fn = compiled(fast)
    for B in (3, 5):
        with compiling(B - 3):
            check(fast, fn, exact, tokens(B, 4), tokens(B, 5), 0.5)


@pytest.mark.parametrize("kind", WITH_LENGTHS)
def test_encoders_with_lengths(kind, make_pair):
    fast, _ = pairs(make_pair, kind)
    fn = compiled(fast.encoder)
    for i, (B, S, _) in enumerate(SHAPES):
        src, lengths = tokens(B, S), torch.arange(B) % S + 1
        with compiling(i):
            found = fn(src, lengths)
        torch.testing.assert_close(found, fast.encoder(src, lengths))


@pytest.mark.parametrize(
    ("kind", "ratio"), [("plain", 0.5), ("attention", 0.5), ("bahdanau", 0.5), ("bahdanau", 1.0)]
)
def test_exported_for_any_shape(kind, ratio, make_pair):
    fast, _ = pairs(make_pair, kind)
    # One step, as one of anything, is a graph of its own.
    B, S, T = Dim("B", min=2, max=100), Dim("S", min=2, max=100), Dim("T", min=3, max=100)
    calls = [[tokens(4, 5), tokens(4, 6), ratio], [tokens(3, 9), tokens(3, 8), ratio]]
    dims = [{0: B, 1: S}, {0: B, 1: T}, None]
    if kind in WITH_LENGTHS:
        dims.append({0: B})
        for call in calls:
            call.append(torch.arange(call[0].shape[0]) + 1)
    run = export(fast, tuple(calls[0]), dynamic_shapes=tuple(dims)).module()
    for call in calls:
        found = []
        for fn in (run, fast):
            random.seed(1)
            found.append(fn(*call))
        torch.testing.assert_close(*found)
