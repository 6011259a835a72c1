"""Sampling: whose distribution, which tokens it leaves out, and what a seed fixes."""

from __future__ import annotations

import math

import pytest
import torch

from fastseq.decoding import greedy, next_tokens, sample, sampling
from fastseq.decoding.sampling import _draw

ROWS = 4000


def chi_square_p(counts, probabilities):
    """How probable counts at least as far from the expected ones are."""
    expected = probabilities * counts.sum()
    seen = expected > 0
    assert counts[~seen].sum() == 0
    if seen.sum() == 1:
        return 1.0
    statistic = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    half = torch.tensor((int(seen.sum()) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(half, statistic / 2))


def counts_of(tokens, vocabulary):
    return torch.bincount(tokens, minlength=vocabulary).double()


def kept_by(p, top_k, top_p):
    """The distribution left of probabilities p by the documentation's words, one word at a time."""
    ranked = sorted(range(len(p)), key=lambda token: -float(p[token]))[:top_k]
    whole, held, kept = sum(float(p[t]) for t in ranked), 0.0, []
    for token in ranked:
        kept.append(token)
        held += float(p[token]) / whole
        if held >= top_p:
            break
    left = torch.zeros_like(p)
    left[kept] = p[kept]
    return left / left.sum()


OPTIONS = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 3},
    {"top_p": 0.7},
    {"top_k": 5, "top_p": 0.8, "temperature": 1.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_tokens_have_their_probabilities(lookup, options):
    model, src = lookup(8), torch.full((ROWS, 1), 5)
    tokens = sample(model, src, max_length=2, eos=None, generator=7, **options)
    assert tokens.shape == (ROWS, 2) and tokens.dtype == torch.int64
    temperature = options.get("temperature", 1.0)
    rest = options.get("top_k", 8), options.get("top_p", 1.0)
    first = kept_by((model.logits(5, (2,)) / temperature).softmax(0), *rest)
    assert chi_square_p(counts_of(tokens[:, 0], 8), first) > 1e-3
    # The second token given the most frequent first one.
    likely = int(first.argmax())
    second = kept_by((model.logits(5, (2, likely)) / temperature).softmax(0), *rest)
    after = tokens[tokens[:, 0] == likely, 1]
    assert chi_square_p(counts_of(after, 8), second) > 1e-3


def test_the_test_of_distributions_sees_another_temperature(lookup):
    model, src = lookup(8), torch.full((ROWS, 1), 5)
    tokens = sample(model, src, max_length=1, eos=None, generator=7, temperature=1.2)
    assert chi_square_p(counts_of(tokens[:, 0], 8), model.logits(5, (2,)).softmax(0)) < 1e-3


def test_real_models(model):
    src = torch.randint(9, (1, 5)).expand(ROWS, 5)
    tokens = sample(model, src, max_length=1, generator=3)[:, 0]
    ids, p = next_tokens(model, src[:1], k=9)
    assert chi_square_p(counts_of(tokens, 9)[ids[0]], p[0]) > 1e-3


def test_a_seed_fixes_the_tokens(model):
    src, lengths = torch.randint(9, (20, 5)), torch.randint(1, 6, (20,))
    first = sample(model, src, lengths, 10, generator=11)
    assert torch.equal(first, sample(model, src, lengths, 10, generator=11))
    generator = torch.Generator().manual_seed(11)
    assert torch.equal(first, sample(model, src, lengths, 10, generator=generator))
    # A generator goes on where it was; another seed draws otherwise.
    assert not torch.equal(first, sample(model, src, lengths, 10, generator=generator))
    assert not torch.equal(first, sample(model, src, lengths, 10, generator=12))
    before = torch.get_rng_state()
    sample(model, src, generator=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    own = sample(model, src, lengths, 10)
    torch.manual_seed(4)
    assert torch.equal(own, sample(model, src, lengths, 10))


def test_a_row_draws_the_same_whenever_others_end(lookup):
    model, src = lookup(7), torch.arange(30).unsqueeze(1)
    free = sample(model, src, max_length=12, eos=None, generator=5)
    ended = sample(model, src, max_length=12, eos=3, generator=5)
    for row, full in zip(ended.tolist(), free.tolist(), strict=True):
        end = full.index(3) + 1 if 3 in full else 12
        assert row == (full[:end] + [0] * 12)[: len(row)]
    assert len({row.index(3) if 3 in row else 12 for row in free.tolist()}) > 3


def test_ended_rows_cost_nothing(lookup):
    model, src = lookup(7), torch.arange(30).unsqueeze(1)
    eos = torch.arange(30) % 7
    tokens = sample(model, src, max_length=50, eos=eos, generator=5)
    ends = [
        row.index(end) if end in row else 49
        for row, end in zip(tokens.tolist(), eos.tolist(), strict=True)
    ]
    assert len(set(ends)) > 3
    assert model.calls == [sum(end >= t for end in ends) for t in range(max(ends) + 1)]


def test_little_freedom_is_greedy(model):
    src, lengths = torch.randint(9, (10, 5)), torch.randint(1, 6, (10,))
    expected = greedy(model, src, lengths, 9)
    for options in ({"top_k": 1}, {"top_p": 1e-9}, {"temperature": 1e-300}):
        assert torch.equal(sample(model, src, lengths, 9, **options), expected)


def test_all_tokens_where_nothing_is_left_out(model):
    src = torch.randint(9, (10, 5))
    expected = sample(model, src, max_length=9, generator=2)
    # Sorted tokens take other draws, so only options that sort nothing.
    for options in ({"top_k": 9}, {"top_k": 1000}, {"top_p": 1.0}):
        assert torch.equal(sample(model, src, max_length=9, generator=2, **options), expected)


def test_a_nucleus_larger_than_usual(lookup, monkeypatch):
    """All are sorted then: no token is lost."""
    model, src = lookup(50), torch.arange(200).unsqueeze(1)
    options = {"max_length": 4, "eos": None, "generator": 3, "top_p": 0.8}
    expected = sample(model, src, **options)
    for usual in (1, 3, 10):
        monkeypatch.setattr(sampling, "USUAL_NUCLEUS", usual)
        assert torch.equal(sample(model, src, **options), expected)


def test_tokens_ruled_out_never_come(lookup):
    def some(logits):
        return logits.masked_fill(torch.arange(logits.shape[-1]) % 3 > 0, -math.inf)

    tokens = sample(lookup(11, some), torch.arange(500).unsqueeze(1), eos=None, max_length=5)
    assert set(tokens.unique().tolist()) <= {0, 3, 6, 9}


def test_a_number_drawn_names_its_token():
    """At the borders of the CDF: four tokens of exactly a quarter."""
    logits = torch.zeros(7, 6)
    logits[:, [0, 3]] = -math.inf
    below = [0.25 - 2**-54, 0.75 - 2**-53, 1 - 2**-53]
    drawn = torch.tensor([0.0, 0.25, 0.5, 0.75, *below], dtype=torch.float64)
    assert _draw(logits, drawn, 1.0, None, 1.0).tolist() == [1, 2, 4, 5, 1, 4, 5]
    # The fewest that reach top_p, and of two words of a half each.
    for top_k, top_p, last in (
        (None, 0.25, 1),
        (None, 0.26, 2),
        (None, 0.5, 2),
        (None, 0.51, 4),
        (2, 0.5, 1),
        (2, 0.51, 2),
    ):
        assert _draw(logits[:2], drawn[[0, -1]], 1.0, top_k, top_p).tolist() == [1, last]


def test_logits_that_are_no_distribution(lookup):
    src = torch.zeros(2, 1, dtype=torch.int64)
    for value in (math.nan, -math.inf):
        broken = lookup(5, lambda t, value=value: torch.full_like(t, value))
        for options in ({}, {"top_k": 2}, {"top_p": 0.5}):
            with pytest.raises(RuntimeError, match="^fastseq.sample: expected finite logits"):
                sample(broken, src, **options)


def test_models_without_attention(plain_model):
    src = torch.randint(9, (6, 5))
    tokens = sample(plain_model, src, max_length=7, generator=1, eos=None)
    for row in range(6):
        h, c = plain_model.encoder(src[row : row + 1])
        for given, token in zip([2, *tokens[row].tolist()], tokens[row].tolist(), strict=False):
            logits, h, c = plain_model.decoder(torch.tensor([[given]]), h, c)
            assert logits[0, 0].softmax(0)[token] > 0
    assert tokens.shape == (6, 7)
    expected = greedy(plain_model, src, max_length=7)
    assert torch.equal(sample(plain_model, src, max_length=7, top_k=1), expected)


def test_nothing_to_write(model):
    assert sample(model, torch.randint(9, (3, 4)), max_length=0).shape == (3, 0)


BAD = [
    ({"temperature": 0}, "temperature above 0, got 0"),
    ({"temperature": -1.0}, "temperature above 0, got -1.0"),
    ({"temperature": math.nan}, "temperature above 0, got nan"),
    ({"temperature": math.inf}, "temperature above 0, got inf"),
    ({"top_k": 0}, "top_k of at least 1, got 0"),
    ({"top_p": 0.0}, "top_p above 0 and at most 1, got 0.0"),
    ({"top_p": 1.01}, "top_p above 0 and at most 1, got 1.01"),
    ({"top_p": math.nan}, "top_p above 0 and at most 1, got nan"),
    ({"max_length": -1}, "max_length of at least 0, got -1"),
    ({"eos": torch.tensor([1, 2])}, r"eos .*\[B\] = \[3\], got \[2\]"),
]


def test_options_of_another_kind(model):
    src = torch.randint(9, (3, 4))
    with pytest.raises(TypeError, match="^fastseq.sample: expected top_k to be an integer"):
        sample(model, src, top_k=2.5)
    with pytest.raises(TypeError, match="^fastseq.sample: expected src of token ids, got torch.f"):
        sample(model, src.float())
    expected = sample(model, src, generator=1)
    assert torch.equal(sample(model, src, generator=1, top_k=10**30), expected)


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(row[0]) for row in BAD])
def test_bad_arguments(model, change, message):
    with pytest.raises(ValueError, match=f"^fastseq.sample: expected.*{message}"):
        sample(model, torch.randint(9, (3, 4)), **change)
