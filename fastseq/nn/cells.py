"""Recurrent cells, one step a call, with torch.nn's constructors, parameters and results."""

from __future__ import annotations

import torch
from torch import Tensor

from fastseq import backends
from fastseq.functional._checks import Options
from fastseq.functional.rnn import stack
from fastseq.nn._scripting import torchs_twin
from fastseq.nn.rnn import name_forward
from fastseq.ops import recurrent as _op
from fastseq.reference.rnn import CELLS

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class _FastCell:
    """The forward pass all cells share; comes before a torch.nn cell among a class's bases."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            name_forward(cls, _FastCell.forward)

    def forward(
        self, input: Tensor, hx: Tensor | tuple[Tensor, Tensor] | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            input: [B, I], or [I] unbatched.
            hx: h [B, H] or, of an LSTM, the pair of it and c [B, H] (unbatched, [H]); zeros where
                absent.

        Returns:
            The state after the step, shaped as hx.
        """
        weights = self._weights_now()
        if weights is not None and backends.eager_calls_allowed():
            cell = self.cell_name
            settings = _op.settings_of(cell, len(weights) == 4)
            # A single step, all at once; None where it is anything but plain.
            done = _op.eager.layer(settings, CELLS[cell].states, input, hx, weights, None, 1, 0.0)
            if done is not None:
                return done
        states = () if hx is None else (hx,) if isinstance(hx, Tensor) else hx
        if weights is None or not self._serves(input, states):
            return super().forward(input, hx)
        cell = self.cell_name
        obstacle = backends.recurrent_obstacle(cell, input, weights)
        as_it_is = obstacle is None and _op.takes_step(input)
        if not as_it_is:
            obstacle = obstacle or backends.torch_is_faster(cell, input, one_step=True)
        if obstacle and not backends.transform_obstacle():
            return super().forward(input, hx)
        batched = input.dim() == 2
        if as_it_is:
            x = input
            if not batched:
                x, states = x.unsqueeze(0), [s.unsqueeze(0) for s in states]
            h, c = (*states, None, None)[:2]
            after = _op.run(_op.settings_of(cell, len(weights) == 4), x, h, c, weights)
            if not batched:
                after = [s.squeeze(0) for s in after]
        else:
            after = self._by_stack(input, states, weights, kernel=obstacle is None)
        return after[0] if len(after) == 1 else tuple(after)

    def _by_stack(self, input, states, weights, kernel):
        """The step as a layer of one step, by the kernel or by the reference."""
        batched = input.dim() == 2
        x = input.unsqueeze(0) if batched else input.view(1, 1, -1)
        leading = (1,) if batched else (1, 1)
        initial = [s.expand(*leading, *s.shape) for s in states] or None
        options = Options(len(weights) == 4)
        _, *after = stack(self.cell_name, x, initial, weights, options, kernel=kernel)
        if torch.is_autocast_enabled("cpu") and CELLS[self.cell_name].gates > 1:
            after = [s.to(input.dtype) for s in after]
        return [s[0] if batched else s[0, 0] for s in after]

    def __prepare_scriptable__(self) -> torch.nn.RNNCellBase:
        return torchs_twin(self)

    cell_name: str
    """Of the cell, a key of fastseq.reference.rnn.CELLS."""

    def _weights_now(self) -> list[Tensor] | None:
        params = self._parameters
        try:
            found = (
                params["weight_ih"], params["weight_hh"], params["bias_ih"], params["bias_hh"]
            )  # fmt: skip
        except KeyError:
            # Weight norm, pruning and parametrizations put plain attributes in their place.
            names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            found = [getattr(self, name, None) for name in names]
        weights = [w for w in found if w is not None]
        return weights if len(weights) in (2, 4) else None

    def _serves(self, x, states) -> bool:
        """Whether shapes and dtypes are as they should be; if not, torch has the words for it."""
        if not isinstance(x, Tensor) or x.dim() not in (1, 2) or x.shape[-1] != self.input_size:
            return False
        if states and len(states) != CELLS[self.cell_name].states:
            return False
        shape, dtype, device = (*x.shape[:-1], self.hidden_size), x.dtype, x.device
        for s in states:
            if not isinstance(s, Tensor) or s.shape != shape:
                return False
            if s.dtype is not dtype or s.device != device:
                return False
        return True


class LSTMCell(_FastCell, torch.nn.LSTMCell):
    """:class:`torch.nn.LSTMCell` on fastseq's kernels."""

    cell_name = "lstm"


class GRUCell(_FastCell, torch.nn.GRUCell):
    """:class:`torch.nn.GRUCell` on fastseq's kernels."""

    cell_name = "gru"


class RNNCell(_FastCell, torch.nn.RNNCell):
    """:class:`torch.nn.RNNCell`, tanh or relu, on fastseq's kernels."""

    @property
    def cell_name(self) -> str:
        return f"rnn_{self.nonlinearity}"
