"""Seeded calls of every recurrent cell: parameters, inputs and cotangents."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from fastseq.reference import rnn

__all__ = ["LSTMCase", "RecurrentCase", "lstm_case", "recurrent_case"]

_MODULE_ONLY = ("input_size", "hidden_size", "proj_size")


@dataclass(frozen=True)
class RecurrentCase:
    """Arguments, tensors and cotangents of one recurrent call; :func:`recurrent_case` builds it.

    ``options`` are the module's, without those the cell's module lacks. ``inputs`` holds ``x``,
    then ``h0`` (and ``c0``) unless absent, then the parameters under torch's names in torch's
    order, the cell's own after the biases. ``keywords`` holds ``lengths``, ``resets`` and
    ``batch_sizes``, those that the call has.
    """

    cell: str
    options: dict[str, object]
    inputs: dict[str, Tensor]
    cotangents: list[Tensor]
    keywords: dict[str, Tensor] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the outputs."""
        return ("y", "h_n", "c_n")[: 1 + rnn.CELLS[self.cell].states]

    def __str__(self) -> str:
        shape = ",".join(map(str, self.inputs["x"].shape))
        said = [f"{k}={v}" for k, v in self.options.items() if k != "input_size"]
        said += [] if "h0" in self.inputs else ["no-hx"]
        said += [f"{k}={v.tolist()}" for k, v in self.keywords.items() if k != "resets"]
        said += ["resets"] if "resets" in self.keywords else []
        return f"{self.cell} x[{shape}] {' '.join(said)}"

    def _state(self, tensors: Sequence[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
        """``hx`` as torch takes it: a tensor, or a pair for the LSTMs."""
        return tensors[0] if len(self.names) == 2 else tuple(tensors)

    def functional(self, fn: Callable[..., object], **more: object) -> Callable[..., object]:
        """A function of the inputs that calls ``fn`` by the signature of reference.rnn.lstm."""
        options = {k: v for k, v in self.options.items() if k not in _MODULE_ONLY}
        options["has_biases"] = options.pop("bias")
        options |= self.keywords | more
        states = len(self.names) - 1 if "h0" in self.inputs else 0

        def call(x: Tensor, *rest: Tensor) -> object:
            hx = self._state(rest[:states]) if states else None
            return fn(x, hx, list(rest[states:]), **options)

        return call

    def reference(self, **more: object) -> Callable[..., object]:
        """A function of the inputs that calls the reference: truth, and baseline beyond torch."""

        def call(*args: object, nonlinearity: str = "", **options: object) -> object:
            return rnn.recurrent(self.cell, *args, **options)

        return self.functional(call, **more)

    def module(self, cls: Callable[..., torch.nn.Module]) -> Callable[..., object]:
        """A function of the inputs that calls a ``cls`` module with these parameters."""
        built = cls(**self.options)
        keywords = dict(self.keywords)
        batch_sizes = keywords.pop("batch_sizes", None)

        def call(x: Tensor, *rest: Tensor) -> object:
            values = dict(zip(self.inputs, (x, *rest), strict=True))
            del values["x"]
            given = [values.pop(name) for name in ("h0", "c0") if name in values]
            hx = self._state(given) if given else None
            if batch_sizes is None:
                return torch.func.functional_call(built, values, (x, hx), keywords)
            rows = PackedSequence(x, batch_sizes)
            y, state = torch.func.functional_call(built, values, (rows, hx), keywords)
            return y.data, state

        return call

    def build(self, cls: Callable[..., torch.nn.Module]) -> torch.nn.Module:
        """A ``cls`` module that owns copies of these parameters."""
        built = cls(**self.options, dtype=self.inputs["x"].dtype)
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                parameter.copy_(self.inputs[name])
        return built

    def weights(self, layer: int = 0, side: str = "") -> list[Tensor | None]:
        """Of one layer and direction ("" or "_reverse"), as reference.rnn.layer takes them."""
        biases = ("bias_ih", "bias_hh")
        own = rnn.CELLS[self.cell].extras
        names = ["weight_ih", "weight_hh", *biases, *own, "weight_hr"]
        found = {name: self.inputs.get(f"{name}_l{layer}{side}") for name in names}
        return [t for name, t in found.items() if t is not None or name in biases]

    def map(self, change: Callable[[Tensor], Tensor], *names: str) -> RecurrentCase:
        """The same case with ``change`` applied to the named inputs (all, if none is named)."""
        chosen = names or tuple(self.inputs)
        unknown = set(chosen) - set(self.inputs)
        if unknown:
            raise ValueError(f"fastseq.testing: no input named {sorted(unknown)}")
        changed = {n: change(t) if n in chosen else t for n, t in self.inputs.items()}
        return replace(self, inputs=changed)

    def to(self, dtype: torch.dtype) -> RecurrentCase:
        """The same numbers in another dtype, cotangents too."""
        cotangents = [c.to(dtype) for c in self.cotangents]
        return replace(self.map(lambda t: t.to(dtype)), cotangents=cotangents)

    def on(self, device: str) -> RecurrentCase:
        """The same call there; a packed one's batch_sizes stay on the host, as torch has them."""
        keywords = {n: t if n == "batch_sizes" else t.to(device) for n, t in self.keywords.items()}
        case = self.map(lambda t: t.to(device))
        cotangents = [c.to(device) for c in self.cotangents]
        return replace(case, keywords=keywords, cotangents=cotangents)

    def packed(self) -> RecurrentCase:
        """The same call on packed rows, longest first; lengths must be positive."""
        lengths = self.keywords.get("lengths")
        if lengths is None or int(lengths.min()) < 1:
            raise ValueError("fastseq.testing: expected a case with positive lengths to pack")
        order = lengths.argsort(descending=True, stable=True)
        running = torch.arange(int(lengths.max())).unsqueeze(1) < lengths[order]

        def rows(sequence: Tensor) -> Tensor:
            by_time = sequence.transpose(0, 1) if self.options["batch_first"] else sequence
            return by_time[: len(running), order][running]

        y, *finals = self.cotangents
        keywords = {"batch_sizes": running.sum(1)}
        if "resets" in self.keywords:
            keywords["resets"] = rows(self.keywords["resets"])
        inputs = {n: t[:, order] if n in ("h0", "c0") else t for n, t in self.inputs.items()}
        inputs["x"] = rows(inputs["x"])
        cotangents = [rows(y), *(c[:, order] for c in finals)]
        return replace(self, inputs=inputs, cotangents=cotangents, keywords=keywords)


def recurrent_case(
    cell: str,
    T: int,
    B: int | None,
    I: int,  # noqa: E741
    H: int,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    hx: bool = True,
    proj_size: int = 0,
    lengths: str | Sequence[int] | None = None,
    resets: float | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    scale: float = 1.0,
) -> RecurrentCase:
    """Draw one recurrent call: parameters as torch initialises them, normal inputs and cotangents.

    Args:
        cell: a key of ``fastseq.reference.rnn.CELLS``.
        T, B, I, H: steps, rows (None for unbatched input), input and hidden size.
        num_layers, bidirectional, bias, batch_first, dropout: as in torch.nn.LSTM.
        hx: whether the initial state is given.
        proj_size: as in torch.nn.LSTM; for any LSTM cell, 0 for none.
        lengths: of the rows, "random" for draws from 0 to T, None for none. x is NaN beyond them.
        resets: probability of one at a step of a row, None for no resets.
        dtype: drawn in float32 and converted, so that all dtypes at and above see equal numbers.
        seed: of a private generator; torch's global stream is left alone.
        scale: multiplies the parameters (of LayerNorm's gains, their distance from 1); above about
            10 the gates saturate.
    """
    kind = rnn.CELLS[cell]
    if proj_size and kind.states == 1:
        raise ValueError(f"fastseq.testing: expected proj_size 0 for {cell}, got {proj_size}")
    if lengths is not None and B is None:
        raise ValueError("fastseq.testing: expected a batch of rows to have lengths")
    generator = torch.Generator().manual_seed(seed)
    directions = 2 if bidirectional else 1
    G, P = kind.gates, proj_size or H
    rows = () if B is None else (B,)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    bound = scale / math.sqrt(H)

    def uniform(*shape: int, about: float = 0.0) -> Tensor:
        return (about + (torch.rand(*shape, generator=generator) * 2 - 1) * bound).to(dtype)

    leading = (*rows, T) if batch_first and rows else (T, *rows)
    states = [(num_layers * directions, *rows, width) for width in (P, H)[: kind.states]]
    inputs = {"x": normal(*leading, I)}
    if hx:
        inputs |= {name: normal(*s) for name, s in zip(("h0", "c0"), states, strict=False)}
    for layer in range(num_layers):
        for side in ("", "_reverse")[:directions]:
            suffix = f"_l{layer}{side}"
            width = I if layer == 0 else P * directions
            inputs["weight_ih" + suffix] = uniform(G * H, width)
            inputs["weight_hh" + suffix] = uniform(G * H, P)
            if bias:
                inputs["bias_ih" + suffix] = uniform(G * H)
                inputs["bias_hh" + suffix] = uniform(G * H)
            for name, shape in kind.extras.items():
                about = 1.0 if name.startswith("weight_ln") else 0.0
                inputs[name + suffix] = uniform(*shape(H), about=about)
            if proj_size:
                inputs["weight_hr" + suffix] = uniform(P, H)
    options: dict[str, object] = {
        "input_size": I,
        "hidden_size": H,
        "num_layers": num_layers,
        "bias": bias,
        "batch_first": batch_first,
        "dropout": dropout,
        "bidirectional": bidirectional,
    }
    if proj_size:
        options["proj_size"] = proj_size
    if cell.startswith("rnn_"):
        options["nonlinearity"] = cell.removeprefix("rnn_")
    cotangents = [normal(*leading, P * directions), *(normal(*s) for s in states)]

    keywords = {}
    if lengths is not None:
        drawn = torch.randint(T + 1, rows, generator=generator) if lengths == "random" else lengths
        keywords["lengths"] = torch.as_tensor(drawn, dtype=torch.int64)
        beyond = torch.arange(T).unsqueeze(1) >= keywords["lengths"]
        beyond = beyond.T if batch_first else beyond
        inputs["x"].masked_fill_(beyond.unsqueeze(-1), math.nan)
    if resets is not None:
        keywords["resets"] = torch.rand(*leading, generator=generator) < resets
    return RecurrentCase(cell, options, inputs, cotangents, keywords)


LSTMCase = RecurrentCase


def lstm_case(
    T: int,
    B: int | None,
    I: int,  # noqa: E741
    H: int,
    **options: object,
) -> RecurrentCase:
    """:func:`recurrent_case` of an LSTM."""
    return recurrent_case("lstm", T, B, I, H, **options)
