"""Recurrent layers with torch.nn's constructors, parameters and results."""

from __future__ import annotations

import functools
import math
from types import FunctionType

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq import backends
from fastseq.functional._checks import NO_ZONEOUT, Options, check_zoneout
from fastseq.functional.rnn import as_matrix, call, stack
from fastseq.nn import _compiling
from fastseq.nn._scripting import refusal, torchs_twin
from fastseq.ops import recurrent as _op
from fastseq.reference.rnn import CELLS

__all__ = ["GRU", "LSTM", "RNN", "LayerNormLSTM", "PeepholeLSTM"]


def name_forward(cls: type, shared: FunctionType) -> None:
    """Give a class ``shared`` as its own forward: Python's words for a missing or unknown argument
    name the function's class, as they do in torch."""
    own = FunctionType(
        shared.__code__, shared.__globals__, "forward", shared.__defaults__, shared.__closure__
    )
    functools.update_wrapper(own, shared)
    del own.__wrapped__
    own.__qualname__ = f"{cls.__name__}.forward"
    cls.forward = own


class _FastLayer:
    """The forward pass all layers share; comes before a torch.nn layer among a class's bases."""

    def __init_subclass__(cls, **kwargs) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            name_forward(cls, _FastLayer.forward)

    zoneout: tuple[float, float] = NO_ZONEOUT
    """May be set anew, to one number too."""
    recompute = False
    """Set it to keep less for the backward pass, at the price of running forward twice."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor | PackedSequence, Tensor | tuple[Tensor, Tensor]]:
        """Run the layer.

        Args:
            input: [T, B, I], [B, T, I] with batch_first, [T, I] unbatched, or a PackedSequence.
            hx: the initial state, h_0 [L*D, B, P] or, of an LSTM, the pair of it and c_0
                [L*D, B, H] (unbatched, without B); zeros where absent.
            lengths: int64 [B], steps of each row, in place of packing: what input holds beyond them
                is never read, the output is zero there.
            resets: bool [T, B] ([B, T] with batch_first, [T] unbatched, [N] for packed rows in
                their order): where True, the state that enters the step is zero.

        Returns:
            output in the input's layout with D*P columns, and the final state shaped as hx.
        """
        if lengths is None and resets is None and backends.eager_calls_allowed():
            done = self._run_eagerly(input, hx)
            if done is not None:
                return done
        if torch.compiler.is_compiling() and not self._belongs_in_graphs():
            return _compiling.between_graphs(self, input, hx, lengths, resets)
        packed = isinstance(input, PackedSequence)
        x = input.data if packed else input
        more = lengths is not None or resets is not None or self.zoneout != NO_ZONEOUT
        weights = self._weights_now() if isinstance(x, Tensor) else None
        batch_sizes = input.batch_sizes if packed else None
        batch_first, state = self.batch_first, hx
        unbatched = weights is not None and not packed and x.dim() == 2
        if unbatched:
            x, state, batch_first = x.unsqueeze(1), _with_batch(hx), False
            resets = resets if resets is None else resets.unsqueeze(1)
        cell = self.cell_name
        serves = weights is not None and self._serves(x, state, batch_sizes, batch_first)
        if not serves and not more and self._is_torchs:
            return super().forward(input, hx)
        if packed and state is not None:
            state = self.permute_hidden(state, input.sorted_indices)
        options = Options(
            self.bias,
            self.num_layers,
            # Not read where nothing is drawn: a float costs torch.compile a second trace.
            self.dropout if self.training and self.num_layers > 1 else 0.0,
            self.training,
            self.bidirectional,
            batch_first,
            batch_sizes,
            lengths,
            resets,
            self.recompute,
            self.zoneout,
        )
        if serves and not more:
            left = backends.recurrent_obstacle(cell, x, weights) or backends.torch_is_faster(
                cell, x, False, weights, options, state
            )
            if left and self._is_torchs and not backends.transform_obstacle():
                return super().forward(input, hx)
            output, *state = stack(cell, x, state, weights, options, kernel=not left)
        else:
            output, *state = call(cell, x, state, weights, options)
        if unbatched:
            output, state = output.squeeze(1), [s.squeeze(1) for s in state]
        state = state[0] if len(state) == 1 else tuple(state)
        if packed:
            output = PackedSequence(
                output, batch_sizes, input.sorted_indices, input.unsorted_indices
            )
            state = self.permute_hidden(state, input.unsorted_indices)
        return output, state

    def _run_eagerly(self, input, hx):
        """The commonest calls, all at once: in eager mode, on plain tensors that fit. None for the
        others, which take a longer way to the same kernel or elsewhere."""
        if self.zoneout != NO_ZONEOUT:
            return None
        weights = self._weights_now()
        if weights is None:
            return None
        cell, layers = self.cell_name, self.num_layers
        settings = _op.settings_of(cell, self.bias, 1 + self.bidirectional, self.recompute)
        weights = as_matrix(cell, weights, self.bias, layers * settings.directions)
        states = CELLS[cell].states
        dropout = self.dropout if self.training and layers > 1 else 0.0
        if type(input) is not PackedSequence:
            return _op.eager.layer(
                settings, states, input, hx, weights, self.batch_first, layers, dropout
            )
        rows, *packing = input
        done = _op.eager.layer(
            settings, states, rows, hx, weights, False, layers, dropout, *packing
        )
        return done and (PackedSequence(done[0], *packing), done[1])

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(
            name, check_zoneout(self.cell_name, value) if name == "zoneout" else value
        )

    cell_name: str
    """Of the cell, a key of fastseq.reference.rnn.CELLS."""

    # Whether torch has the same layer, to fall back on and to find the words for bad input.
    _is_torchs = True

    def _weights_now(self) -> list[Tensor] | None:
        """The weights as they stand, in torch's flat order; None where one is missing."""
        params, names = self._parameters, self._weight_names()
        try:
            weights = [params[name] for name in names]
        except KeyError:
            # Weight norm, pruning and parametrizations put plain attributes in their place.
            weights = [getattr(self, name, None) for name in names]
        for w in weights:
            if w is None:
                return None
        return weights

    def _weight_names(self) -> list[str]:
        return self._flat_weights_names

    def _belongs_in_graphs(self) -> bool:
        """Whether the compiler, which is tracing, is to take this call into its graph."""
        weights = self._weights_now()
        if not weights or not weights[0].is_cuda or not self._is_torchs:
            return True
        return _compiling.in_graph(
            weights[0].device.index,
            backends.gpu_dtype(weights[0]),
            self.hidden_size,
            cell=self.cell_name,
            layers=self.num_layers,
            directions=2 if self.bidirectional else 1,
            P=self.proj_size,
            train=torch.is_grad_enabled() and weights[0].requires_grad,
        )

    def _serves(self, x, hx, batch_sizes, batch_first) -> bool:
        """Whether shapes and dtypes are as they should be; if not, torch has the words for it."""
        if x.dim() != (3 if batch_sizes is None else 2) or x.shape[-1] != self.input_size:
            return False
        if not x.numel() and not torch.compiler.is_compiling():
            steps = x.shape[1 if batch_first else 0] if batch_sizes is None else len(batch_sizes)
            if steps == 0:
                return False
        if hx is None:
            return True
        kind = CELLS[self.cell_name]
        states = (hx,) if kind.states == 1 else hx
        if not isinstance(states, (tuple, list)) or len(states) != kind.states:
            return False
        if batch_sizes is not None:
            batch = int(batch_sizes[0])
        else:
            batch = x.shape[0 if batch_first else 1]
        cells = self.num_layers * (2 if self.bidirectional else 1)
        widths = (self.proj_size or self.hidden_size, self.hidden_size)
        return all(
            isinstance(t, Tensor)
            and t.shape == (cells, batch, width)
            and t.dtype is x.dtype
            and t.device == x.device
            for t, width in zip(states, widths, strict=False)
        )

    def __prepare_scriptable__(self) -> torch.nn.RNNBase:
        if not self._is_torchs or any(self.zoneout):
            raise refusal(self)
        return torchs_twin(self)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return f"{text}, zoneout={self.zoneout}" if any(self.zoneout) else text


