"""Beam search: the most probable target among those a few words wide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastseq.decoding._rows import (
    PAD,
    Choice,
    Rows,
    a_token_each,
    check_integers,
    check_max_length,
    decode,
    whole,
)
from fastseq.decoding._top import descending, top

__all__ = ["Beams", "beam_search"]

# So many continuations of a source are ranked as they are, without each hypothesis's best first:
# fewer operations, which is what a small step costs.
FEW = 1024

# Beyond, the penalty of a long target is no float64.
MOST_PENALTY = 50


class Beams(NamedTuple):
    """What :func:`beam_search` returns."""

    tokens: Tensor
    scores: Tensor
    lengths: Tensor


@torch.no_grad()
def beam_search(
    model: nn.Module,
    src: Tensor,
    lengths: Tensor | None = None,
    max_length: int = 100,
    bos: int | Tensor = 2,
    eos: int | Tensor | None = 3,
    *,
    width: int = 5,
    n_best: int = 1,
    length_penalty: float | str = 0.0,
    min_length: int = 0,
    early_stop: bool = True,
    no_repeat_ngram: int = 0,
) -> Beams:
    """Search the most probable targets of a batch of sources with a Seq2Seq, fast or reference.

    At each step the beam's hypotheses are continued by every token. A continuation by ``eos`` that
    is among the ``width`` most probable ones is finished; the ``width`` most probable others are
    the beam of the next step. Equally probable ones are taken in the order of their hypotheses,
    then of their token ids. What the beam holds after ``max_length`` tokens, or where no token may
    follow any of it, is finished too, without ``eos``. Finished hypotheses are ranked by

        log P(tokens) / penalty(l)

    with l the number of tokens, ``eos`` included. Sources that are done take no part in further
    steps. A source's keys are held once for all its hypotheses.

    The model's mode is left as it is: call ``model.eval()`` first where that matters.

    Args:
        model: with the ``encoder`` and ``decoder`` of a Seq2Seq, with or without attention.
        src: source token ids, [B, S], int64.
        lengths: tokens in each source row, [B], int64, between 1 and S; None: all are full.
        max_length: the most tokens of a target.
        bos: start token, or one for each row, [B], int64.
        eos: token that ends a target, or one for each row, [B], int64; None: none does.
        width: hypotheses a source, between 1 and V. With 1 and ``early_stop`` the result is that
            of :func:`greedy`.
        n_best: how many to return for each source, at most ``width``.
        length_penalty: alpha of Wu's ((5 + l) / 6)^alpha, 0 (none) to 50, or "average" for l.
        min_length: tokens a target has before ``eos`` at the least.
        early_stop: end a source at ``width`` finished hypotheses. If False, only when nothing in
            its beam can still come among its ``n_best``.
        no_repeat_ngram: no target holds the same sequence of so many tokens twice; 0: it may.

    Returns:
        A :class:`Beams` of ``tokens`` [B, n_best, N], int64, best first, N <= max_length: without
        the start token, with ``eos`` where it came, and <pad> = 0 after it; ``scores`` [B, n_best],
        as above, minus infinity where there are no more, float64; and ``lengths`` [B, n_best],
        int64: l, tokens with ``eos``.

    Raises:
        ValueError: an option out of range, ``bos`` or ``eos`` of another shape, ``lengths`` out of
            range.
        TypeError: ``lengths`` not int64, an option not the number it should be.
        RuntimeError: logits that are NaN.

    Source: Sutskever, Vinyals, Le 2014 (search); Wu et al. 2016, "Google's Neural Machine
    Translation System", equation 14 (penalty; without its coverage term).
    """
    options = _Options(
        width, n_best, length_penalty, min_length, early_stop, no_repeat_ngram, max_length
    )
    start = a_token_each(bos, src, "bos", "beam_search")
    ends = None if eos is None else a_token_each(eos, src, "eos", "beam_search")
    given = {"ends": ends, **options.of_a_kernel()}
    found = whole(model, "beams", src, lengths, start, **given) if max_length else None
    if found is None:
        rows = Rows(model, src, lengths, "beam_search")
        found = rows.alone("search", start, **given) if max_length else None
    if found is not None:
        return _trimmed(Beams(*found))
    search = _Search(rows, ends, options)
    decode(rows, start, max_length, search.choose)
    return search.result()


@dataclass(frozen=True)
class _Options:
    width: int
    n_best: int
    length_penalty: float | str
    min_length: int
    early_stop: bool
    no_repeat_ngram: int
    max_length: int

    def __post_init__(self) -> None:
        check_max_length(self.max_length, "beam_search")
        names = ("width", "n_best", "min_length", "no_repeat_ngram")
        check_integers("beam_search", **{name: getattr(self, name) for name in names})
        where = "fastseq.beam_search: expected"
        if self.width < 1:
            raise ValueError(f"{where} width of at least 1, got {self.width}")
        if not 1 <= self.n_best <= self.width:
            raise ValueError(
                f"{where} n_best between 1 and width = {self.width}, got {self.n_best}"
            )
        penalty = self.length_penalty
        if isinstance(penalty, str):
            if penalty != "average":
                raise ValueError(
                    f"{where} length_penalty as a number or 'average', got {penalty!r}"
                )
        elif not 0 <= penalty < torch.inf:
            raise ValueError(f"{where} length_penalty of at least 0, got {penalty}")
        elif penalty > MOST_PENALTY:
            raise ValueError(f"{where} length_penalty of at most {MOST_PENALTY}, got {penalty}")
        for name in names[2:]:
            if getattr(self, name) < 0:
                raise ValueError(f"{where} {name} of at least 0, got {getattr(self, name)}")

    def penalty(self, length: int) -> float:
        """What the log-probability of ``length`` tokens is divided by; grows with it."""
        if self.length_penalty == "average":
            return max(length, 1)
        return ((5 + length) / 6) ** self.length_penalty

    def of_a_kernel(self) -> dict[str, object]:
        """As a decoder's own search takes them."""
        return {
            "penalties": [self.penalty(length) for length in range(self.max_length + 1)],
            "width": self.width,
            "n_best": self.n_best,
            "min_length": self.min_length,
            "early_stop": self.early_stop,
            "no_repeat_ngram": self.no_repeat_ngram,
        }


