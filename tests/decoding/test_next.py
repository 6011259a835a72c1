"""The most probable next tokens."""

from __future__ import annotations

import pytest
import torch

from fastseq.decoding import next_tokens
from fastseq.testing import assert_close_to_reference


@torch.no_grad()
def test_after_a_prefix(model):
    src, lengths = torch.randint(9, (5, 4)), torch.tensor([4, 2, 1, 3, 4])
    for length in (1, 2, 5):
        prefix = torch.randint(9, (5, length))
        # The logits of position t come from the tokens before it.
        trg = torch.cat((prefix, prefix[:, :1]), dim=1)
        p = model(src, trg, 1.0, lengths)[:, -1].softmax(1)
        tokens, found = next_tokens(model, src, prefix, lengths, k=9)
        assert_close_to_reference(found, p.sort(dim=1, descending=True).values)
        assert torch.equal(tokens, p.sort(dim=1, descending=True).indices)
        fewer = next_tokens(model, src, prefix, lengths, k=3)
        assert torch.equal(fewer[0], tokens[:, :3]) and torch.equal(fewer[1], found[:, :3])


def test_a_start_token_is_a_prefix(model):
    src = torch.randint(9, (3, 4))
    start = torch.tensor([2, 5, 7])
    expected = next_tokens(model, src, start.unsqueeze(1))
    for a, b in zip(next_tokens(model, src, start), expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(next_tokens(model, src)[0][0], expected[0][0])


def test_models_without_attention(plain_model):
    src, prefix = torch.randint(9, (5, 4)), torch.randint(9, (5, 3))
    with torch.no_grad():
        h, c = plain_model.encoder(src)
        p = plain_model.decoder(prefix, h, c)[0][:, -1].softmax(1)
    tokens, found = next_tokens(plain_model, src, prefix, k=4)
    assert_close_to_reference(found, p.gather(1, tokens))
    assert torch.equal(tokens, p.topk(4).indices)


def test_equal_ones_go_by_id(lookup):
    tokens, p = next_tokens(lookup(6, torch.zeros_like), torch.zeros(2, 1, dtype=torch.int64), k=4)
    assert tokens.tolist() == [[0, 1, 2, 3]] * 2
    assert_close_to_reference(p, torch.full((2, 4), 1 / 6, dtype=torch.float64))


def test_low_precision_is_normalised_in_float32(model):
    _, p = next_tokens(model.bfloat16(), torch.randint(9, (3, 4)), k=9)
    assert p.dtype == torch.float32
    assert_close_to_reference(p.sum(1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k of at least 1, got 0"),
        ({"k": 10}, "k of at most V = 9, got 10"),
        ({"prefix": torch.zeros(3, 0, dtype=torch.int64)}, r"P of at least 1, got \[3, 0\]"),
        ({"prefix": torch.zeros(2, 1, dtype=torch.int64)}, r"B = 3 .*got \[2, 1\]"),
        ({"prefix": torch.zeros(2, dtype=torch.int64)}, r"prefix .*\[B\] = \[3\], got \[2\]"),
    ],
)
def test_bad_arguments(model, change, message):
    with pytest.raises(ValueError, match=f"^fastseq.next_tokens: expected.*{message}"):
        next_tokens(model, torch.randint(9, (3, 4)), **change)
