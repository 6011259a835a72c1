"""The attention encoder-decoder: at each step the decoder looks at all of the source anew.

Each step scores every encoder output against the decoder's state, e = v . tanh(W [h; y] + b), and
hands the average of the outputs, weighted by softmax(e), to the decoder's LSTM and to its logits.

Beyond the teaching example these modules come from, sources may be of unequal length: ``lengths``
and ``mask`` keep what lies past a row's end from influencing anything.

Shapes: B batch, S source length, T target length, E embedding, H hidden, V vocabulary.
Source: Bahdanau, Cho, Bengio 2015, "Neural Machine Translation by Jointly Learning to Align and
Translate" (with an LSTM for the GRU, and an encoder of one direction).
"""

from __future__ import annotations

import random

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

__all__ = [
    "Attention",
    "Decoder",
    "Encoder",
    "Seq2Seq",
    "check_lengths",
    "check_mask",
    "length_mask",
]


def check_lengths(lengths: Tensor, src: Tensor) -> None:
    """Refuse lengths that are not int64 [B] with values in 1..S, for a source [B, S].

    Raises:
        TypeError: not an int64 tensor.
        ValueError: wrong shape, or a length outside 1..S.
    """
    if not isinstance(lengths, Tensor) or lengths.dtype != torch.int64:
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"fastseq.attention: expected lengths to be an int64 tensor, got {got}")
    if src.dim() != 2 or lengths.shape != src.shape[:1]:
        raise ValueError(
            f"fastseq.attention: expected lengths of shape [B] for a source [B, S], "
            f"got {list(lengths.shape)} for {list(src.shape)}"
        )
    steps = src.shape[1]
    if lengths.numel() and not 1 <= int(lengths.min()) <= int(lengths.max()) <= steps:
        raise ValueError(
            f"fastseq.attention: expected lengths between 1 and S = {steps}, "
            f"got {int(lengths.min())} to {int(lengths.max())}"
        )


def check_mask(mask: Tensor, batch: int, steps: int) -> None:
    """Refuse a mask that is not bool [B, S].

    Raises:
        TypeError: not a bool tensor.
        ValueError: wrong shape.
    """
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"fastseq.attention: expected mask to be a bool tensor (True = attend), got {got}"
        )
    if mask.shape != (batch, steps):
        raise ValueError(
            f"fastseq.attention: expected mask of shape [B, S] = [{batch}, {steps}], "
            f"got {list(mask.shape)}"
        )


def length_mask(lengths: Tensor, steps: int) -> Tensor:
    """True where a row still has tokens: [B, S], bool, from lengths [B]."""
    return torch.arange(steps, device=lengths.device) < lengths.unsqueeze(1)


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
            TypeError, ValueError: ``lengths`` of another kind, shape or range.
        """
        emb = self.embedding(x)
        if lengths is None:
            return self.lstm(emb)
        check_lengths(lengths, x)
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
            TypeError, ValueError: ``mask`` of another kind or shape.

        Source: Bahdanau 2015, section 3.1 and appendix A.1.2.
        """
        batch, steps = encoder_outputs.shape[:2]
        query = hidden.unsqueeze(1).repeat(1, steps, 1)
        energy = torch.tanh(self.attn(torch.cat((query, encoder_outputs), dim=2)))
        scores = self.v(energy).squeeze(2)
        if mask is None:
            return F.softmax(scores, dim=1)
        check_mask(mask, batch, steps)
        # The smallest finite number, not -inf: a row without any True would give NaN, and NaN
        # gradients inside softmax even where the result is overwritten.
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return F.softmax(scores, dim=1).masked_fill(~mask, 0.0)


class Decoder(nn.Module):
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
        """One step.

        Args:
            input: the previous token ids, [B, 1], int64.
            hidden, cell: state, [1, B, H]; the query is the state before this step.
            encoder_outputs: [B, S, H].
            mask: [B, S], bool, True = attend; None: all.

        Returns:
            prediction: logits, [B, 1, V].
            hidden, cell: the new state, [1, B, H].
            attn_weights: [B, 1, S].
        """
        emb = self.embedding(input)
        attn_weights = self.attention(hidden[-1], encoder_outputs, mask).unsqueeze(1)
        context = torch.bmm(attn_weights, encoder_outputs)
        outputs, (hidden, cell) = self.lstm(torch.cat((emb, context), dim=2), (hidden, cell))
        prediction = self.fc(torch.cat((outputs.squeeze(1), context.squeeze(1)), dim=1))
        return prediction.unsqueeze(1), hidden, cell, attn_weights


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
        encoder_outputs, (hidden, cell) = self.encoder(src, lengths)
        mask = None
        if lengths is not None:
            mask = length_mask(lengths.to(encoder_outputs.device), src.shape[1])
        token = trg[:, 0].unsqueeze(1)
        for t in range(1, steps):
            logits, hidden, cell, _ = self.decoder(token, hidden, cell, encoder_outputs, mask)
            outputs[:, t] = logits.squeeze(1)
            forced = random.random() < teacher_forcing_ratio
            token = trg[:, t].unsqueeze(1) if forced else logits.argmax(2)
        return outputs
