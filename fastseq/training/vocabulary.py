"""Words to numbers and back."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from fastseq.training.subwords import Subwords, join, learn

__all__ = ["BOS", "EOS", "PAD", "UNK", "Vocabulary", "detokenise", "tokenise"]

PAD, UNK, BOS, EOS = range(4)
SPECIALS = ("<pad>", "<unk>", "<bos>", "<eos>")

_TOKEN = re.compile(r"\w+|[^\w\s]")
_BETWEEN_WORDS = re.compile(r"(?<=\w)([^\w\s])(?=\w)")
_JOINT = re.compile(r" ?@(\S)@ ?")
_SPACED_RIGHT_ONLY = re.compile(r" ([.,;:!?%)\]}…])")
_SPACED_LEFT_ONLY = re.compile(r"([(\[{]) ")
_QUOTED = re.compile(r'" (.*?) "')


def tokenise(text: str) -> list[str]:
    """Lower-case words and single punctuation marks.

    A mark with a word character on both sides is written ``@-@``, so that :func:`detokenise` can
    tell the hyphen of "T-shirt" (t @-@ shirt) from a dash.
    """
    text = unicodedata.normalize("NFC", text).lower()
    # Splitting at the joints first leaves the captured marks at the odd places.
    parts = _BETWEEN_WORDS.split(text)
    tokens = _TOKEN.findall(parts[0])
    for mark, part in zip(parts[1::2], parts[2::2], strict=True):
        tokens.append(f"@{mark}@")
        tokens.extend(_TOKEN.findall(part))
    return tokens


def detokenise(tokens: Iterable[str]) -> str:
    """The text of tokens from :func:`tokenise`, in lower case, spaced as one would write it."""
    text = _JOINT.sub(r"\1", " ".join(tokens))
    text = _SPACED_RIGHT_ONLY.sub(r"\1", text)
    text = _SPACED_LEFT_ONLY.sub(r"\1", text)
    return _QUOTED.sub(r'"\1"', text)


class Vocabulary:
    """The words a model knows. Ids 0 to 3 are <pad>, <unk>, <bos> and <eos>.

    Args:
        words: the other words in the order of their ids, without repetition.
        pairs: from :func:`fastseq.training.subwords.learn`: what has an id are pieces of words.
    """

    def __init__(self, words: Sequence[str], pairs: Sequence[tuple[str, str]] = ()) -> None:
        self.subwords = Subwords(pairs) if pairs else None
        self.words = [*SPECIALS, *words]
        self._ids = {word: id for id, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError(
                "fastseq.Vocabulary: expected every word once, got repetitions among "
                f"{len(words)} words"
            )

    @classmethod
    def build(
        cls, sentences: Iterable[Sequence[str]], min_frequency: int = 1, subwords: int = 0
    ) -> Vocabulary:
        """Collect the tokens that occur at least ``min_frequency`` times, most frequent first.

        Equally frequent ones are in the order of their text, so the same sentences in any order
        give the same vocabulary. With ``subwords``, that many pairs are learnt, and what is
        collected are the pieces that words are then cut into.

        Raises:
            ValueError: no token is that frequent.
        """
        counts = Counter(token for sentence in sentences for token in sentence)
        pairs = learn(counts, subwords) if subwords else []
        if pairs:
            words, cut, counts = counts, Subwords(pairs), Counter()
            for word, count in words.items():
                for piece in cut.split([word]):
                    counts[piece] += count
        frequent = [token for token, count in counts.items() if count >= min_frequency]
        if not frequent:
            raise ValueError(
                f"fastseq.Vocabulary: expected words that occur at least {min_frequency} times, "
                f"got none among {len(counts)} different words; lower --min-frequency"
            )
        return cls(sorted(frequent, key=lambda token: (-counts[token], token)), pairs)

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The ids of tokens, <unk> for those not known; no <bos> or <eos> is added."""
        pieces = tokens if self.subwords is None else self.subwords.split(tokens)
        return [self._ids.get(piece, UNK) for piece in pieces]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens of ids up to the first <eos>, without <pad> and <bos>."""
        tokens = []
        for id in ids:
            if id == EOS:
                break
            if id not in (PAD, BOS):
                tokens.append(self.words[id])
        return tokens if self.subwords is None else join(tokens)

    def state(self) -> tuple[list[str], list[tuple[str, str]]]:
        """What :class:`Vocabulary` is built from again: plain text, fit for JSON."""
        return self.words[len(SPECIALS) :], [] if self.subwords is None else self.subwords.pairs
