"""Words to numbers and back."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

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
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = [*SPECIALS, *words]
        self._ids = {word: id for id, word in enumerate(self.words)}
        if len(self._ids) != len(self.words):
            raise ValueError(
                "fastseq.Vocabulary: expected every word once, got repetitions among "
                f"{len(words)} words"
            )

    @classmethod
    def build(cls, sentences: Iterable[Sequence[str]], min_frequency: int = 1) -> Vocabulary:
        """Collect the tokens that occur at least ``min_frequency`` times, most frequent first.

        Equally frequent ones are in the order of their text, so the same sentences in any order
        give the same vocabulary.

        Raises:
            ValueError: no token is that frequent.
        """
        counts = Counter(token for sentence in sentences for token in sentence)
        frequent = [token for token, count in counts.items() if count >= min_frequency]
        if not frequent:
            raise ValueError(
                f"fastseq.Vocabulary: expected words that occur at least {min_frequency} times, "
                f"got none among {len(counts)} different words; lower --min-frequency"
            )
        return cls(sorted(frequent, key=lambda token: (-counts[token], token)))

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Iterable[str]) -> list[int]:
        """The ids of tokens, <unk> for those not known; no <bos> or <eos> is added."""
        return [self._ids.get(token, UNK) for token in tokens]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The tokens of ids up to the first <eos>, without <pad> and <bos>."""
        tokens = []
        for id in ids:
            if id == EOS:
                break
            if id not in (PAD, BOS):
                tokens.append(self.words[id])
        return tokens

    def state(self) -> list[str]:
        """What :class:`Vocabulary` is built from again: plain text, fit for JSON."""
        return self.words[len(SPECIALS) :]
