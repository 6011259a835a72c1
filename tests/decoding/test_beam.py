"""Beam search against every target there is, against a search by hand, and on real models."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastseq
from fastseq.decoding import beam_search, greedy, next_tokens, sample
from fastseq.decoding._top import top
from fastseq.models import attention as fast_house
from fastseq.reference import attention as reference_house
from fastseq.testing import assert_close_to_reference

BOS, EOS = 2, 3


def penalty(kind, length):
    return max(length, 1) if kind == "average" else ((5 + length) / 6) ** kind


def every_target(log_p, max_length, kind=0.0, eos=EOS):
    """(score, tokens) of every target, best first: those that end, and those cut off."""
    found = []

    def go(tokens, total):
        if len(tokens) == max_length or (tokens and tokens[-1] == eos):
            found.append((total / penalty(kind, len(tokens)), list(tokens)))
            return
        for token, p in enumerate(log_p((BOS, *tokens))):
            if p > -math.inf:
                go((*tokens, token), total + p)

    go((), 0.0)
    return sorted(found, key=lambda pair: -pair[0])


def by_hand(
    log_p,
    width,
    max_length,
    kind=0.0,
    *,
    eos=EOS,
    n_best=1,
    min_length=0,
    early_stop=True,
    no_repeat_ngram=0,
):
    """The search of one source as its documentation says, one hypothesis at a time."""

    def allowed(tokens, token):
        if token == eos and len(tokens) < min_length:
            return False
        n, new = no_repeat_ngram, (*tokens, token)
        seen = [new[i : i + n] for i in range(len(new) - n)] if n else []
        return new[len(new) - n :] not in seen

    beam, best, finished = [(0.0, ())], [], 0

    def finish(total, tokens):
        best.append((total / penalty(kind, len(tokens)), list(tokens)))
        best.sort(key=lambda pair: -pair[0])

    for length in range(1, max_length + 1):
        following = []
        for total, tokens in beam:
            scores = log_p((BOS, *tokens))
            following += [
                (total + p, (*tokens, token))
                for token, p in enumerate(scores)
                if p > -math.inf and allowed(tokens, token)
            ]
        if not following:
            break
        following.sort(key=lambda pair: -pair[0])
        for total, tokens in following[:width]:
            if tokens[-1] == eos:
                finish(total, tokens)
                finished += 1
        beam = [pair for pair in following if pair[1][-1] != eos][:width]
        if not beam:
            break
        if length == max_length:
            continue
        if early_stop and finished >= width:
            return best[:n_best]
        if not early_stop and len(best) >= n_best:
            if best[n_best - 1][0] >= beam[0][0] / penalty(kind, max_length):
                return best[:n_best]
    for total, tokens in beam:
        finish(total, tokens)
    return best[:n_best]


def assert_found(found, row, expected):
    tokens, scores, lengths = (t[row] for t in found)
    for place, (score, wanted) in enumerate(expected):
        count = int(lengths[place])
        assert tokens[place, :count].tolist() == wanted, (row, place)
        assert tokens[place, count:].count_nonzero() == 0
        assert_close_to_reference(scores[place], torch.tensor(score, dtype=torch.float64))
    missing = slice(len(expected), None)
    assert (scores[missing] == -math.inf).all() and (lengths[missing] == 0).all()
    assert tokens[missing].count_nonzero() == 0


KINDS = [0.0, 0.6, 1.0, 2.5, "average"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("early_stop", [True, False])
def test_full_width_finds_the_best_of_all_targets(lookup, kind, early_stop):
    """Two words and the end, others ruled out: the beam is wide enough for every beginning."""

    def only_three(logits):
        ruled_out = torch.ones(logits.shape[-1], dtype=torch.bool)
        ruled_out[[EOS, 7, 11]] = False
        return logits.masked_fill(ruled_out, -math.inf)

    model, src = lookup(50, only_three), torch.arange(6).unsqueeze(1)
    for max_length in range(1, 6):
        # Ending early at `width` finished ones must not cut the search: there are fewer.
        n_best = 2**max_length if early_stop else 3
        found = beam_search(
            model,
            src,
            max_length=max_length,
            width=50,
            n_best=n_best,
            length_penalty=kind,
            early_stop=early_stop,
        )
        for row in range(6):
            log_p = lambda history, row=row: model.log_p(row, history)  # noqa: E731
            expected = every_target(log_p, max_length, kind)
            assert_found(found, row, expected[:n_best])


def test_full_width_of_the_whole_vocabulary(lookup):
    """Two tokens: the beam holds what one step makes of one token each."""
    for V in (4, 5, 9):
        model, src = lookup(V), torch.arange(4).unsqueeze(1)
        found = beam_search(model, src, max_length=1, width=V, n_best=V)
        for row in range(4):
            expected = every_target(lambda h, row=row: model.log_p(row, h), 1)  # noqa: B023
            assert_found(found, row, expected)


OPTIONS = [
    {},
    {"length_penalty": 0.8},
    {"length_penalty": "average", "early_stop": False},
    {"length_penalty": 1.5, "early_stop": False, "min_length": 3},
    {"min_length": 2, "no_repeat_ngram": 1},
    {"no_repeat_ngram": 2, "length_penalty": 0.3, "early_stop": False},
    {"min_length": 50},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_search_by_hand(lookup, options):
    src = torch.arange(7).unsqueeze(1)
    for V, width, max_length in ((5, 1, 6), (5, 3, 9), (6, 6, 5), (17, 4, 12)):
        # The end is likely enough for beams to end at different steps.
        model = lookup(V, lambda t: t + torch.nn.functional.one_hot(torch.tensor(EOS), t.shape[-1]))
        n_best = max(1, width - 1)
        found = beam_search(
            model, src, max_length=max_length, width=width, n_best=n_best, **options
        )
        named = dict(options)
        kind = named.pop("length_penalty", 0.0)
        for row in range(7):
            log_p = lambda history, row=row: model.log_p(row, history)  # noqa: B023, E731
            expected = by_hand(log_p, width, max_length, kind, n_best=n_best, **named)
            assert_found(found, row, expected)


def test_no_repeats_leave_nothing_to_write(lookup):
    """Four words, none twice, no end: targets of four, or fewer if the end is a word too."""
    model, src = lookup(4), torch.arange(3).unsqueeze(1)
    found = beam_search(model, src, max_length=9, eos=None, width=2, n_best=2, no_repeat_ngram=1)
    assert (found.lengths == 4).all() and found.tokens.shape == (3, 2, 4)
    for row in range(3):
        expected = by_hand(
            lambda h, row=row: model.log_p(row, h), 2, 9, eos=None, n_best=2, no_repeat_ngram=1
        )
        assert_found(found, row, expected)


@pytest.mark.parametrize("min_length", [0, 3])
def test_width_one_is_greedy(model, lookup, min_length):
    src, lengths = torch.randint(9, (16, 5)), torch.randint(1, 6, (16,))
    for eos in (3, 5, 8, None):
        expected = greedy(model, src, lengths, 12, eos=eos)
        found = beam_search(model, src, lengths, 12, eos=eos, width=1)
        assert torch.equal(found.tokens[:, 0], expected)
        ended = (expected == eos).any(1) if eos is not None else torch.zeros(16, dtype=torch.bool)
        cut = expected.shape[1] if not ended.all() else found.lengths.max()
        assert (found.lengths[~ended, 0] == cut).all()
    table, src = lookup(7), torch.arange(20).unsqueeze(1)
    expected = greedy(table, src, max_length=9)
    assert torch.equal(beam_search(table, src, max_length=9, width=1).tokens[:, 0], expected)
    assert len({row.index(EOS) if EOS in row else 9 for row in expected.tolist()}) > 2


def log_p_of(model, src, lengths):
    """A function from a history to log-probabilities, by running the model through it."""
    encoder_outputs, state = model.encoder(src, lengths)
    mask = torch.arange(src.shape[1]) < lengths.unsqueeze(1)

    def log_p(history):
        h, c = state
        for token in history:
            logits, h, c, _ = model.decoder(torch.tensor([[token]]), h, c, encoder_outputs, mask)
        return logits[0, 0].log_softmax(0).tolist()

    return log_p


@torch.no_grad()
def test_real_models_by_hand(model):
    src, lengths = torch.randint(9, (5, 4)), torch.tensor([4, 1, 3, 2, 4])
    options = {"n_best": 3, "early_stop": False}
    found = beam_search(model, src, lengths, 6, width=4, length_penalty=0.7, **options)
    for row in range(5):
        log_p = log_p_of(model, src[row : row + 1], lengths[row : row + 1])
        assert_found(found, row, by_hand(log_p, 4, 6, 0.7, **options))


def test_fast_and_reference_models_agree():
    sizes = (40, 12, 16)
    models = [
        h.Seq2Seq(h.Encoder(*sizes), h.Decoder(*sizes, h.Attention(16))).double()
        for h in (reference_house, fast_house)
    ]
    models[1].load_state_dict(models[0].state_dict())
    src, lengths = torch.randint(40, (9, 7)), torch.randint(1, 8, (9,))
    found = [beam_search(m, src, lengths, 15, width=5, n_best=5) for m in models]
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert_close_to_reference(found[1].scores, found[0].scores)


def test_models_without_attention(plain_model):
    src = torch.randint(9, (5, 4))
    found = beam_search(plain_model, src, max_length=5, width=3, n_best=2)
    for row in range(5):
        h, c = plain_model.encoder(src[row : row + 1])

        def log_p(history, h=h, c=c):
            for token in history:
                logits, h, c = plain_model.decoder(torch.tensor([[token]]), h, c)
            return logits[0, -1].detach().log_softmax(0).tolist()

        assert_found(found, row, by_hand(log_p, 3, 5, n_best=2))


def test_rows_do_not_depend_on_each_other(model):
    src, lengths = torch.randint(9, (6, 5)), torch.tensor([5, 2, 4, 1, 3, 5])
    bos, eos = torch.randint(9, (6,)), torch.randint(9, (6,))
    options = {"max_length": 8, "width": 3, "n_best": 3, "length_penalty": 0.5}
    together = beam_search(model, src, lengths, bos=bos, eos=eos, **options)
    for row in range(6):
        one = slice(row, row + 1)
        alone = beam_search(
            model, src[one], lengths[one], bos=int(bos[row]), eos=int(eos[row]), **options
        )
        count = alone.tokens.shape[2]
        assert torch.equal(together.tokens[one, :, :count], alone.tokens)
        assert torch.equal(together.lengths[one], alone.lengths)
        assert_close_to_reference(together.scores[one], alone.scores)


def test_finished_sources_cost_nothing(lookup):
    model, src = lookup(6), torch.arange(12).unsqueeze(1)
    found = beam_search(model, src, max_length=40, width=2)
    alone = []
    for row in range(12):
        model.calls.clear()
        beam_search(model, src[row : row + 1], max_length=40, width=2)
        alone.append(list(model.calls))
    model.calls.clear()
    assert torch.equal(found.tokens, beam_search(model, src, max_length=40, width=2).tokens)
    expected = [sum(rows) for rows in itertools.zip_longest(*alone, fillvalue=0)]
    assert model.calls == expected and len(set(expected)) > 3


def test_equal_scores_go_by_hypothesis_and_token(lookup):
    """All tokens equally probable, always."""
    model = lookup(6, torch.zeros_like)
    found = beam_search(
        model, torch.zeros(1, 1, dtype=torch.int64), max_length=2, width=3, n_best=3
    )
    assert found.tokens[0].tolist() == [[0, 0], [0, 1], [0, 2]]
    ended = beam_search(
        model, torch.zeros(1, 1, dtype=torch.int64), max_length=2, width=3, n_best=3, eos=0
    )
    # The end first; then, of [1] and [2], the first three continuations: [1, 0] ends as well.
    assert ended.tokens[0].tolist() == [[0, 0], [1, 0], [1, 1]]
    assert ended.lengths[0].tolist() == [1, 2, 2]


def test_the_best_of_equal_scores():
    scores = torch.randint(4, (50, 33)).float()
    scores[scores == 0] = -math.inf
    for k in (1, 2, 7, 32, 33):
        values, indices = top(scores, k)
        expected = scores.sort(dim=1, descending=True, stable=True)
        real = expected.values[:, :k] > -math.inf
        assert torch.equal(values, expected.values[:, :k])
        assert torch.equal(indices[real], expected.indices[:, :k][real])
    assert top(scores, 0)[0].shape == (50, 0)


def test_penalties_by_hand(lookup):
    """One word of probability 1/2 and the end of 1/2: l tokens have log-probability -l log 2."""

    def even(logits):
        values = torch.full_like(logits, -math.inf)
        values[..., [EOS, 5]] = 0.0
        return values

    model, src = lookup(6, even), torch.zeros(1, 1, dtype=torch.int64)
    for kind, by in (
        (0.0, [1, 1, 1]),
        (1.0, [6 / 6, 7 / 6, 8 / 6]),
        (2.0, [1, 49 / 36, 64 / 36]),
        ("average", [1, 2, 3]),
    ):
        found = beam_search(model, src, max_length=3, width=6, n_best=4, length_penalty=kind)
        # Ended after 1, 2, 3 tokens, and cut off after 3.
        wanted = sorted(
            [-math.log(2) * length / by[length - 1] for length in (1, 2, 3, 3)], reverse=True
        )
        assert_close_to_reference(
            found.scores[0], torch.tensor(wanted, dtype=torch.float64), what=str(kind)
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_dtypes(model, dtype):
    found = beam_search(model.to(dtype), torch.randint(9, (4, 5)), max_length=9, width=4, n_best=4)
    assert found.scores.dtype == torch.float64 and found.scores.isfinite().all()
    assert (found.scores.diff(dim=1) <= 0).all()


def test_nothing_to_write(model):
    found = beam_search(model, torch.randint(9, (3, 4)), max_length=0, width=2, n_best=2)
    assert found.tokens.shape == (3, 2, 0)
    assert found.scores.tolist() == [[0.0, -math.inf]] * 3 and found.lengths.count_nonzero() == 0


def test_logits_that_are_nan(lookup):
    model = lookup(6, lambda t: torch.full_like(t, math.nan))
    with pytest.raises(RuntimeError, match="^fastseq.beam_search: expected logits without NaN"):
        beam_search(model, torch.zeros(2, 1, dtype=torch.int64), width=2)


def test_no_sources(model):
    src = torch.zeros(0, 4, dtype=torch.int64)
    found = beam_search(model, src, width=2, n_best=2)
    assert found.tokens.shape == (0, 2, 0) and found.scores.shape == found.lengths.shape == (0, 2)
    assert greedy(model, src).shape == sample(model, src).shape == (0, 0)
    assert next_tokens(model, src, k=3)[0].shape == (0, 3)


def test_keys_are_held_once(monkeypatch):
    """No tensor of a step is as large as the encoder outputs of every hypothesis."""
    from torch.utils._python_dispatch import TorchDispatchMode

    B, W, S, H = 3, 5, 64, 32
    house = fast_house
    model = house.Seq2Seq(house.Encoder(11, 4, H), house.Decoder(11, 4, H, house.Attention(H)))
    shapes = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func in (torch.ops.aten.index_select.default, torch.ops.aten.repeat_interleave):
                shapes.add(tuple(out.shape))
            return out

    with fastseq.use_backend("torch"), Watch():
        beam_search(model, torch.randint(11, (B, S)), max_length=4, width=W)
    assert (1, B * W, H) in shapes
    assert all(len(s) < 3 or s[0] * s[1] <= B * S for s in shapes), shapes


BAD = [
    ({"width": 0}, ValueError, "width of at least 1, got 0"),
    ({"width": 10}, ValueError, "width of at most V = 9, got 10"),
    ({"n_best": 0}, ValueError, "n_best between 1 and width = 5, got 0"),
    ({"n_best": 6}, ValueError, "n_best between 1 and width = 5, got 6"),
    ({"length_penalty": -0.1}, ValueError, "length_penalty of at least 0, got -0.1"),
    ({"length_penalty": math.nan}, ValueError, "length_penalty of at least 0, got nan"),
    ({"length_penalty": 51}, ValueError, "length_penalty of at most 50, got 51"),
    ({"width": 2.5}, TypeError, "width to be an integer, got 2.5"),
    ({"max_length": "3"}, TypeError, "max_length to be an integer, got '3'"),
    ({"bos": 2.5}, TypeError, "bos to be an integer, got 2.5"),
    ({"eos": torch.zeros(3)}, TypeError, "eos of integers, got torch.float32"),
    ({"length_penalty": "wu"}, ValueError, "a number or 'average', got 'wu'"),
    ({"min_length": -1}, ValueError, "min_length of at least 0, got -1"),
    ({"no_repeat_ngram": -2}, ValueError, "no_repeat_ngram of at least 0, got -2"),
    ({"max_length": -1}, ValueError, "max_length of at least 0, got -1"),
    ({"bos": torch.tensor([1, 2])}, ValueError, r"bos .*\[B\] = \[3\], got \[2\]"),
    ({"eos": torch.tensor([[1, 2]])}, ValueError, r"eos .*\[B\] = \[3\], got \[1, 2\]"),
    ({"eos": 9}, ValueError, r"eos in 0\.\.8, got \[9\]"),
    ({"eos": -1}, ValueError, r"eos in 0\.\.8, got \[-1\]"),
    ({"lengths": torch.tensor([1, 2, 9])}, ValueError, "between 1 and S = 4"),
    ({"lengths": torch.tensor([1.0, 2.0, 3.0])}, TypeError, "int64"),
    ({"src": torch.zeros(4, dtype=torch.int64)}, ValueError, r"src of shape \[B, S\], got \[4\]"),
]


@pytest.mark.parametrize(("change", "kind", "message"), BAD, ids=[str(row[2]) for row in BAD])
def test_bad_arguments(model, change, kind, message):
    with pytest.raises(kind, match=f"^fastseq.*{message}"):
        beam_search(model, **({"src": torch.randint(9, (3, 4))} | change))