def _with_batch(hx):
    """[L*D, H] states as [L*D, 1, H]; anything else as it is, to be refused."""
    if isinstance(hx, Tensor) and hx.dim() == 2:
        return hx.unsqueeze(1)
    if isinstance(hx, (tuple, list)) and all(isinstance(t, Tensor) and t.dim() == 2 for t in hx):
        return tuple(t.unsqueeze(1) for t in hx)
    return None if hx is None else False


class LSTM(_FastLayer, torch.nn.LSTM):
    """:class:`torch.nn.LSTM` on fastseq's kernels.

    Constructor, parameters, initialisation, state_dict, shapes, errors and random streams are
    those of torch.nn.LSTM, of which this is a subclass (on a GPU's kernels dropout draws by
    torch.nn.functional.dropout, where cuDNN has a stream of its own). What no kernel serves (see
    :func:`fastseq.explain`) and whatever torch would refuse runs in torch's own code.

    Precision: on a CPU float32 is IEEE float32 unless you permit less, by
    ``torch.set_float32_matmul_precision("high")`` or "medium", or for recurrent layers alone by
    ``torch.backends.mkldnn.rnn.fp32_precision = "tf32"`` or "bf16", which has the last word unless
    it is "none". On a CPU with AMX, products of eight rows and more are then made by bfloat16
    instructions that sum in float32: with "high" three for each product, which leave about 17 bits
    of each factor (relative error of outputs and gradients up to 2e-5, measured 5e-6), with
    "medium" one, which leaves 8 (1e-2 and 3e-3). Each pass goes by the switch as it stands when the
    pass runs, as torch's own products do. Without AMX nothing changes; docs/numbers.md tells more,
    :func:`fastseq.explain` what a call runs.
    On a GPU products over all tokens, and those of kernels that go step by step, are torch's and
    follow ``torch.backends.cuda.matmul.fp32_precision``; cuDNN follows its own switch. In bfloat16
    and float16 the kernels carry states in float32 and sum in it, and inputs are taken and results
    given in the tensors' dtype. So it is under autocast, in the dtype torch's layer has; on a GPU
    kernels run under autocast to float16, while to bfloat16 it is torch's.

    Args:
        zoneout: beyond torch's arguments: probability that an element of the states keeps its
            value of the step before, one for h and c or a pair; see
            :func:`fastseq.functional.lstm`.
    """

    cell_name = "lstm"

    def __init__(self, *args, zoneout: float | tuple[float, float] = 0.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.zoneout = zoneout


class GRU(_FastLayer, torch.nn.GRU):
    """:class:`torch.nn.GRU` on fastseq's kernels; see :class:`LSTM`.

    Args:
        zoneout: beyond torch's arguments: probability that an element of h keeps its value of the
            step before.
    """

    cell_name = "gru"

    def __init__(self, *args, zoneout: float = 0.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.zoneout = zoneout


class RNN(_FastLayer, torch.nn.RNN):
    """:class:`torch.nn.RNN`, tanh or relu, on fastseq's kernels; see :class:`LSTM`."""

    @property
    def cell_name(self) -> str:
        return f"rnn_{self.nonlinearity}"


class _OwnLSTM(_FastLayer, torch.nn.RNNBase):
    """An LSTM with weights beyond torch's, named in the reference's table of cells."""

    _is_torchs = False

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        sides = ("", "_reverse")[: 2 if bidirectional else 1]
        torchs, per_side = self._flat_weights_names, 4 if bias else 2
        self._own_names = []
        for i, side in enumerate(f"_l{layer}{d}" for layer in range(num_layers) for d in sides):
            self._own_names += torchs[i * per_side : (i + 1) * per_side]
            for kind, shape in CELLS[self.cell_name].extras.items():
                weight = torch.empty(shape(hidden_size), device=device, dtype=dtype)
                setattr(self, kind + side, torch.nn.Parameter(weight))
                self._own_names.append(kind + side)
        self.reset_parameters()

    def _weight_names(self) -> list[str]:
        return self._own_names

    def _serves(self, x, *rest) -> bool:
        # There is no layer of torch's to complain of another dtype.
        return x.dtype is self.weight_ih_l0.dtype and super()._serves(x, *rest)

    def reset_parameters(self) -> None:
        """Everything uniform in +-1/sqrt(H), as torch's; gains are 1."""
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0
        for name, weight in self.named_parameters():
            if name.startswith("weight_ln"):
                torch.nn.init.ones_(weight)
            else:
                torch.nn.init.uniform_(weight, -bound, bound)

    def permute_hidden(self, hx, permutation):
        if permutation is None:
            return hx
        return tuple(state.index_select(1, permutation) for state in hx)


class PeepholeLSTM(_OwnLSTM):
    """An LSTM whose gates see the cell state, with torch.nn.LSTM's constructor, projection aside.

    Beside torch's parameters it has ``weight_peephole_l0`` [3, H], rows for i, f, o, and so on for
    each layer and direction.

    Source: Gers and Schmidhuber 2000; Graves 2013, equations 7 to 11.
    """

    cell_name = "peephole_lstm"


class LayerNormLSTM(_OwnLSTM):
    """An LSTM that normalises its sums and its cell state, with torch.nn.LSTM's constructor,
    projection aside.

    Beside torch's parameters it has ``weight_ln_ih_l0`` and ``weight_ln_hh_l0`` [4H],
    ``weight_ln_c_l0`` and ``bias_ln_c_l0`` [H], and so on for each layer and direction.

    Source: Ba, Kiros and Hinton 2016, equations 20 to 22.
    """

    cell_name = "layer_norm_lstm"


_compiling.allow(_FastLayer)
