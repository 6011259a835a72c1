"""The attention encoder-decoder of :mod:`fastseq.reference.attention`, fast.

Same names, constructors, parameters and results. The score's matrix is split into a query half and
a key half, W [h; y] + b = W_q h + (W_k y + b), so that the keys are projected once a source. The
decoder loop is one call, and the logits are products of all its steps.

Source: Bahdanau, Cho, Bengio 2015, "Neural Machine Translation by Jointly Learning to Align and
Translate".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq import nn
from fastseq.functional.decoder import attention_decoder, picks_obstacle
from fastseq.models import _whole
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
    fed,
    in_halves,
    is_lookup,
    is_one_layer,
    tables,
)
from fastseq.reference.attention import check_lengths, check_mask, length_mask

__all__ = ["Attention", "Decoder", "Encoder", "Seq2Seq"]

Attend = Callable[[Tensor], Tensor]
"""query [W * B, H] -> weights [W * B, S]."""


def _unless_full(lengths: Tensor | None, src: Tensor) -> Tensor | None:
    """Checked lengths, or None where every row is full and nothing has to be masked. (A graph
    doesn't look into them.)"""
    if lengths is None or torch.compiler.is_compiling():
        return lengths
    check_lengths(lengths, src)
    return None if bool((lengths == src.shape[1]).all()) else lengths


class Encoder(nn.Module):
    """Reads the source and returns every output of the LSTM and its last state."""

    def __init__(self, vocab_size: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, batch_first=True)

    def forward(
        self, x: Tensor, lengths: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Encode a batch of sources.

        Args:
            x: token ids, [B, S], int64.
            lengths: tokens in each row, [B], int64, between 1 and S; None: all rows are full.

        Returns:
            outputs: [B, S, H]; zero past a row's end.
            (h, c): the state after each row's own last token, [1, B, H].

        Raises:
            IndexError: a token id outside the vocabulary.
            RuntimeError: S = 0.
            TypeError, ValueError: ``lengths`` of another kind, shape or range.
        """
        check_source(x, "models.attention.Encoder")
        lengths = _unless_full(lengths, x)
        emb = embed(self.embedding, x, "models.attention.Encoder")
        if lengths is None:
            return self.lstm(emb)
        if torch.compiler.is_compiling() and isinstance(self.lstm, nn.LSTM):
            # Packing has to know the lengths.
            return self.lstm(emb, lengths=lengths)
        packed = pack_padded_sequence(emb, lengths.cpu(), batch_first=True, enforce_sorted=False)
        outputs, state = self.lstm(packed)
        return pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0], state


class Attention(nn.Module):
    """Additive attention: how much each source position matters to a decoder state."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.attn = nn.Linear(2 * hidden_dim, hidden_dim)
        self.v = nn.Linear(hidden_dim, 1, bias=False)

    def forward(
        self, hidden: Tensor, encoder_outputs: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Attention weights of one decoder state.

        Args:
            hidden: the query, [B, H].
            encoder_outputs: [B, S, H]; has to be finite at masked positions too.
            mask: [B, S], bool, True = attend; None: all. A row without any True has weights zero.

        Returns:
            Weights, [B, S]; each row sums to one.

        Raises:
            RuntimeError: ``hidden`` and ``encoder_outputs`` differ in B.
            TypeError, ValueError: ``mask`` of another kind or shape.

        Source: Bahdanau 2015, section 3.1 and appendix A.1.2.
        """
        if hidden.shape[0] != encoder_outputs.shape[0]:
            raise RuntimeError(
                "fastseq.models.attention.Attention: expected one query a row of encoder_outputs, "
                f"got {list(hidden.shape)} for {list(encoder_outputs.shape)}"
            )
        return self.attend_to(encoder_outputs, mask)(hidden)

    def split(self, encoder_outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The query weights W_q [H, H], and the keys W_k y + b [B, S, H] of a source."""
        weight = self.attn.weight
        key_dim = encoder_outputs.shape[2]
        query_weight, key_weight = weight.split((weight.shape[1] - key_dim, key_dim), dim=1)
        return query_weight, F.linear(encoder_outputs, key_weight, self.attn.bias)

    def attend_to(self, encoder_outputs: Tensor, mask: Tensor | None = None) -> Attend:
        """Prepare a source: what is left is a function from query [B, H] to weights [B, S].

        Arguments and errors are those of :meth:`forward`.
        """
        if mask is not None:
            check_mask(mask, *encoder_outputs.shape[:2])
        padding = None if mask is None else ~mask
        if not computes_as(self.attn, nn.Linear):
            return _Attend(self, encoder_outputs, padding, None, None)
        return _Attend(self, encoder_outputs, padding, *self.split(encoder_outputs))


class _Attend:
    """What is left of an attention whose source is prepared: from queries to weights.

    A source may be asked by several queries, the beams of a search: W * B rows of them, those of
    one source in turn. Its keys are held once.
    """

    def __init__(
        self,
        attention: Attention,
        encoder_outputs: Tensor,
        padding: Tensor | None,
        query_weight: Tensor | None,
        keys: Tensor | None,
    ) -> None:
        self.attention = attention
        self.encoder_outputs = encoder_outputs
        self.padding = padding
        self.query_weight = query_weight
        self.keys = keys

    def __call__(self, hidden: Tensor) -> Tensor:
        """Weights [W * B, S] of queries [W * B, H]."""
        batch, steps = self.encoder_outputs.shape[:2]
        width = beams(hidden, self.encoder_outputs)
        if self.keys is None:
            shape = (batch, width, steps, -1)
            query = hidden.view(batch, width, 1, hidden.shape[1]).expand(shape)
            value = self.encoder_outputs.unsqueeze(1).expand(shape)
            energy = self.attention.attn(torch.cat((query, value), dim=3)).tanh()
        else:
            query = F.linear(hidden, self.query_weight)
            energy = query.view(batch, width, 1, query.shape[1]) + self.keys.unsqueeze(1)
            energy = energy.tanh_()
        scores = self.attention.v(energy).squeeze(3)
        shape = (hidden.shape[0], steps)
        if self.padding is None:
            return F.softmax(scores, dim=2).view(shape)
        padding = self.padding.unsqueeze(1)
        # Not -inf: it would make NaN, in the gradients too, of a row that is all padding.
        scores = scores.masked_fill(padding, torch.finfo(scores.dtype).min)
        return F.softmax(scores, dim=2).masked_fill(padding, 0.0).view(shape)

    def select(self, sources: Tensor) -> _Attend:
        """The same for some of the sources, [N], int64: nothing is projected again."""
        chosen = (
            None if t is None else t.index_select(0, sources)
            for t in (self.encoder_outputs, self.padding, self.keys)
        )
        encoder_outputs, padding, keys = chosen
        return _Attend(self.attention, encoder_outputs, padding, self.query_weight, keys)


def beams(hidden: Tensor, encoder_outputs: Tensor) -> int:
    """How many rows of ``hidden`` [W * B, H] look at each source of [B, S, H]: W."""
    return hidden.shape[0] // max(encoder_outputs.shape[0], 1) if hidden.shape[0] else 1


class Decoder(WritesAlone, nn.Module):
    """Writes the target one token at a time, attending to the source before each."""

    def __init__(
        self, vocab_size: int, embedding_dim: int, hidden_dim: int, attention: Attention
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.attention = attention
        self.lstm = nn.LSTM(embedding_dim + hidden_dim, hidden_dim, batch_first=True)
        self.fc = nn.Linear(2 * hidden_dim, vocab_size)

    def forward(
        self,
        input: Tensor,
        hidden: Tensor,
        cell: Tensor,
        encoder_outputs: Tensor,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One step. For many steps on one source, :meth:`stepper` projects the keys only once.

        Args:
            input: the previous token ids, [B, 1], int64.
            hidden, cell: state, [1, B, H]; the query is the state before this step.
            encoder_outputs: [B, S, H].
            mask: [B, S], bool, True = attend; None: all.

        Returns:
            prediction: logits, [B, 1, V].
            hidden, cell: the new state, [1, B, H].
            attn_weights: [B, 1, S].

        Raises:
            IndexError: a token id outside the vocabulary.
            TypeError, ValueError: ``mask`` of another kind or shape.
        """
        return self.stepper(encoder_outputs, mask)(input, hidden, cell)

    def stepper(self, encoder_outputs: Tensor, mask: Tensor | None = None) -> Stepper:
        """Prepare a source: :meth:`forward` with its last two arguments given.

        What is left also takes W rows for each source, W * B in all, those of one source in turn,
        and ``select`` keeps some of the sources.
        """
        return Stepper(self, encoder_outputs, mask, self._attend_to(encoder_outputs, mask))

    def decode(
        self,
        trg: Tensor,
        forced: Forced | None,
        hidden: Tensor,
        cell: Tensor,
        encoder_outputs: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Logits of the positions 1..T-1 of a target: the whole decoder loop.

        Args:
            trg: [B, T], int64; the first column is the start token.
            forced: of each of T-1 steps whether it is fed the target's token, else the argmax of
                the step before; the first is. None: all are.
            hidden, cell: the encoder's state, [1, B, H].
            encoder_outputs: [B, S, H].
            mask: [B, S], bool, True = attend; None: all.

        Returns:
            Logits, [B, T-1, V].
        """
        if not (computes_as(self, Decoder) and self._in_one_call(forced is None)):
            step = self.stepper(encoder_outputs, mask)
            return decode_by_steps(step, trg, forced, hidden, cell)
        return in_halves(self.fc, self.features(trg, forced, hidden, cell, encoder_outputs, mask))

    def features(
        self,
        trg: Tensor,
        forced: Forced | None,
        hidden: Tensor,
        cell: Tensor,
        encoder_outputs: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What ``fc`` makes the logits of :meth:`decode` of: output and context, [B, T-1, 2H].

        Arguments as there.

        Raises:
            NotImplementedError: this decoder has hooks or a forward of its own, or so has a part.
        """
        if not (computes_as(self, Decoder) and self._in_one_call(True)):
            raise NotImplementedError(
                "fastseq.models.attention.features: expected a decoder and parts without hooks or "
                "a forward of their own; call the model for its logits instead"
            )
        tokens, state = trg[:, :-1], (hidden, cell)
        if not tokens.shape[1]:
            return self.fc.weight.new_empty(trg.shape[0], 0, self.fc.in_features)
        if mask is not None:
            check_mask(mask, *encoder_outputs.shape[:2])
        run = self._loop(attention_decoder, encoder_outputs, mask)
        where = "models.attention.Decoder"
        if forced is None:
            return run(embed(self.embedding, tokens, where), state).features
        if self._in_one_call(False):
            return run(tokens, state, forced=forced, **tables(self)).features
        found: list[Tensor] = []
        for t in range(tokens.shape[1]):
            with torch.no_grad():
                token = fed(t, tokens, forced, lambda: self.fc(found[-1]).argmax(2))
            decoded = run(embed(self.embedding, token, where), state)
            state = decoded.states
            found.append(decoded.features)
        return torch.cat(found, dim=1)

    def alone(
        self,
        function: Callable,
        steps: int | None,
        hidden: Tensor,
        cell: Tensor,
        encoder_outputs: Tensor,
        mask: Tensor | None = None,
    ) -> Callable | None:
        K = self.attention.v.weight.shape[1] if self.picks_in_one_call() else None
        if K is None or picks_obstacle("lstm", encoder_outputs, hidden, steps, K) is not None:
            return None
        return partial(self._loop(function, encoder_outputs, mask), hx=(hidden, cell))

    def picks_in_one_call(self) -> bool:
        return computes_as(self, Decoder) and self._in_one_call(False)

    def _loop(self, function: Callable, encoder_outputs: Tensor, mask: Tensor | None) -> Callable:
        """The loop on a source, its keys projected; inputs and states are still to be given."""
        query_weight, keys = self.attention.split(encoder_outputs)
        return partial(
            function,
            keys=keys,
            values=encoder_outputs,
            params=self.lstm.all_weights[0],
            query_weight=query_weight,
            v=self.attention.v.weight[0],
            mask=mask,
        )

    def _in_one_call(self, forced: bool) -> bool:
        """Whether the parts are what :class:`Decoder` made them, so that the loop is one call.

        Args:
            forced: whether all inputs are known beforehand; the embedding and the output layer,
                which then stand outside of the loop, may be any.
        """
        attention = self.attention
        return (
            computes_as(attention, Attention)
            and computes_as(attention.attn, nn.Linear)
            and computes_as(attention.v, nn.Linear)
            and is_one_layer(self.lstm, nn.LSTM)
            and (forced or (is_lookup(self.embedding) and computes_as(self.fc, nn.Linear)))
        )

    def _attend_to(self, encoder_outputs: Tensor, mask: Tensor | None) -> Attend:
        if computes_as(self.attention, Attention):
            return self.attention.attend_to(encoder_outputs, mask)

        def attend(hidden: Tensor) -> Tensor:
            # A module of one's own takes one query a source: as many calls as there are beams.
            queries = hidden.unflatten(0, (-1, beams(hidden, encoder_outputs))).unbind(1)
            weights = [self.attention(query, encoder_outputs, mask) for query in queries]
            return weights[0] if len(weights) == 1 else torch.stack(weights, dim=1).flatten(0, 1)

        return attend

    def _advance(
        self, emb: Tensor, hidden: Tensor, cell: Tensor, encoder_outputs: Tensor, attend: Attend
    ) -> tuple[Tensor, ...]:
        batch, steps, features = encoder_outputs.shape
        weights = attend(hidden[-1])
        each = weights.reshape(batch, beams(weights, encoder_outputs), steps)
        context = torch.bmm(each, encoder_outputs).view(weights.shape[0], 1, features)
        weights = weights.unsqueeze(1)
        output, (hidden, cell) = self.lstm(torch.cat((emb, context), dim=2), (hidden, cell))
        return output, context, hidden, cell, weights


class Stepper:
    """A decoder on a prepared source: one step for the rows of its state."""

    def __init__(
        self, decoder: Decoder, encoder_outputs: Tensor, mask: Tensor | None, attend: Attend
    ) -> None:
        self._decoder = decoder
        self._encoder_outputs = encoder_outputs
        self._mask = mask
        self._attend = attend

    def __call__(self, input: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
        """Arguments and results of :meth:`Decoder.forward`, for W * B rows."""
        decoder = self._decoder
        emb = embed(decoder.embedding, input, "models.attention.Decoder")
        output, context, hidden, cell, weights = decoder._advance(
            emb, hidden, cell, self._encoder_outputs, self._attend
        )
        return decoder.fc(torch.cat((output, context), dim=2)), hidden, cell, weights

    def select(self, sources: Tensor) -> Stepper:
        """The same decoder on some of the sources, [N], int64."""
        decoder = self._decoder
        mask = None if self._mask is None else self._mask.index_select(0, sources)
        if isinstance(self._attend, _Attend):
            attend = self._attend.select(sources)
            return Stepper(decoder, attend.encoder_outputs, mask, attend)
        return decoder.stepper(self._encoder_outputs.index_select(0, sources), mask)


class Seq2Seq(nn.Module):
    """Encoder and attention decoder with teacher forcing."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(
        self,
        src: Tensor,
        trg: Tensor,
        teacher_forcing_ratio: float = 0.5,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Decode as many steps as the target has, starting from its first token.

        Args:
            src: source token ids, [B, S], int64.
            trg: target token ids, [B, T], int64; the first column is the start token.
            teacher_forcing_ratio: probability that the target's own token follows a step, decided
                by one ``random.random()`` a step for the whole batch, as in the reference.
            lengths: tokens in each source row, [B], int64, between 1 and S; None: all are full.

        Returns:
            Logits, [B, T, V]; those of position 0, which is given, are zero.

        Raises:
            IndexError: a token id outside the vocabulary, or T = 0.
            RuntimeError: S = 0, or ``src`` and ``trg`` differ in B.
            TypeError, ValueError: ``lengths`` of another kind, shape or range.
            ValueError: ``trg`` of another number of dimensions.
        """
        check_target(src, trg, "models.attention.Seq2Seq")
        lengths = _unless_full(lengths, src)
        forced = draw_forced(trg.shape[1] - 1, teacher_forcing_ratio)
        if lengths is None:
            logits = _whole.logits(self._parameters_of_one(src), src, trg, forced)
            if logits is not None:
                return logits
        prepared = self._prepare(src, trg, forced, lengths)
        decoder, logits = self.decoder, None
        trg, forced, hidden, cell, *source = prepared
        if trg.shape[1] > 1 and computes_as(decoder, Decoder):
            logits = decoder.decode(*prepared)
        elif trg.shape[1] > 1:
            logits = decode_by_steps(
                lambda *state: decoder(*state, *source), trg, forced, hidden, cell
            )
        return after_start(logits, trg, decoder.fc)

    def features(
        self,
        src: Tensor,
        trg: Tensor,
        teacher_forcing_ratio: float = 0.5,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """What the output layer ``decoder.fc`` reads for positions 1..T-1, [B, T-1, 2H].

        Arguments and errors are those of :meth:`forward`, whose logits are the layer's.

        Raises:
            NotImplementedError: the decoder or a part has hooks or a forward of its own.
        """
        check_target(src, trg, "models.attention.Seq2Seq")
        forced = draw_forced(trg.shape[1] - 1, teacher_forcing_ratio)
        return self.decoder.features(*self._prepare(src, trg, forced, lengths))

    def in_one_call(
        self, way: str, src: Tensor, start: Tensor, **options: object
    ) -> Sequence[Tensor] | None:
        """Decoding of full sources [B, S] in one call, the encoder's steps too; None where it is
        not one. ``way`` and ``options``: a function of :mod:`fastseq.ops.attention_seq2seq`, which
        says what returns, and what it takes."""
        return _whole.write(way, self._parameters_of_one(src), src, start, options)

    def _parameters_of_one(self, src: Tensor) -> list[Tensor] | None:
        return _whole.parameters(self, (Encoder, Decoder), src)

    def _prepare(
        self, src: Tensor, trg: Tensor, forced: Forced | None, lengths: Tensor | None
    ) -> tuple[Tensor, Forced | None, Tensor, Tensor, Tensor, Tensor | None]:
        """The arguments of the decoder's loop: the source is read."""
        lengths = _unless_full(lengths, src)
        encoder_outputs, (hidden, cell) = self.encoder(src, lengths)
        mask = None
        if lengths is not None:
            mask = length_mask(lengths.to(encoder_outputs.device), src.shape[1])
        return trg, forced, hidden, cell, encoder_outputs, mask