class _Search:
    """Hypotheses of every source: those in its beam, and the best of those that are finished.

    Of ``tokens`` [B, W, l], ``scores`` [B, W], log-probabilities, and ``ends`` [B, 1] each row
    belongs to a source left, of ``best`` and ``finished`` to a source given. A place in the beam
    that nothing fills scores minus infinity.
    """

    def __init__(self, rows: Rows, ends: Tensor | None, options: _Options) -> None:
        batch, n = rows.sources.shape[0], options.n_best
        new = rows.sources.new_zeros
        none = new((batch, n), dtype=torch.float64).fill_(-torch.inf)
        self.rows, self.options = rows, options
        self.ends = None if ends is None else ends.unsqueeze(1)
        self.tokens = new(batch, 1, 0)
        self.scores = new((batch, 1), dtype=torch.float64)
        self.finished = new(batch)
        self.best = Beams(new(batch, n, 0), none, new(batch, n))
        self._prepare(None)
        if options.max_length == 0:
            self._finish(self.tokens, self.scores)

    def choose(self, logits: Tensor, _: Tensor | None) -> Choice:
        """Continue every hypothesis, [W * B, V], and keep the best continuations."""
        width, length = self.options.width, self.tokens.shape[2] + 1
        batch, ends = self.scores.shape[0], self.ends
        if length == 1:
            _check_vocabulary(logits.shape[1], width, ends)

        total, parent, token = self._continuations(logits, ends)
        rows = parent + self._first
        alive = total > -torch.inf
        going_on = alive if ends is None else alive & (token != ends)
        some_end = not bool(going_on.all())
        if some_end:
            tokens = torch.cat((_pick(self.tokens, parent), token.unsqueeze(2)), dim=2)
            self._finish_some(tokens, total, alive, going_on)
            others = (~going_on).to(torch.uint8).argsort(dim=1, stable=True)
            total = total.masked_fill(~going_on, -torch.inf).gather(1, others)
            rows, token = rows.gather(1, others), token.gather(1, others)
        self.scores = total[:, :width]
        token, rows = (t[:, :width].flatten() for t in (token, rows))
        tokens = self.tokens.flatten(0, 1).index_select(0, rows)
        self.tokens = torch.cat((tokens, token.unsqueeze(1)), dim=1).view(batch, -1, length)
        last = length == self.options.max_length
        if last:
            self._finish(self.tokens, self.scores)
        # Where none ends, and no bound comes nearer, nothing is done that was not before.
        kept = self._left() if some_end or last or not self.options.early_stop else None
        if kept is not None:
            self.scores, self.tokens = self.scores[kept], self.tokens[kept]
            token, rows = (t.view(batch, -1)[kept].flatten() for t in (token, rows))
        if kept is not None or length == 1:
            self._prepare(kept)
        return Choice(token, rows, kept)

    def result(self) -> Beams:
        """The best finished hypotheses of every source."""
        return _trimmed(self.best)

    def _continuations(self, logits: Tensor, ends: Tensor | None) -> tuple[Tensor, ...]:
        """The best 2 * width of each source, descending: score, place of the parent, token.

        As many because each hypothesis has one continuation that ends it.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        allowed, (batch, beam) = self._allowed(logits, ends), self.scores.shape
        most, V = 2 * self.options.width, logits.shape[1]
        if beam * V <= FEW:
            log_p = logits.log_softmax(1)
            if allowed is not logits:
                log_p = log_p.masked_fill(allowed == -torch.inf, -torch.inf)
            total = (self.scores.unsqueeze(2) + log_p.view(batch, beam, V)).flatten(1)
            total, place = top(total, min(most, beam * V))
            return total, place // V, place % V
        wanted = min(most, V)
        values, token = top(allowed, wanted)
        log_p = logits.log_softmax(1).gather(1, token)
        if allowed is not logits:
            log_p = log_p.masked_fill(values == -torch.inf, -torch.inf)
        total = (self.scores.reshape(-1, 1) + log_p).view(batch, beam * wanted)
        if beam == 1:
            return total, torch.zeros_like(token), token
        total, place = descending(total)
        total, place = (t[:, :most] for t in (total, place))
        return total, place // wanted, token.reshape(batch, beam * wanted).gather(1, place)

    def _allowed(self, logits: Tensor, ends: Tensor | None) -> Tensor:
        """Logits [W * B, V] with minus infinity for what the options rule out."""
        n, written = self.options.no_repeat_ngram, self.tokens.shape[2]
        if ends is not None and written < self.options.min_length:
            ends = ends.expand(self.scores.shape).reshape(-1, 1)
            logits = logits.scatter(1, ends, -torch.inf)
        if 0 < n <= written:
            ngrams = self.tokens.flatten(0, 1).unfold(1, n, 1)
            last = self.tokens.flatten(0, 1)[:, None, written - n + 1 :]
            row, place = (ngrams[:, :, :-1] == last).all(2).nonzero(as_tuple=True)
            logits = logits.clone()
            logits[row, ngrams[row, place, -1]] = -torch.inf
        return logits

    def _finish_some(self, tokens: Tensor, total: Tensor, alive: Tensor, going_on: Tensor) -> None:
        """Finish the continuations that end, and beams that nothing may follow, as they are."""
        if bool(total.isnan().any()):
            raise RuntimeError("fastseq.beam_search: expected logits without NaN, got some")
        stuck = ~alive.any(1, keepdim=True)
        if bool(stuck.any()):
            self._finish(self.tokens, self.scores.masked_fill(~stuck, -torch.inf))
        ended = alive & ~going_on
        ended[:, self.options.width :] = False
        if bool(ended.any()):
            self._finish(tokens, total.masked_fill(~ended, -torch.inf))
            self.finished.index_add_(0, self.rows.sources, ended.sum(1))

    def _finish(self, tokens: Tensor, scores: Tensor) -> None:
        """Let hypotheses [B, N, l] of these log-probabilities compete for ``best``."""
        length, sources = tokens.shape[2], self.rows.sources
        widen = max(length - self.best.tokens.shape[2], 0)
        self.best = self.best._replace(tokens=F.pad(self.best.tokens, (0, widen), value=PAD))
        known = [t[sources] for t in self.best]
        tokens = F.pad(tokens, (0, self.best.tokens.shape[2] - length), value=PAD)
        ranked = torch.cat((known[1], scores / self.options.penalty(length)), dim=1)
        ranked, place = (t[:, : self.options.n_best] for t in descending(ranked))
        lengths = torch.cat((known[2], known[2].new_full(scores.shape, length)), dim=1)
        none = ranked == -torch.inf
        tokens = _pick(torch.cat((known[0], tokens), dim=1), place)
        found = (
            tokens.masked_fill(none.unsqueeze(2), PAD),
            ranked,
            lengths.gather(1, place).masked_fill(none, 0),
        )
        for all_of_them, new in zip(self.best, found, strict=True):
            all_of_them.index_copy_(0, sources, new)

    def _left(self) -> Tensor | None:
        """Positions of the sources left that need a further step, [B]; None: all of them do."""
        options, sources = self.options, self.rows.sources
        best_in_beam = self.scores.amax(1)
        if self.tokens.shape[2] == options.max_length:
            return sources.new_empty(0)
        if options.early_stop:
            enough = self.finished[sources] >= options.width
        else:
            # Log-probabilities only fall, and no penalty is larger than that of the full length.
            bound = best_in_beam / options.penalty(options.max_length)
            enough = self.best.scores[sources, -1] >= bound
        done = enough | (best_in_beam == -torch.inf)
        return (~done).nonzero().squeeze(1) if bool(done.any()) else None

    def _prepare(self, kept: Tensor | None) -> None:
        """What stays as it is until another source is done."""
        if kept is not None and self.ends is not None:
            self.ends = self.ends[kept]
        batch, beam = self.scores.shape
        self._first = torch.arange(batch, device=self.scores.device).unsqueeze(1) * beam


def _trimmed(beams: Beams) -> Beams:
    """Without columns that are all padding."""
    longest = int(beams.lengths.max()) if beams.lengths.numel() else 0
    return beams._replace(tokens=beams.tokens[:, :, :longest])


def _pick(tokens: Tensor, places: Tensor) -> Tensor:
    """Hypotheses [B, M, l] of ``tokens`` [B, N, l] at ``places`` [B, M]."""
    return tokens.gather(1, places.unsqueeze(2).expand(-1, -1, tokens.shape[2]))


def _check_vocabulary(vocabulary: int, width: int, ends: Tensor | None) -> None:
    if width > vocabulary:
        raise ValueError(
            f"fastseq.beam_search: expected width of at most V = {vocabulary}, got {width}"
        )
    if ends is not None and not bool(((ends >= 0) & (ends < vocabulary)).all()):
        raise ValueError(
            f"fastseq.beam_search: expected eos in 0..{vocabulary - 1}, "
            f"got {sorted(set(ends.flatten().tolist()))}"
        )
