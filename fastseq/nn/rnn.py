"""Recurrent layers with torch.nn's constructors, parameters and results."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import backends
from fastseq.functional import lstm_kernel

__all__ = ["LSTM"]


class LSTM(torch.nn.LSTM):
    """:class:`torch.nn.LSTM` on fastseq's kernels.

    Constructor, parameters, initialisation, state_dict, shapes, errors and random streams are
    those of torch.nn.LSTM, of which this is a subclass. What no kernel serves (see
    :func:`fastseq.explain`) and whatever torch would refuse runs in torch's own code.
    """

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """Run the layer.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: (h_0, c_0), each [L*D, B, H] ([L*D, H] unbatched); zeros where absent.

        Returns:
            output in the input's layout with D*H columns, and (h_n, c_n) shaped as hx.
        """
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        if not isinstance(x, Tensor):
            return super().forward(input, hx)
        weights = self._weights_now()
        if weights is None or backends.lstm_obstacle(x, weights, self.proj_size) is not None:
            return super().forward(input, hx)
        unbatched = x.dim() == 2 and not packed
        batch_sizes = input.batch_sizes if packed else None
        batch_first = self.batch_first and not unbatched
        state = hx
        if unbatched:
            x = x.unsqueeze(1)
            if hx is not None:
                state = _unsqueeze_states(hx)
        if not self._serves(x, state, batch_sizes, batch_first):
            return super().forward(input, hx)
        if packed and state is not None:
            state = self.permute_hidden(state, input.sorted_indices)
        output, h_n, c_n = lstm_kernel(
            x,
            state,
            weights,
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            batch_first,
            batch_sizes,
        )
        if unbatched:
            return output.squeeze(1), (h_n.squeeze(1), c_n.squeeze(1))
        if packed:
            output = PackedSequence(
                output, batch_sizes, input.sorted_indices, input.unsorted_indices
            )
            return output, self.permute_hidden((h_n, c_n), input.unsorted_indices)
        return output, (h_n, c_n)

    def _weights_now(self) -> list[Tensor] | None:
        """The weights as they stand, in torch's flat order; None where one is missing."""
        params = self._parameters
        weights = [params.get(name) for name in self._flat_weights_names]
        if any(w is None for w in weights):
            # Weight norm, pruning and parametrizations put plain attributes in their place.
            weights = [getattr(self, name, None) for name in self._flat_weights_names]
        return None if any(w is None for w in weights) else weights

    def _serves(self, x, hx, batch_sizes, batch_first) -> bool:
        """Whether shapes and dtypes are as they should be; if not, torch has the words for it."""
        if x.dim() != (3 if batch_sizes is None else 2) or x.shape[-1] != self.input_size:
            return False
        if hx is None:
            return True
        if not isinstance(hx, tuple) or len(hx) != 2:
            return False
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
        else:
            batch = x.shape[0 if batch_first else 1]
        cells = self.num_layers * (2 if self.bidirectional else 1)
        wanted = (cells, batch, self.hidden_size)
        return all(
            isinstance(t, Tensor) and t.shape == wanted and t.dtype is x.dtype and t.is_cpu
            for t in hx
        )


def _unsqueeze_states(hx):
    """[L*D, H] states as [L*D, 1, H]; anything else as it is, for torch to refuse."""
    if isinstance(hx, tuple) and all(isinstance(t, Tensor) and t.dim() == 2 for t in hx):
        return tuple(t.unsqueeze(1) for t in hx)
    return False
