"""The rows being decoded, one or several for each source, and one step for all of them.

Greedy decoding, sampling and beam search differ in which token follows; the loop is the same.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastseq.decoding._module import ModuleDecoder
from fastseq.functional.decoder import past_end
from fastseq.nn.decoder import AttentionDecoder
from fastseq.reference.attention import check_lengths, length_mask

__all__ = [
    "PAD",
    "Choice",
    "Rows",
    "a_token_each",
    "check_integers",
    "check_max_length",
    "cut",
    "decode",
    "whole",
    "write",
]

PAD = 0


class Rows:
    """State and decoder of the sources that are not finished yet.

    A decoder's ``stepper(encoder_outputs, mask)`` is asked once and then called with (token
    [W * B, 1], *state [L, W * B, H]), W rows for each source in turn; it returns (logits
    [W * B, 1, V], *state, attention weights [W * B, 1, S]). Its ``select(sources)``, if it has one,
    keeps some of the sources. A decoder without stepper is called itself.
    """

    def __init__(self, model: nn.Module, src: Tensor, lengths: Tensor | None, where: str) -> None:
        """Encode the sources.

        Args:
            model: with the ``encoder`` and ``decoder`` of a Seq2Seq, with or without attention.
            src: source token ids, [B, S], int64.
            lengths: tokens in each source row, [B], int64, between 1 and S; None: all are full.
            where: the caller's name, for errors.

        Raises:
            ValueError: ``src`` of another shape, ``lengths`` out of range or without use.
            TypeError: ``lengths`` not int64, ``src`` floating.
        """
        if src.dim() != 2:
            raise ValueError(
                f"fastseq.{where}: expected src of shape [B, S], got {list(src.shape)}"
            )
        if src.is_floating_point():
            raise TypeError(f"fastseq.{where}: expected src of token ids, got {src.dtype}")
        decoder = model.decoder
        attends = hasattr(decoder, "stepper") or (
            "encoder_outputs" in inspect.signature(decoder.forward).parameters
        )
        if isinstance(decoder, AttentionDecoder):
            decoder = ModuleDecoder(decoder)
        mask = None
        if lengths is not None:
            check_lengths(lengths, src)
            if bool((lengths == src.shape[1]).all()):
                lengths = None
            elif not attends:
                raise ValueError(
                    f"fastseq.{where}: expected sources of one length for a model without "
                    "attention, whose encoder reads each row to its end"
                )
            else:
                mask = length_mask(lengths.to(src.device), src.shape[1])
        encoded = model.encoder(src) if lengths is None else model.encoder(src, lengths)
        outputs, state = encoded if attends else (None, encoded)
        self._state = (state,) if isinstance(state, Tensor) else tuple(state)
        if isinstance(decoder, ModuleDecoder):
            self._state = decoder.first(self._state)
        self._prepare = partial(_prepare, decoder, outputs, mask) if attends else lambda: decoder
        self._step: Callable | None = None
        self._alone = decoder
        self._source = (*self._state, outputs, mask) if attends else self._state
        self.sources = torch.arange(src.shape[0], device=src.device)
        """Which of the given sources are left, [B], int64."""
        self.no_weights = outputs.new_empty(src.shape[0], 0, src.shape[1]) if attends else None
        """Attention weights of no steps, [B, 0, S]; None for a model without attention."""

    def greedy(
        self, start: Tensor, max_length: int, end_token: int | None
    ) -> tuple[Tensor, Tensor] | None:
        """Tokens [B, N] and weights [B, N, S] of the likeliest tokens, by the decoder itself; None
        where it has no loop of its own for that."""
        generate = getattr(self._alone, "generate", None)
        if generate is None or max_length == 0 or start.shape[0] == 0:
            return None
        found = generate(start, max_length, *self._source, end_token=end_token)
        return None if found is None else cut(*found, end_token)

    def alone(self, way: str, start: Tensor, **options: object) -> tuple[Tensor, ...] | None:
        """What the decoder's own method ``way`` returns, "search" for a beam search or "draw" for
        sampling; None where it has none that does. ``options``: those of the method."""
        method = getattr(self._alone, way, None)
        lowered = torch.is_autocast_enabled(start.device.type)
        if method is None or start.shape[0] == 0 or lowered:
            return None
        return method(start, *self._source, **options)

    def step(self, token: Tensor) -> tuple[Tensor, Tensor | None]:
        """Advance by a token a row, [W * B]: logits [W * B, V] and weights [W * B, S], if any."""
        # Not before: a decoder that does all steps itself prepares the source for itself.
        self._step = self._step or self._prepare()
        outputs = self._step(token.unsqueeze(1), *self._state)
        end = 1 + len(self._state)
        self._state = tuple(outputs[1:end])
        return outputs[0].select(1, -1), outputs[end].select(1, -1) if len(outputs) > end else None

    def select(self, rows: Tensor | None, kept: Tensor | None) -> None:
        """Go on with some rows and some sources only.

        Args:
            rows: of the state, in their new order, W for each source kept in turn, [W * B], int64;
                None: all as they are.
            kept: positions in ``sources``, [B], int64; None: all.
        """
        if rows is not None:
            self._state = tuple(state.index_select(1, rows) for state in self._state)
        if kept is not None:
            self.sources = self.sources.index_select(0, kept)
            if hasattr(self._step, "select"):
                self._step = self._step.select(kept)


def whole(
    model: nn.Module, way: str, src: Tensor, lengths: Tensor | None, start: Tensor, **options
) -> tuple[Tensor, ...] | None:
    """What the model's own ``in_one_call`` returns, source and all; None where it has none that
    does."""
    if lengths is not None or not hasattr(model, "in_one_call"):
        return None
    return model.in_one_call(way, src, start, **options)


def cut(tokens: Tensor, weights: Tensor, end_token: int | None) -> tuple[Tensor, Tensor]:
    """Tokens [B, N] and weights [B, N, S] as far as a row goes on: what follows a row's first end
    is PAD."""
    if end_token is None:
        return tokens, weights
    past = past_end(tokens, end_token)
    steps = int((~past).sum(1).max())
    return tokens.masked_fill(past, PAD)[:, :steps], weights[:, :steps]


def _has_stepper(decoder: nn.Module) -> bool:
    """Whether a stepper stands for calling the decoder: not where hooks want to be called, or where
    ``forward`` was written anew, on the decoder or in a class below the stepper's."""
    if not isinstance(decoder, nn.Module) or "stepper" in decoder.__dict__:
        return hasattr(decoder, "stepper")
    hooks = decoder._forward_hooks or decoder._forward_pre_hooks or "forward" in decoder.__dict__
    for kind in type(decoder).__mro__:
        if hooks or "stepper" in vars(kind) or "forward" in vars(kind):
            return not hooks and "stepper" in vars(kind)
    return False


