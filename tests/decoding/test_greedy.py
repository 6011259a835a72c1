"""Greedy decoding against the model's own free-running forward."""

from __future__ import annotations

import pytest
import torch

from fastseq.decoding import greedy
from fastseq.testing import assert_close_to_reference


def test_tokens_and_weights_are_those_of_the_forward_pass(model):
    src, lengths = torch.randint(9, (4, 5)), torch.tensor([5, 2, 4, 1])
    trg = torch.full((4, 8), 2)
    seen = []
    model.decoder.attention.register_forward_hook(lambda *args: seen.append(args[-1]))
    expected = model(src, trg, 0.0, lengths)[:, 1:].argmax(2)
    wanted = torch.stack(seen, dim=1)
    tokens, weights = greedy(model, src, lengths, 7, 2, None, return_weights=True)
    assert torch.equal(tokens, expected)
    assert tokens.dtype == torch.int64 and not weights.requires_grad
    assert_close_to_reference(weights, wanted)


def test_rows_end_with_eos_and_then_padding(model):
    src = torch.randint(9, (16, 5))
    free = greedy(model, src, max_length=12, eos=None)
    assert free.shape == (16, 12)
    eos = int(free[0, 1])
    tokens = greedy(model, src, max_length=12, eos=eos)
    for row, full in zip(tokens.tolist(), free.tolist(), strict=True):
        end = full.index(eos) + 1 if eos in full else len(full)
        expected = (full[:end] + [0] * 12)[: len(row)]
        assert row == expected
    assert any(eos in row for row in free.tolist())


def test_stops_when_every_row_has_ended(model):
    src = torch.randint(9, (1, 5))
    eos = int(greedy(model, src, max_length=3, eos=None)[0, 2])
    tokens, weights = greedy(model, src, max_length=50, eos=eos, return_weights=True)
    assert tokens.shape[1] <= 3 and tokens[0, -1] == eos
    assert weights.shape == (1, tokens.shape[1], 5)


def test_a_start_token_for_each_row(model):
    src, bos = torch.randint(9, (3, 4)), torch.tensor([4, 2, 7])
    together = greedy(model, src, max_length=5, bos=bos, eos=None)
    for row in range(3):
        alone = greedy(model, src[row : row + 1], max_length=5, bos=int(bos[row]), eos=None)
        assert torch.equal(together[row : row + 1], alone)


def test_an_end_token_for_each_row(model):
    src, eos = torch.randint(9, (8, 4)), torch.randint(9, (8,))
    together = greedy(model, src, max_length=9, eos=eos)
    for row in range(8):
        alone = greedy(model, src[row : row + 1], max_length=9, eos=int(eos[row]))[0]
        assert torch.equal(together[row, : len(alone)], alone)
        assert together[row, len(alone) :].count_nonzero() == 0


def test_ended_rows_cost_nothing(lookup):
    table, src = lookup(6), torch.arange(20).unsqueeze(1)
    tokens = greedy(table, src, max_length=30)
    ends = [row.index(3) if 3 in row else 29 for row in tokens.tolist()]
    assert table.calls == [sum(end >= t for end in ends) for t in range(max(ends) + 1)]
    assert len(set(ends)) > 3


def test_weights_of_ended_rows_are_zero(model):
    src, lengths = torch.randint(9, (16, 5)), torch.randint(1, 6, (16,))
    eos = int(greedy(model, src, lengths, 12, eos=None)[0, 1])
    tokens, weights = greedy(model, src, lengths, 12, eos=eos, return_weights=True)
    open_ones, full = greedy(model, src, lengths, 12, eos=None, return_weights=True)
    before = ((tokens == eos).cumsum(1) - (tokens == eos).long()) == 0
    assert before.any() and not before.all()
    assert weights[~before].count_nonzero() == 0
    assert_close_to_reference(weights[before], full[:, : tokens.shape[1]][before])


def test_models_without_attention(plain_model):
    src, trg = torch.randint(9, (4, 5)), torch.full((4, 8), 2)
    with torch.no_grad():
        expected = plain_model(src, trg, 0.0)[:, 1:].argmax(2)
    assert torch.equal(greedy(plain_model, src, max_length=7, eos=None), expected)
    assert torch.equal(
        greedy(plain_model, src, torch.full((4,), 5), max_length=7, eos=None), expected
    )
    with pytest.raises(ValueError, match="^fastseq.greedy: expected sources of one length"):
        greedy(plain_model, src, torch.tensor([5, 4, 5, 5]))
    with pytest.raises(ValueError, match="^fastseq.greedy: expected return_weights = False"):
        greedy(plain_model, src, return_weights=True)


def test_a_stepper_that_cannot_be_narrowed(lookup):
    """It is prepared again for the sources that are left."""
    table, src = lookup(6), torch.arange(20).unsqueeze(1)
    expected = greedy(table, src, max_length=5)
    prepare = table.stepper
    # Without select the model's own trick to know its first step would start again.
    sources = []

    def stepper(outputs, mask):
        sources.append(len(outputs))
        step = prepare(outputs, mask)
        step.begun = len(sources) > 1
        return lambda token, state: step(token, state)

    table.stepper = stepper
    assert torch.equal(greedy(table, src, max_length=5), expected)
    assert sources[0] == 20 and len(sources) > 1


def test_nothing_to_write(model):
    src = torch.randint(9, (3, 4))
    tokens, weights = greedy(model, src, max_length=0, return_weights=True)
    assert tokens.shape == (3, 0) and weights.shape == (3, 0, 4)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        ({"max_length": -1}, ValueError, "max_length of at least 0, got -1"),
        ({"bos": torch.tensor([1, 2])}, ValueError, r"shape \[B\] = \[3\], got \[2\]"),
        ({"lengths": torch.tensor([1, 2, 9])}, ValueError, "between 1 and S = 4"),
    ],
)
def test_bad_arguments(model, kwargs, kind, message):
    with pytest.raises(kind, match=f"^fastseq.*{message}"):
        greedy(model, torch.randint(9, (3, 4)), **kwargs)
