"""The translation model of Bahdanau, Cho and Bengio, as it is taught.

The encoder is a GRU in both directions; a tanh layer turns its two last states into the decoder's
first. Each step of the decoder attends to the encoder's outputs, [2H] wide, with the state before
the step, feeds the token's embedding and the context to a GRU, and predicts the next token from the
new state, the context and the embedding.

Shapes: B batch, S source length, T target length, E embedding, H hidden, V vocabulary; F = 3H + E
features that the output layer reads.
Source: Bahdanau, Cho, Bengio 2015, "Neural Machine Translation by Jointly Learning to Align and
Translate" (with a plain output layer for its maxout); dropout, Srivastava et al. 2014.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from fastseq.reference.attention import check_lengths, check_mask, length_mask
from fastseq.reference.scores import attend, attended

__all__ = ["Attention", "Decoder", "Encoder", "Seq2Seq"]


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
            TypeError, ValueError: ``lengths`` of another kind, shape or range.
        """
        emb = self.dropout(self.embedding(x))
        if lengths is None:
            outputs, state = self.gru(emb)
        else:
            check_lengths(lengths, x)
            packed = pack_padded_sequence(
                emb, lengths.cpu(), batch_first=True, enforce_sorted=False
            )
            outputs, state = self.gru(packed)
            outputs = pad_packed_sequence(outputs, batch_first=True, total_length=x.shape[1])[0]
        return outputs, torch.tanh(self.fc(torch.cat((state[0], state[1]), dim=1))).unsqueeze(0)


class Attention(nn.Module):
    """Additive attention of a query [H] to keys of twice its width."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.attn = nn.Linear(3 * hidden_dim, hidden_dim)
        self.v = nn.Linear(hidden_dim, 1, bias=False)

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
        batch, steps = keys.shape[:2]
        if mask is not None:
            check_mask(mask, batch, steps)
        repeated = query.unsqueeze(1).repeat(1, steps, 1)
        energy = torch.tanh(self.attn(torch.cat((repeated, keys), dim=2)))
        scores = self.v(energy).transpose(1, 2)
        context, weights = attend(scores, keys, attended(keys, None, mask))
        return context.squeeze(1), weights.squeeze(1)


class Decoder(nn.Module):
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
        """One step.

        Args:
            input: the previous token ids, [B, 1], int64.
            hidden: state, [1, B, H]; the query is the state before this step.
            encoder_outputs: [B, S, 2H].
            mask: [B, S], bool, True = attend; None: all.

        Returns:
            prediction: logits, [B, 1, V].
            hidden: the new state, [1, B, H].
            attn_weights: [B, 1, S].
        """
        emb = self.dropout(self.embedding(input))
        context, weights = self.attention(hidden[-1], encoder_outputs, mask)
        context = context.unsqueeze(1)
        output, hidden = self.gru(torch.cat((emb, context), dim=2), hidden)
        features = self.output_dropout(torch.cat((output, context, emb), dim=2))
        return self.fc(features), hidden, weights.unsqueeze(1)


class Seq2Seq(nn.Module):
    """Encoder and decoder with teacher forcing."""

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

        After each step ``random.random() < teacher_forcing_ratio`` decides, for the whole batch,
        whether the next input is the target's token or the most likely one. The number is drawn
        after the last step too, where it decides nothing.

        Args:
            src: source token ids, [B, S], int64.
            trg: target token ids, [B, T], int64; the first column is the start token.
            teacher_forcing_ratio: probability of feeding the target's own token.
            lengths: tokens in each source row, [B], int64, between 1 and S; None: all are full.

        Returns:
            Logits, [B, T, V]; those of position 0, which is given, are zero.
        """
        batch_size, steps = trg.shape
        fc = self.decoder.fc
        outputs = fc.weight.new_zeros(batch_size, steps, fc.out_features)
        encoder_outputs, hidden = self.encoder(src, lengths)
        mask = None
        if lengths is not None:
            mask = length_mask(lengths.to(encoder_outputs.device), src.shape[1])
        token = trg[:, 0].unsqueeze(1)
        for t in range(1, steps):
            logits, hidden, _ = self.decoder(token, hidden, encoder_outputs, mask)
            outputs[:, t] = logits.squeeze(1)
            forced = random.random() < teacher_forcing_ratio
            token = trg[:, t].unsqueeze(1) if forced else logits.argmax(2)
        return outputs
