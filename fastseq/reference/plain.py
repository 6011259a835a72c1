"""The plain encoder-decoder: one LSTM reads the source, another writes the target.

The encoder's last state is all the decoder learns of the source.

Shapes: B batch, S source length, T target length, E embedding, H hidden, V vocabulary.
Source: Sutskever, Vinyals, Le 2014, "Sequence to Sequence Learning with Neural Networks"
(one layer here, and the source is read left to right).
"""

from __future__ import annotations

import random

from torch import Tensor, nn

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
        """
        _, (h, c) = self.lstm(self.embedding(x))
        return h, c


class Decoder(nn.Module):
    """Writes the target: from the previous tokens and the state to logits."""

    def __init__(self, vocab_size: int, embedding_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, embedding_dim)
        self.lstm = nn.LSTM(embedding_dim, hidden_dim, batch_first=True)
        self.fc = nn.Linear(hidden_dim, vocab_size)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Advance by the given tokens, one as a rule.

        Args:
            x: token ids, [B, 1] (or [B, N]: N steps), int64.
            h, c: state, [1, B, H].

        Returns:
            logits: [B, 1, V] (or [B, N, V]).
            h, c: the new state, [1, B, H].
        """
        outputs, (h, c) = self.lstm(self.embedding(x), (h, c))
        return self.fc(outputs), h, c


class Seq2Seq(nn.Module):
    """Encoder and decoder with teacher forcing."""

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, src: Tensor, trg: Tensor, teacher_forcing_ratio: float = 0.5) -> Tensor:
        """Decode as many steps as the target has, starting from its first token.

        After each step ``random.random() < teacher_forcing_ratio`` decides, for the whole batch,
        whether the next input is the target's token or the most likely one. The number is drawn
        after the last step too, where it decides nothing.

        Args:
            src: source token ids, [B, S], int64.
            trg: target token ids, [B, T], int64; the first column is the start token.
            teacher_forcing_ratio: probability of feeding the target's own token.

        Returns:
            Logits, [B, T, V]; those of position 0, which is given, are zero.
        """
        batch_size, steps = trg.shape
        fc = self.decoder.fc
        outputs = fc.weight.new_zeros(batch_size, steps, fc.out_features)
        h, c = self.encoder(src)
        token = trg[:, 0].unsqueeze(1)
        for t in range(1, steps):
            logits, h, c = self.decoder(token, h, c)
            outputs[:, t] = logits.squeeze(1)
            forced = random.random() < teacher_forcing_ratio
            token = trg[:, t].unsqueeze(1) if forced else logits.argmax(2)
        return outputs
