"""``fastseq.nn.AttentionDecoder`` under the names that the decoders of ``fastseq.models`` have."""

from __future__ import annotations

from torch import Tensor

from fastseq.nn.decoder import AttentionDecoder

__all__ = ["ModuleDecoder"]


class ModuleDecoder:
    """Its states are the layers' and, with input feeding, what the next step is fed, [1, B, A]."""

    def __init__(self, module: AttentionDecoder) -> None:
        self._module = module

    def first(self, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states before the first step, from those of the encoder."""
        if not self._module.input_feeding:
            return state
        width = self._module.combine.out_features
        return *state, state[0].new_zeros(1, state[0].shape[1], width)

    def __call__(
        self, token: Tensor, *state: Tensor, encoder_outputs: Tensor, mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """One step, as a model's decoder makes it."""
        module = self._module
        if module.location_conv is not None:
            raise NotImplementedError(
                "fastseq.decoding: expected a score other than location, whose steps need earlier "
                "weights; decode it greedily, with one end token for all rows or none"
            )
        feed = state[-1][0] if module.input_feeding else None
        logits, states, weights, fed = module._step(
            token, self._layers(state), encoder_outputs, mask, feed
        )
        return logits, *states, *(() if fed is None else (fed.unsqueeze(0),)), weights

    def generate(
        self, start: Tensor, max_length: int, *given: Tensor | None, end_token: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Greedy decoding; ``given``: the states, the encoder's outputs and a mask."""
        *state, outputs, mask = given
        return self._module.generate(
            start, self._layers(state), outputs, max_length, mask=mask, end_token=end_token
        )

    def search(self, start: Tensor, *given: Tensor | None, **options: object):
        """Beam search; ``given`` are the states, the encoder's outputs and a mask."""
        return self._on_a_cpu(self._module.search, start, given, options)

    def draw(self, start: Tensor, *given: Tensor | None, **options: object):
        """Sampling; ``given`` as there."""
        return self._on_a_cpu(self._module.draw, start, given, options)

    def _on_a_cpu(self, method, start, given, options):
        *state, outputs, mask = given
        return method(start, self._layers(state), outputs, mask=mask, **options)

    def _layers(self, state: tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(state[:-1] if self._module.input_feeding else state)
