"""The plain encoder-decoder of :mod:`fastseq.reference.plain`, fast.

Same names, constructors, parameters and results. The decoder is a single call: of the LSTM where
all inputs are known beforehand, else of the decoder loop that finds the likeliest tokens itself.

Source: Sutskever, Vinyals, Le 2014, "Sequence to Sequence Learning with Neural Networks".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from fastseq import nn
from fastseq.functional.decoder import attention_decoder, picks_obstacle
from fastseq.models._alone import WritesAlone
from fastseq.models._steps import (
    Forced,
    after_start,
    check_source,
    check_target,
    computes_as,
    decode_by_steps,
    draw_forced,
    embed,
    is_lookup,
    is_one_layer,
    tables,
)

__all__ = ["Decoder", "Encoder", "Seq2Seq"]


class Encoder(nn.Module):
    """Reads the source and returns the LSTM's last state."""

    def __init__(self, vocab_size: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a batch of sources.

        Args:
            x: token ids, [B, S], int64.

        Returns:
            h, c: hidden and cell state after the last token, [1, B, H].

        Raises:
            IndexError: a token id outside the vocabulary.
            RuntimeError: S = 0.
        """
        check_source(x, "models.plain.Encoder")
        _, (h, c) = self.lstm(embed(self.embedding, x, "models.plain.Encoder"))
        return h, c


class Decoder(WritesAlone, nn.Module):
    """Writes the target: from the previous tokens and the state to logits."""

    def __init__(self, vocab_size: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, batch_first=True)
        self.fc = nn.Linear(hidden_dim, vocab_size)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by the given tokens, any number of them, in one LSTM call.

        Args:
            x: token ids, [B, N], int64.
            h, c: state, [1, B, H].

        Returns:
            logits: [B, N, V].
            h, c: the new state, [1, B, H].

        Raises:
            IndexError: a token id outside the vocabulary.
        """
        outputs, (h, c) = self.lstm(embed(self.embedding, x, "models.plain.Decoder"), (h, c))
        return self.fc(outputs), h, c

    def decode(self, trg: Tensor, forced: Forced | None, h: Tensor, c: Tensor) -> Tensor:
        """Logits of the positions 1..T-1 of a target.

        Args:
            trg: [B, T], int64; the first column is the start token.
            forced: of each of T-1 steps whether it is fed the target's token, else the argmax of
                the step before; the first is. None: all are.
            h, c: the encoder's state, [1, B, H].

        Returns:
            Logits, [B, T-1, V].
        """
        if forced is None:
            return self.forward(trg[:, :-1], h, c)[0]
        if not self.picks_in_one_call():
            return decode_by_steps(self, trg, forced, h, c)
        run = self._loop(attention_decoder, h, c)
        decoded = run(trg[:, :-1], forced=forced, **tables(self))
        return self.fc(decoded.features)

    def alone(self, function: Callable, steps: int | None, h: Tensor, c: Tensor) -> Callable | None:
        served = self.picks_in_one_call() and picks_obstacle("lstm", h, h, steps, None) is None
        return self._loop(function, h, c) if served else None

    def _loop(self, function: Callable, h: Tensor, c: Tensor) -> Callable:
        """The loop, on a source without positions; inputs are still to be given."""
        nothing = h.new_zeros(h.shape[1], 0, h.shape[2])
        return partial(
            function,
            hx=(h, c),
            keys=nothing,
            values=nothing[:, :, :0],
            params=self.lstm.all_weights[0],
        )

    def picks_in_one_call(self) -> bool:
        return (
            computes_as(self, Decoder)
            and is_lookup(self.embedding)
            and computes_as(self.fc, nn.Linear)
            and is_one_layer(self.lstm, nn.LSTM)
        )


class Seq2Seq(nn.Module):
    """Encoder and decoder with teacher forcing."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float = 0.5) -> Tensor:
        """Decode as many steps as the target has, starting from its first token.

        Args:
            src: source token ids, [B, S], int64.
            trg: target token ids, [B, T], int64; the first column is the start token.
            teacher_forcing_ratio: probability that the target's own token follows a step, decided
                by one ``random.random()`` a step for the whole batch, as in the reference.

        Returns:
            Logits, [B, T, V]; those of position 0, which is given, are zero.

        Raises:
            IndexError: a token id outside the vocabulary, or T = 0.
            RuntimeError: S = 0, or ``src`` and ``trg`` differ in B.
            ValueError: ``trg`` of another number of dimensions.
        """
        check_target(src, trg, "models.plain.Seq2Seq")
        h, c = self.encoder(src)
        forced = draw_forced(trg.shape[1] - 1, teacher_forcing_ratio)
        logits = None
        if trg.shape[1] > 1 and computes_as(self.decoder, Decoder):
            logits = self.decoder.decode(trg, forced, h, c)
        elif trg.shape[1] > 1:
            logits = decode_by_steps(self.decoder, trg, forced, h, c)
        return after_start(logits, trg, self.decoder.fc)