def _prepare(decoder: nn.Module, outputs: Tensor, mask: Tensor | None) -> Callable:
    step = decoder.stepper(outputs, mask) if _has_stepper(decoder) else None
    return step if hasattr(step, "select") else _Prepared(decoder, outputs, mask, step)


class _Prepared:
    """A source for a decoder that can't narrow it: a stepper without select, or none at all."""

    def __init__(
        self, decoder: nn.Module, outputs: Tensor, mask: Tensor | None, step: Callable | None
    ) -> None:
        self._decoder, self._step = decoder, step
        self._given = (outputs, mask)
        self._repeated = (1, self._given)

    def __call__(self, token: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        if self._step is not None:
            return self._step(token, *state)
        width = token.shape[0] // self._given[0].shape[0]
        if width != self._repeated[0]:
            self._repeated = (width, tuple(_each(t, width) for t in self._given))
        outputs, mask = self._repeated[1]
        return self._decoder(token, *state, encoder_outputs=outputs, mask=mask)

    def select(self, sources: Tensor) -> Callable:
        outputs, mask = (None if t is None else t.index_select(0, sources) for t in self._given)
        return _prepare(self._decoder, outputs, mask)


def _each(t: Tensor | None, times: int) -> Tensor | None:
    return None if t is None else t.repeat_interleave(times, dim=0)


class Choice(NamedTuple):
    """What follows a step: tokens [W * B], and what :meth:`Rows.select` is given."""

    token: Tensor
    rows: Tensor | None = None
    kept: Tensor | None = None


def decode(
    rows: Rows,
    token: Tensor,
    max_length: int,
    choose: Callable[[Tensor, Tensor | None], Choice],
) -> None:
    """Step until no source is left, ``max_length`` times at the most.

    Args:
        rows: changed in place.
        token: what each source starts with, [B], int64.
        max_length: the most steps.
        choose: given the logits [W * B, V] of a step and its attention weights [W * B, S] or None,
            takes what it wants of them and says what follows.
    """
    for _ in range(max_length):
        if not rows.sources.numel():
            break
        token, chosen, kept = choose(*rows.step(token))
        rows.select(chosen, kept)


def write(
    rows: Rows,
    start: Tensor,
    ends: Tensor | None,
    max_length: int,
    pick: Callable[[Tensor], Tensor],
    keep_weights: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Write one target a source, leaving those that have ended out of every further step.

    Args:
        rows: changed in place.
        start: what each source starts with, [B], int64.
        ends: token that ends a target, [B], int64; None: none does.
        max_length: the most tokens.
        pick: given logits [B, V] of the sources left, the token of each, [B], int64.
        keep_weights: return the attention weights.

    Returns:
        tokens: [B, N], int64, N <= max_length, with the end where it came and PAD after it.
        weights: [B, N, S], zero after the end; None unless asked for.
    """
    batch = start.shape[0]
    tokens, weights = [start.new_empty(batch, 0)], [rows.no_weights]

    def choose(logits: Tensor, attention: Tensor | None) -> Choice:
        token, sources = pick(logits), rows.sources
        tokens.append(_spread(token, sources, batch, PAD).unsqueeze(1))
        if keep_weights:
            weights.append(_spread(attention, sources, batch, 0).unsqueeze(1))
        if ends is None:
            return Choice(token)
        going = token != ends[sources]
        if bool(going.all()):
            return Choice(token)
        kept = going.nonzero().squeeze(1)
        return Choice(token[kept], kept, kept)

    decode(rows, start, max_length, choose)
    return torch.cat(tokens, dim=1), torch.cat(weights, dim=1) if keep_weights else None


def _spread(values: Tensor, sources: Tensor, batch: int, rest: int) -> Tensor:
    """``values`` of the sources left, [B, ...], among those of all."""
    if sources.shape[0] == batch:
        return values
    return values.new_full((batch, *values.shape[1:]), rest).index_copy_(0, sources, values)


def a_token_each(token: int | Tensor, src: Tensor, name: str, where: str) -> Tensor:
    """A token for each source, [B], int64, from one for all or one for each.

    Raises:
        ValueError: another shape.
        TypeError: not of integers.
    """
    batch = src.shape[0]
    if not isinstance(token, Tensor):
        check_integers(where, **{name: token})
    elif token.is_floating_point() or token.is_complex():
        raise TypeError(f"fastseq.{where}: expected {name} of integers, got {token.dtype}")
    given = torch.as_tensor(token, dtype=torch.int64, device=src.device)
    if given.shape not in ((), (batch,)):
        raise ValueError(
            f"fastseq.{where}: expected {name} to be a token or of shape [B] = [{batch}], "
            f"got {list(given.shape)}"
        )
    return given.expand(batch)


def check_integers(where: str, **given: object) -> None:
    """Refuse what is no integer, by name.

    Raises:
        TypeError: one is not.
    """
    for name, value in given.items():
        try:
            operator.index(value)
        except TypeError:
            raise TypeError(
                f"fastseq.{where}: expected {name} to be an integer, got {value!r}"
            ) from None


def check_max_length(max_length: int, where: str) -> None:
    """Refuse a negative number of tokens.

    Raises:
        ValueError: it is.
        TypeError: no integer.
    """
    check_integers(where, max_length=max_length)
    if max_length < 0:
        raise ValueError(f"fastseq.{where}: expected max_length of at least 0, got {max_length}")
