"""Words cut into frequent pieces, so that no word is unknown and related ones share what they can.

Byte-pair encoding: a word starts as its characters; the pairs that were most frequent in training
are joined, in the order in which they were learnt. Every piece of a word but its last ends in a
space, which no word has in it.

Source: Sennrich, Haddow, Birch 2016, "Neural Machine Translation of Rare Words with Subword Units".
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import pairwise

__all__ = ["Subwords", "join", "learn"]

Pair = tuple[str, str]

MORE = " "


def learn(counts: Mapping[str, int], number: int) -> list[Pair]:
    """The pairs to join, the most frequent first, equally frequent ones in the order of their text.

    Args:
        counts: how often each word occurs.
        number: the most pairs to learn; fewer where none is left that occurs twice.
    """
    words = [_characters(word) for word in counts]
    often = list(counts.values())
    totals: Counter[Pair] = Counter()
    where: dict[Pair, set[int]] = defaultdict(set)
    for index, pieces in enumerate(words):
        for pair in pairwise(pieces):
            totals[pair] += often[index]
            where[pair].add(index)
    # Entries whose count has changed since are passed over: each change adds one of its own.
    heap = [(-total, pair) for pair, total in totals.items()]
    heapify(heap)
    learnt: list[Pair] = []
    while len(learnt) < number and heap:
        negative, best = heappop(heap)
        if totals[best] != -negative:
            continue
        if totals[best] < 2:
            break
        learnt.append(best)
        changed = set()
        for index in where.pop(best):
            before, words[index] = words[index], _joined(words[index], best)
            for sign, pieces in ((-1, before), (1, words[index])):
                for pair in pairwise(pieces):
                    totals[pair] += sign * often[index]
                    changed.add(pair)
            for pair in pairwise(words[index]):
                where[pair].add(index)
        for pair in changed:
            heappush(heap, (-totals[pair], pair))
    return learnt


class Subwords:
    """Cuts words into pieces.

    Args:
        pairs: from :func:`learn`.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = [(first, second) for first, second in pairs]
        self._rank = {pair: rank for rank, pair in enumerate(self.pairs)}
        self._known: dict[str, list[str]] = {}

    def split(self, words: Iterable[str]) -> list[str]:
        """The pieces of words, those of one word in turn."""
        return [piece for word in words for piece in self._pieces(word)]

    def _pieces(self, word: str) -> list[str]:
        if word not in self._known:
            pieces, last = _characters(word), len(self.pairs)
            while len(pieces) > 1:
                rank = min(self._rank.get(pair, last) for pair in pairwise(pieces))
                if rank == last:
                    break
                pieces = _joined(pieces, self.pairs[rank])
            self._known[word] = pieces
        return self._known[word]


def join(pieces: Iterable[str]) -> list[str]:
    """The words of pieces; what is left of one that was cut off counts as a word."""
    words, start = [], ""
    for piece in pieces:
        if piece.endswith(MORE):
            start += piece.removesuffix(MORE)
        else:
            words.append(start + piece)
            start = ""
    return [*words, start] if start else words


def _characters(word: str) -> list[str]:
    return [*(character + MORE for character in word[:-1]), word[-1:]]


def _joined(pieces: list[str], pair: Pair) -> list[str]:
    result: list[str] = []
    for piece in pieces:
        if result and (result[-1], piece) == pair:
            result[-1] = result[-1].removesuffix(MORE) + piece
        else:
            result.append(piece)
    return result
