"""A recurrent decoder with attention, as a module: token ids in, logits out.

Shapes: T time, B batch, S source length, E embedding, H hidden, L layers, K attention width, C
width of the encoder's outputs, A of the attentional vector, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastseq import backends
from fastseq.backends import Explanation
from fastseq.functional import attention_decoder
from fastseq.functional.beams import attention_beams
from fastseq.functional.decoder import from_start, kind_of, past_end
from fastseq.functional.samples import attention_samples
from fastseq.nn.rnn import GRU, LSTM, RNN

__all__ = ["AttentionDecoder"]

_CELLS = {
    "lstm": LSTM,
    "gru": GRU,
    "rnn_tanh": RNN,
    "rnn_relu": lambda *sizes, **options: RNN(*sizes, nonlinearity="relu", **options),
}


class AttentionDecoder(nn.Module):
    """Writes a target sequence, attending to the source at each step; the loop is one call.

    Args:
        vocab_size: V.
        embedding_dim: E.
        hidden_size: H.
        context_size: C; None: H.
        cell: "lstm", "gru", "rnn_tanh" or "rnn_relu".
        num_layers: L.
        score: "additive", v . tanh(W_q h + W_k y + b), or "general", (W_q h) . y; or "dot", h . y,
            for which C has to be H; or "location", the additive one with a term U f inside the
            tanh, f being filters over the weights of earlier steps.
        attention_size: K of the additive score; None: H.
        order: "before", the context stands beside the first layer's input (Bahdanau), or "after",
            the layers' output and the context make an attentional vector (Luong).
        attentional_size: A, with order "after"; None: H.
        input_feeding: with order "after", the attentional vector of the step before stands beside
            the input.
        residual: from the second layer on, a layer's input is added to its output.
        bias: whether the layers have biases.
        kernel_size, filters: of the score "location": N, odd, and F.
        cumulative: of the score "location": whether the filters see the sum of all earlier weights
            beside those of the step before.
        device, dtype: of the parameters.

    Attributes:
        embedding: [V, E]. rnn: the layers, with torch's names of weights. query: W_q [K, H].
        key: W_k [K, C] and b. v: [K]. location_conv: filters [F, 1 or 2, N]. location_proj: U
        [K, F]. combine: W_c [A, C+H] and b_c. fc: [V, F] and its bias, with
        F = H + C before and A after. Those an option leaves without use are None.

    Raises:
        ValueError: an option of another value, or sizes that do not fit.

    Source: Bahdanau, Cho and Bengio 2015; Luong, Pham and Manning 2015, sections 3 and 3.3;
    location, Chorowski et al. 2015, equations 8 and 9; cumulative weights, Shen et al. 2018.
    """

    def __init__(
        self,
        vocab_size: int,
        embedding_dim: int,
        hidden_size: int,
        context_size: int | None = None,
        *,
        cell: str = "lstm",
        num_layers: int = 1,
        score: str = "additive",
        attention_size: int | None = None,
        order: str = "before",
        attentional_size: int | None = None,
        input_feeding: bool = False,
        residual: bool = False,
        bias: bool = True,
        kernel_size: int = 31,
        filters: int = 32,
        cumulative: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value, known in (
            ("cell", cell, tuple(_CELLS)),
            ("score", score, ("additive", "general", "dot", "location")),
            ("order", order, ("before", "after")),
        ):
            if value not in known:
                raise ValueError(
                    f"fastseq.AttentionDecoder: expected {name} to be one of {known}, got {value!r}"
                )
        if input_feeding and order == "before":
            raise ValueError(
                'fastseq.AttentionDecoder: expected order "after" with input_feeding, got "before"'
            )
        C = hidden_size if context_size is None else context_size
        A = hidden_size if attentional_size is None else attentional_size
        K = C if score == "general" else attention_size or hidden_size
        if score == "dot" and hidden_size != C:
            raise ValueError(
                f"fastseq.AttentionDecoder: expected context_size = hidden_size = {hidden_size} "
                f'with score "dot", got {C}'
            )
        if kernel_size % 2 == 0:
            raise ValueError(
                f"fastseq.AttentionDecoder: expected an odd kernel_size, got {kernel_size}"
            )
        after = order == "after"
        additive = score in ("additive", "location")
        where = {"device": device, "dtype": dtype}
        self.cell, self.score, self.residual = cell, score, residual
        self.input_feeding = input_feeding
        self.embedding = nn.Embedding(vocab_size, embedding_dim, **where)
        beside = (A if input_feeding else 0) if after else C
        self.rnn = _CELLS[cell](
            embedding_dim + beside, hidden_size, num_layers, bias=bias, batch_first=True, **where
        )
        self.query = None if score == "dot" else nn.Linear(hidden_size, K, bias=False, **where)
        self.key = nn.Linear(C, K, **where) if additive else None
        if additive:
            self.v = nn.Parameter(torch.empty(K, **where))
            nn.init.uniform_(self.v, -(K**-0.5), K**-0.5)
        else:
            self.register_parameter("v", None)
        self.location_conv = self.location_proj = None
        if score == "location":
            kinds = 2 if cumulative else 1
            self.location_conv = nn.Conv1d(kinds, filters, kernel_size, bias=False, **where)
            self.location_proj = nn.Linear(filters, K, bias=False, **where)
        self.combine = nn.Linear(C + hidden_size, A, **where) if after else None
        self.fc = nn.Linear(A if after else hidden_size + C, vocab_size, **where)

    def extra_repr(self) -> str:
        return f"cell={self.cell!r}, score={self.score!r}, residual={self.residual}"

    def forward(
        self,
        tokens: Tensor,
        hx: tuple[Tensor, ...] | Tensor,
        encoder_outputs: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        forced: Sequence[bool] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Logits of every step.

        Args:
            tokens: fed to the steps, [B, T], int64: the target, shifted by its start token.
            hx: the initial h, and c of an LSTM, [L, B, H] each.
            encoder_outputs: [B, S, C].
            lengths: source positions that count, [B], int64; None: all.
            mask: [B, S], bool, True = attend; None: all.
            forced: of each step whether it is fed the token given, else the likeliest after the
                step before; None: always. The first is.

        Returns:
            logits [B, T, V], final states [L, B, H] each, and attention weights [B, T, S].

        Raises:
            ValueError, TypeError, IndexError: as :func:`fastseq.functional.attention_decoder`.
        """
        features, states, weights = self.features(
            tokens, hx, encoder_outputs, lengths=lengths, mask=mask, forced=forced
        )
        return self.fc(features), states, weights

    def features(
        self,
        tokens: Tensor,
        hx: tuple[Tensor, ...] | Tensor,
        encoder_outputs: Tensor,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        forced: Sequence[bool] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """What ``fc`` makes the logits of, [B, T, F], for a loss that does without logits.

        Arguments, further results and errors are those of :meth:`forward`.
        """
        return self._run(tokens, hx, encoder_outputs, lengths, mask, forced)[:3]

    @torch.no_grad()
    def generate(
        self,
        start: Tensor,
        hx: tuple[Tensor, ...] | Tensor,
        encoder_outputs: Tensor,
        max_length: int,
        *,
        lengths: Tensor | None = None,
        mask: Tensor | None = None,
        end_token: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Greedy decoding: the likeliest token of every step.

        Args:
            start: the first token of each sequence, [B], int64.
            hx, encoder_outputs, lengths, mask: as in :meth:`forward`.
            max_length: how many tokens to write, at least 1.
            end_token: ends a sequence; it then repeats to the end. None: none ends.

        Returns:
            tokens [B, max_length], and attention weights [B, max_length, S], zero past an end.

        Raises:
            ValueError: ``max_length`` below 1, and as :meth:`forward`.
        """
        if max_length < 1:
            raise ValueError(
                f"fastseq.AttentionDecoder: expected max_length of at least 1, got {max_length}"
            )
        chosen = (True, False)
        given = from_start(start, max_length)
        known = self.explained(given["input"], hx, encoder_outputs, forced=chosen)
        stops = known.backend != "torch"
        decoded = self._run(
            hx=hx,
            encoder_outputs=encoder_outputs,
            lengths=lengths,
            mask=mask,
            end_token=end_token if stops else None,
            **given,
        )
        tokens, weights = decoded.tokens[:, 1:], decoded.weights
        if end_token is None or stops:
            return tokens, weights
        past = past_end(tokens, end_token)
        return tokens.masked_fill(past, end_token), weights.masked_fill(past.unsqueeze(2), 0)

    def search(
        self,
        start: Tensor,
        hx: tuple[Tensor, ...] | Tensor,
        encoder_outputs: Tensor,
        *,
        mask: Tensor | None = None,
        **options: object,
    ) -> tuple[Tensor, Tensor, Tensor] | None:
        """Beam search in one call of the kernel; None where it is not one.

        :func:`fastseq.decoding.beam_search` takes models with such a decoder, and calls this.

        Args:
            start, hx, encoder_outputs, mask: as in :meth:`generate`.
            options: of :func:`fastseq.functional.attention_beams`, which says what returns.
        """
        return self._on_a_cpu(attention_beams, start, hx, encoder_outputs, mask, options)

    def draw(
        self,
        start: Tensor,
        hx: tuple[Tensor, ...] | Tensor,
        encoder_outputs: Tensor,
        *,
        mask: Tensor | None = None,
        **options: object,
    ) -> tuple[Tensor, Tensor] | None:
        """Sampling in one call of the kernel; None where it is not one.

        :func:`fastseq.decoding.sample` takes models with such a decoder, and calls this.

        Args:
            start, hx, encoder_outputs, mask: as in :meth:`generate`.
            options: of :func:`fastseq.functional.attention_samples`, which says what returns.
        """
        return self._on_a_cpu(attention_samples, start, hx, encoder_outputs, mask, options)

    @torch.no_grad()
    def _on_a_cpu(self, function, start, hx, encoder_outputs, mask, options):
        runs = encoder_outputs.is_cpu and self.explained(values=encoder_outputs).backend == "cpu"
        if not runs or torch.is_autocast_enabled("cpu"):
            return None
        return function(
            start,
            (hx,) if isinstance(hx, Tensor) else tuple(hx),
            *self._source(encoder_outputs),
            embedding=self.embedding.weight,
            output=(self.fc.weight, self.fc.bias),
            mask=mask,
            **self._options(),
            **options,
        )

    def picks_in_one_call(self) -> bool:
        """Whether a loop that chooses its own tokens is one call."""
        return self.location_conv is None

    def explained(
        self, input: object = None, hx: object = None, values: Tensor | None = None, *_, **keywords
    ) -> Explanation:
        """What ``fastseq.explain`` says of this module, called so."""
        weights = [w for layer in self.rnn.all_weights for w in layer]
        values = keywords.get("encoder_outputs", weights[0]) if values is None else values
        known = self._options() | {"forced": keywords.get("forced")}
        kind = kind_of(self.cell, self.rnn.num_layers, known)
        by_steps = self.location_conv is not None
        T = input.shape[1] if isinstance(input, Tensor) and input.dim() > 1 else None
        K = values.shape[-1] if known["v"] is None else known["v"].shape[0]
        return backends.decoder_explanation(values, weights, kind, by_steps, T, K)

    def _source(self, encoder_outputs: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Keys, values and the layers' weights."""
        keys = encoder_outputs if self.key is None else self.key(encoder_outputs)
        return keys, encoder_outputs, [w for layer in self.rnn.all_weights for w in layer]

    def _options(self) -> dict[str, object]:
        """What the loops take alike."""
        return {
            "cell": self.cell,
            "has_biases": self.rnn.bias,
            "query_weight": None if self.query is None else self.query.weight,
            "v": self.v,
            "combine": None if self.combine is None else (self.combine.weight, self.combine.bias),
            "input_feeding": self.input_feeding,
            "residual": self.residual,
        }

    def _run(self, input, hx, encoder_outputs, lengths, mask, forced, end_token=None, feed=None):
        location = None
        if self.location_conv is not None:
            location = self.location_conv.weight, self.location_proj.weight
        return attention_decoder(
            input,
            (hx,) if isinstance(hx, Tensor) else tuple(hx),
            *self._source(encoder_outputs),
            lengths=lengths,
            mask=mask,
            feed=feed,
            embedding=self.embedding.weight,
            forced=forced,
            output=None if forced is None else (self.fc.weight, self.fc.bias),
            end_token=end_token,
            location=location,
            **self._options(),
        )

    def _step(self, token, hx, encoder_outputs, mask, feed):
        """Logits [B, 1, V], states, weights [B, 1, S], and with input feeding what is fed next."""
        decoded = self._run(token, hx, encoder_outputs, None, mask, None, feed=feed)
        fed = decoded.features[:, -1] if self.input_feeding else None
        return self.fc(decoded.features), decoded.states, decoded.weights, fed
