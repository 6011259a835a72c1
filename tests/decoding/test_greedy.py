"""Greedy decoding against the model's own free-running forward."""

from __future__ import annotations

import pytest
import torch

from fastseq.decoding import greedy
from fastseq.models import attention as fast_house
from fastseq.reference import attention as reference_house
from fastseq.testing import assert_close_to_reference

SIZES = (9, 6, 8)


@pytest.fixture(params=[reference_house, fast_house], ids=["reference", "fast"])
def model(request):
    house = request.param
    made = house.Seq2Seq(
        house.Encoder(*SIZES), house.Decoder(*SIZES, house.Attention(SIZES[2]))
    ).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(4.0)
    return made


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
