"""Decoding without a target, where all steps are one call of a kernel."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from fastseq.functional.beams import attention_beams
from fastseq.functional.decoder import attention_decoder, from_start
from fastseq.functional.samples import attention_samples
from fastseq.models._steps import tables

__all__ = ["WritesAlone"]


class WritesAlone:
    """What :mod:`fastseq.decoding` asks of a decoder. Each method returns None where the loop is
    not one call; ``source``: the states, [1, B, H] each, and with attention the encoder's outputs
    [B, S, *] and a mask [B, S], bool, True = attend, or None."""

    def alone(self, function: Callable, steps: int | None, *source: Tensor) -> Callable | None:
        """``function`` with all arguments given but what the loop starts with and what it chooses
        tokens by; None where it does not serve: for so many steps, if that is known."""
        raise NotImplementedError

    def picks_in_one_call(self) -> bool:
        """Whether the parts are what the constructor made them, so that a loop that chooses its own
        tokens is one call."""
        raise NotImplementedError

    def generate(
        self, start: Tensor, max_length: int, *source: Tensor | None, end_token: int | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Greedy decoding, without gradients.

        Args:
            start: the first token of each row, [B], int64.
            max_length: how many tokens to write, at least 1.
            source: see above.
            end_token: ends a row; it then repeats to the end. None: none ends.

        Returns:
            tokens [B, max_length] and attention weights [B, max_length, S], zero past a row's end.
        """
        run = self.alone(attention_decoder, max_length, *source)
        if run is None:
            return None
        decoded = run(end_token=end_token, **from_start(start, max_length), **tables(self))
        return decoded.tokens[:, 1:], decoded.weights

    def search(
        self, start: Tensor, *source: Tensor | None, **options: object
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Beam search; ``options``: of :func:`fastseq.functional.attention_beams`, which says what
        returns."""
        return self._on_a_cpu(attention_beams, start, source, options)

    def draw(
        self, start: Tensor, *source: Tensor | None, **options: object
    ) -> tuple[Tensor, Tensor] | None:
        """Sampling; ``options``: of :func:`fastseq.functional.attention_samples`, which says what
        returns."""
        return self._on_a_cpu(attention_samples, start, source, options)

    def _on_a_cpu(self, function, start, source, options):
        run = self.alone(function, None, *source) if start.is_cpu else None
        return None if run is None else run(start=start, **tables(self), **options)
