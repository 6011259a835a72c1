"""The translation model of :mod:`fastseq.reference.bahdanau`, fast.

Same names, constructors, parameters, results and random streams. The keys of the attention are
projected once a source, and what the output layer reads is kept for one product, or for a loss that
never holds all logits.

Source: Bahdanau, Cho, Bengio 2015, "Neural Machine Translation by Jointly Learning to Align and
Translate".
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastseq import nn
from fastseq.functional import additive_attention
from fastseq.functional.decoder import attention_decoder, picks_obstacle
from fastseq.models._alone import WritesAlone
from fastseq.models._steps import (
    Forced,
    after_start,
    check_plain,
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
from fastseq.models.attention import _unless_full, beams
from fastseq.reference.attention import check_mask, length_mask

__all__ = ["Attention", "Decoder", "Encoder", "Seq2Seq"]

Attend = Callable[[Tensor], tuple[Tensor, Tensor]]
"""queries [W * B, H] -> contexts [W * B, 2H] and weights [W * B, S]."""


class Encoder(nn.Module):
    """Reads the source in both directions; gives every output and the decoder's first state.

    Args:
        vocab_size, embedding_dim, hidden_dim: V, E and H, which is the width of one direction.
        dropout: of the embeddings.
    """

    def __init__(
        self, vocab_size: int, embedding_dim: int, hidden_dim: int, dropout: float = 0.5
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.gru = nn.GRU(embedding_dim, hidden_dim, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(2 * hidden_dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Encode a batch of sources.

        Args:
            x: token ids, [B, S], int64.
            lengths: tokens in each row, [B], int64, between 1 and S; None: all rows are full.

        Returns:
            outputs: [B, S, 2H], forward direction first; zero past a row's end.
            hidden: tanh(W [last forward state; last backward state] + b), [1, B, H].

        Raises:
            IndexError: a token id outside the vocabulary.
            RuntimeError: S = 0.
            TypeError, ValueError: ``lengths`` of another kind, shape or range.
        """
        check_source(x, "models.bahdanau.Encoder")
        lengths = _unless_full(lengths, x)
        emb = self.dropout(embed(self.embedding, x, "models.bahdanau.Encoder"))
        outputs, state = self.gru(emb, lengths=lengths)
        return outputs, torch.tanh(self.fc(torch.cat((state[0], state[1]), dim=1))).unsqueeze(0)


class Attention(nn.ConcatAttention):
    """Additive attention of a query [H] to keys of twice its width."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__(hidden_dim, 2 * hidden_dim, hidden_dim)

    def forward(
        self, query: Tensor, keys: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attend with one decoder state.

        Args:
            query: [B, H].
            keys: the encoder's outputs, [B, S, 2H].
            mask: [B, S], bool, True = attend; None: all. A row without any True has weights zero.

        Returns:
            context [B, 2H] and weights [B, S].

        Raises:
            TypeError, ValueError: ``mask`` of another kind or shape.

        Source: Bahdanau 2015, section 3.1 and appendix A.1.2.
        """
        if mask is not None:
            check_mask(mask, *keys.shape[:2])
        return super().forward(query, keys, mask=mask)


