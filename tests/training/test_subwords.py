from __future__ import annotations

import json
import random

import pytest

from fastseq.training.subwords import Subwords, join, learn
from fastseq.training.vocabulary import UNK, Vocabulary

# Sennrich's own example.
COUNTS = {"low": 5, "lower": 2, "newest": 6, "widest": 3}


def test_the_most_frequent_pairs_are_learnt_first():
    # e-s and s-t occur 9 times each, l-o 7.
    assert learn(COUNTS, 4) == [("e ", "s "), ("es ", "t"), ("l ", "o "), ("e ", "w ")]


def slowly(counts: dict[str, int], number: int) -> list[tuple[str, str]]:
    """The same from its definition: count all pairs anew for each one learnt."""
    learnt = []
    while len(learnt) < number:
        cut, totals = Subwords(learnt), {}
        for word, count in counts.items():
            pieces = cut.split([word])
            for pair in zip(pieces, pieces[1:], strict=False):
                totals[pair] = totals.get(pair, 0) + count
        best = min(totals, key=lambda pair: (-totals[pair], pair), default=None)
        if best is None or totals[best] < 2:
            break
        learnt.append(best)
    return learnt


@pytest.mark.parametrize("seed", range(20))
def test_learning_is_counting_all_pairs_each_time(seed):
    rng = random.Random(seed)
    words = ["".join(rng.choices("abc@", k=rng.randint(1, 9))) for _ in range(30)]
    counts = {word: rng.randint(1, 5) for word in words}
    pairs = learn(counts, 40)
    assert len(pairs) > 10
    assert pairs == slowly(counts, 40)


def test_words_are_whole_again_after_cutting():
    cut = Subwords(learn(COUNTS, 4))
    assert cut.split(["lowest", "new"]) == ["lo ", "w ", "est", "n ", "e ", "w"]
    for words in (["lowest", "new", "x", "@-@", "@", "@@", "a@@b@@"], []):
        assert join(cut.split(words)) == words
    assert join(["lo ", "w "]) == ["low"]


def test_pairs_that_occur_once_are_not_learnt():
    assert learn({"ab": 1, "c": 9}, 5) == []
    assert learn({}, 5) == []
    assert learn(COUNTS, 0) == []


def test_a_vocabulary_of_pieces():
    sentences = [[word] * count for word, count in COUNTS.items()]
    vocabulary = Vocabulary.build(sentences, 1, subwords=4)
    ids = vocabulary.encode(["lowest", "newer", "xenon"])
    assert vocabulary.decode(ids)[:2] == ["lowest", "newer"]
    assert UNK not in ids[:7] and UNK in ids
    again = Vocabulary(*json.loads(json.dumps(vocabulary.state())))
    assert again.words == vocabulary.words
    assert again.encode(["lowest", "xenon"]) == vocabulary.encode(["lowest", "xenon"])
    assert Vocabulary.build(sentences, 1).encode(["lowest"]) == [UNK]