class _Source(NamedTuple):
    """A source made ready: what need not be computed again for every step.

    A source may be asked by several queries, the beams of a search: W * B rows of them, those of
    one source in turn.
    """

    keys: Tensor
    mask: Tensor | None
    projected: Tensor
    """The keys' half of the score, [B, S, H]."""
    query_weight: Tensor
    v: Tensor

    def __call__(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Contexts [W * B, 2H] and weights [W * B, S] of queries [W * B, H]."""
        query = F.linear(hidden, self.query_weight)
        query = query.view(self.keys.shape[0], beams(hidden, self.keys), query.shape[1])
        found = additive_attention(query, self.projected, self.keys, self.v, mask=self.mask)
        return tuple(each.flatten(0, 1) for each in found)

    def select(self, sources: Tensor) -> _Source:
        """The same for some of the sources, [N], int64: nothing is projected again."""
        mask = None if self.mask is None else self.mask.index_select(0, sources)
        keys, projected = (t.index_select(0, sources) for t in (self.keys, self.projected))
        return self._replace(keys=keys, mask=mask, projected=projected)


class Decoder(WritesAlone, nn.Module):
    """Writes the target one token at a time, attending to the source before each.

    Args:
        vocab_size, embedding_dim, hidden_dim: V, E and H.
        attention: makes a context [2H] of the state before a step.
        dropout: of the embeddings.
        output_dropout: of what the output layer reads; the published model has none.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_dim: int,
        attention: Attention,
        dropout: float = 0.5,
        output_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.attention = attention
        self.gru = nn.GRU(embedding_dim + 2 * hidden_dim, hidden_dim, batch_first=True)
        self.fc = nn.Linear(3 * hidden_dim + embedding_dim, vocab_size)
        self.dropout = nn.Dropout(dropout)
        self.output_dropout = nn.Dropout(output_dropout)

    def forward(
        self, input: Tensor, hidden: Tensor, encoder_outputs: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One step. For many steps on one source, :meth:`stepper` projects the keys only once.

        Args:
            input: the previous token ids, [B, 1], int64.
            hidden: state, [1, B, H]; the query is the state before this step.
            encoder_outputs: [B, S, 2H].
            mask: [B, S], bool, True = attend; None: all.

        Returns:
            prediction: logits, [B, 1, V].
            hidden: the new state, [1, B, H].
            attn_weights: [B, 1, S].

        Raises:
            IndexError: a token id outside the vocabulary.
            TypeError, ValueError: ``mask`` of another kind or shape.
        """
        return self.stepper(encoder_outputs, mask)(input, hidden)

    def stepper(self, encoder_outputs: Tensor, mask: Tensor | None = None) -> Stepper:
        """Prepare a source: :meth:`forward` with its last two arguments given.

        What is left also takes W rows for each source, W * B in all, those of one source in turn,
        and ``select`` keeps some of the sources.
        """
        return Stepper(self, self._attend_to(encoder_outputs, mask))

    def features(
        self,
        trg: Tensor,
        forced: Forced | None,
        hidden: Tensor,
        encoder_outputs: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """What ``fc`` makes the logits of positions 1..T-1 of: the whole decoder loop.

        Args:
            trg: [B, T], int64; the first column is the start token.
            forced: of each of T-1 steps whether it is fed the target's token, else the argmax of
                the step before; the first is. None: all are.
            hidden: the encoder's state, [1, B, H].
            encoder_outputs: [B, S, 2H].
            mask: [B, S], bool, True = attend; None: all.

        Returns:
            State, context and embedding of each step, [B, T-1, F].

        Raises:
            NotImplementedError: this decoder has hooks or a forward of its own.
        """
        check_plain(self, Decoder, "models.bahdanau")
        tokens = trg[:, :-1]
        if not tokens.shape[1]:
            return self.fc.weight.new_empty(trg.shape[0], 0, self.fc.in_features)
        attend = self._attend_to(encoder_outputs, mask)
        if forced is None or self.picks_in_one_call():
            kept_emb, kept = self._factors(*tokens.shape)
            if forced is None:
                emb = embed(self.embedding, tokens, "models.bahdanau.Decoder")
                emb = emb if kept_emb is None else emb * kept_emb
                parts = self._steps(emb, hidden, attend)
            else:
                more = {"forced": forced, "input_factor": kept_emb, "output_factor": kept}
                run = self._loop(attention_decoder, hidden, attend)
                decoded = run(tokens, **more, **tables(self))
                emb = self.embedding(decoded.tokens)
                emb = emb if kept_emb is None else emb * kept_emb
                parts = (decoded.features,)
            features = torch.cat((*parts, emb), dim=2)
            return features if kept is None else features * kept
        found: list[Tensor] = []
        for t in range(tokens.shape[1]):
            with torch.no_grad():
                token = fed(t, tokens, forced, lambda: self.fc(found[-1]).argmax(2))
            features, hidden, _ = self._step(token, hidden, attend)
            found.append(features)
        return torch.cat(found, dim=1)

    def alone(
        self,
        function: Callable,
        steps: int | None,
        hidden: Tensor,
        encoder_outputs: Tensor,
        mask: Tensor | None = None,
    ) -> Callable | None:
        drops = self.training and (self.dropout.p or self.output_dropout.p)
        if drops or not self.picks_in_one_call():
            return None
        K = self.attention.v.weight.shape[1]
        if picks_obstacle("gru", encoder_outputs, hidden, steps, K) is not None:
            return None
        return self._loop(function, hidden, self._attend_to(encoder_outputs, mask))

    def picks_in_one_call(self) -> bool:
        return (
            computes_as(self, Decoder)
            and self._scores_in_one_call()
            and is_one_layer(self.gru, nn.GRU)
            and is_lookup(self.embedding)
            and all(computes_as(each, nn.Dropout) for each in (self.dropout, self.output_dropout))
            and computes_as(self.fc, nn.Linear)
        )

    def _scores_in_one_call(self) -> bool:
        attention = self.attention
        return computes_as(attention, Attention) and all(
            computes_as(layer, nn.Linear) for layer in (attention.attn, attention.v)
        )

    def _loop(self, function: Callable, hidden: Tensor, attend: _Source) -> Callable:
        """The loop on a source; inputs are still to be given."""
        return partial(
            function,
            hx=(hidden,),
            keys=attend.projected,
            values=attend.keys,
            params=self.gru.all_weights[0],
            cell="gru",
            query_weight=attend.query_weight,
            v=attend.v,
            mask=attend.mask,
        )

    def _steps(self, emb: Tensor, hidden: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """States [B, N, H] and contexts [B, N, 2H] of steps of known embeddings [B, N, E]."""
        if isinstance(attend, _Source) and is_one_layer(self.gru, nn.GRU):
            features = self._loop(attention_decoder, hidden, attend)(emb).features
            return features.split((self.gru.hidden_size, attend.keys.shape[2]), dim=2)
        states, contexts = [], []
        for each in emb.split(1, dim=1):
            state, context, hidden, _ = self._advance(each, hidden, attend)
            states.append(state)
            contexts.append(context)
        return torch.cat(states, dim=1), torch.cat(contexts, dim=1)

    def _step(self, token: Tensor, hidden: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        """Features [B, 1, F], state and attention weights of one step."""
        emb = self.dropout(embed(self.embedding, token, "models.bahdanau.Decoder"))
        state, context, hidden, weights = self._advance(emb, hidden, attend)
        return self.output_dropout(torch.cat((state, context, emb), dim=2)), hidden, weights

    def _advance(self, emb: Tensor, hidden: Tensor, attend: Attend) -> tuple[Tensor, ...]:
        context, weights = attend(hidden[-1])
        context = context.unsqueeze(1)
        state, hidden = self.gru(torch.cat((emb, context), dim=2), hidden)
        return state, context, hidden, weights.unsqueeze(1)

    def _factors(self, batch: int, steps: int) -> list[Tensor | None]:
        """What the dropouts multiply embeddings [B, N, E] and features [B, N, F] by, drawn in the
        order of the reference, step by step; None for one that drops nothing. (A compiler has a
        random stream of its own.)"""
        widths = self.embedding.embedding_dim, self.fc.in_features
        times, at_once = (1, steps) if torch.compiler.is_compiling() else (steps, 1)
        layers = [
            (layer, self.fc.weight.new_ones(batch, at_once, width), [])
            for layer, width in zip((self.dropout, self.output_dropout), widths, strict=True)
        ]
        for _ in range(times):
            for layer, ones, drawn in layers:
                if layer.training and layer.p:
                    drawn.append(layer(ones))
        return [torch.cat(drawn, dim=1) if drawn else None for _, _, drawn in layers]

    def _attend_to(self, encoder_outputs: Tensor, mask: Tensor | None) -> Attend:
        attention = self.attention
        if self._scores_in_one_call():
            if mask is not None:
                check_mask(mask, *encoder_outputs.shape[:2])
            return _Source(
                encoder_outputs,
                mask,
                attention.project_keys(encoder_outputs),
                attention.attn.weight[:, : -attention.key_dim],
                attention.v.weight.squeeze(0),
            )

        def attend(hidden: Tensor) -> tuple[Tensor, Tensor]:
            # A module of one's own takes one query a source: as many calls as there are beams.
            queries = hidden.unflatten(0, (-1, beams(hidden, encoder_outputs))).unbind(1)
            found = [attention(query, encoder_outputs, mask) for query in queries]
            return tuple(torch.stack(each, 1).flatten(0, 1) for each in zip(*found, strict=True))

        return attend


class Stepper:
    """A decoder on a prepared source: one step for the rows of its state."""

    def __init__(self, decoder: Decoder, attend: Attend) -> None:
        self._decoder, self._attend = decoder, attend
        if isinstance(attend, _Source):
            self.select = lambda sources: Stepper(decoder, attend.select(sources))

    def __call__(self, input: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
        """Arguments and results of :meth:`Decoder.forward`, for W * B rows."""
        features, *rest = self._decoder._step(input, hidden, self._attend)
        return self._decoder.fc(features), *rest


class Seq2Seq(nn.Module):
    """Encoder and decoder with teacher forcing."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def features(
        self,
        src: Tensor,
        trg: Tensor,
        teacher_forcing_ratio: float = 0.5,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """What the output layer ``decoder.fc`` reads for positions 1..T-1, [B, T-1, F].

        Arguments and errors are those of :meth:`forward`, whose logits are the layer's.

        Raises:
            NotImplementedError: the decoder has hooks or a forward of its own.
        """
        return self.decoder.features(*self._prepare(src, trg, teacher_forcing_ratio, lengths))

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
        prepared = self._prepare(src, trg, teacher_forcing_ratio, lengths)
        decoder, logits = self.decoder, None
        trg, forced, hidden, *source = prepared
        if trg.shape[1] == 1:
            pass
        elif computes_as(decoder, Decoder) and (forced is None or decoder.picks_in_one_call()):
            logits = in_halves(decoder.fc, decoder.features(*prepared))
        elif computes_as(decoder, Decoder):
            logits = decode_by_steps(decoder.stepper(*source), trg, forced, hidden)
        else:
            logits = decode_by_steps(
                lambda token, hidden: decoder(token, hidden, *source), trg, forced, hidden
            )
        return after_start(logits, trg, decoder.fc)

    def _prepare(
        self, src: Tensor, trg: Tensor, ratio: float, lengths: Tensor | None
    ) -> tuple[Tensor, Forced | None, Tensor, Tensor, Tensor | None]:
        """The arguments of the decoder's loop: the source is read, the coins are drawn."""
        check_target(src, trg, "models.bahdanau.Seq2Seq")
        lengths = _unless_full(lengths, src)
        encoder_outputs, hidden = self.encoder(src, lengths)
        mask = None
        if lengths is not None:
            mask = length_mask(lengths.to(encoder_outputs.device), src.shape[1])
        forced = draw_forced(trg.shape[1] - 1, ratio)
        return trg, forced, hidden, encoder_outputs, mask
