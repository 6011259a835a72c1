"""What a measurement calls: the two modules, their inputs, and the check of their answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from benchmarks.shapes import Measurement
from fastseq import nn
from fastseq.testing import (
    LOWERED,
    RecurrentCase,
    assert_close_to_reference,
    assert_lowered_close,
    assert_matches,
    recurrent_case,
    run_with_grads,
)

__all__ = ["Subject", "class_name", "subject", "verify", "verify_results"]

_CLASSES = {"lstm": "LSTM", "gru": "GRU", "rnn_tanh": "RNN"}


@dataclass(frozen=True)
class Subject:
    """A case, and what a module is called with beyond x."""

    case: RecurrentCase
    module: Callable[[str], torch.nn.Module]  # "fastseq" or "torch" to a module of its own
    tokens: int

    def step(self, call: Callable[..., object], mode: str) -> Callable[[], object]:
        """What one sample runs: forward without a graph, or forward and backward."""
        x = self.case.inputs["x"].clone()
        batch_sizes = self.case.keywords.get("batch_sizes")
        is_cell = "h0" in self.case.inputs
        states = [self.case.inputs[n][0].clone() for n in ("h0", "c0") if n in self.case.inputs]
        cotangent = self.case.cotangents[0]
        if is_cell:
            x, cotangent = x[0].clone(), cotangent[0]

        def forward() -> Tensor:
            if is_cell:
                out = call(x, tuple(states) if len(states) == 2 else states[0])
                return out[0] if len(states) == 2 else out
            rows = x if batch_sizes is None else PackedSequence(x, batch_sizes)
            y = call(rows)[0]
            return y if batch_sizes is None else y.data

        if mode == "inf":

            def infer() -> object:
                with torch.no_grad():
                    return forward()

            return infer
        leaves = [x.requires_grad_(), *(s.requires_grad_() for s in states), *call.parameters()]
        return lambda: torch.autograd.grad(forward(), leaves, cotangent)


def class_name(m: Measurement) -> str:
    """Of the module, in torch.nn and in fastseq.nn."""
    return _CLASSES[m.cell] + ("Cell" if m.group == "cells" else "")


def _lengths(m: Measurement) -> list[int] | None:
    """Random from 1 to T, one of them T; or, to fill just half, evenly spaced."""
    T, B = m.sizes[:2]
    if m.group != "packed" or m.variant == "long":
        return None
    if m.variant == "half full":
        return [max(1, round(T * i / (B - 1))) for i in range(B)]
    generator = torch.Generator().manual_seed(0)
    return [T, *torch.randint(1, T + 1, (B - 1,), generator=generator).tolist()]


def subject(m: Measurement, *, padded: bool = False, T: int | None = None) -> Subject:
    """The subject of a measurement, or with ``padded`` or another ``T`` what it is held against."""
    lengths = None if padded else _lengths(m)
    sizes = (T or m.sizes[0], *m.sizes[1:])
    dtype = getattr(torch, m.dtype)
    hx = m.group == "cells"
    case = recurrent_case(m.cell, *sizes, hx=hx, lengths=lengths, dtype=dtype, **m.options)
    case = case.packed() if lengths else case
    tokens = sum(lengths) if lengths else sizes[0] * sizes[1]

    def module(side: str) -> torch.nn.Module:
        cls = getattr(nn if side == "fastseq" else torch.nn, class_name(m))
        if m.group != "cells":
            return case.build(cls)
        built = cls(*sizes[2:])
        with torch.no_grad():
            for name, parameter in built.named_parameters():
                parameter.copy_(case.inputs[f"{name}_l0"])
        return built

    return Subject(case, module, tokens)


def _cell_function(case: RecurrentCase, module: torch.nn.Module) -> Callable[..., object]:
    """A cell as the layer of one step that it is."""

    def call(*tensors: Tensor) -> object:
        values = dict(zip(case.inputs, tensors, strict=True))
        x = values.pop("x")[0]
        given = [values.pop(name)[0] for name in ("h0", "c0") if name in values]
        weights = {name.removesuffix("_l0"): t for name, t in values.items()}
        hx = tuple(given) if len(given) == 2 else given[0]
        out = torch.func.functional_call(module, weights, (x, hx))
        states = [t.unsqueeze(0) for t in (out if isinstance(out, tuple) else (out,))]
        return (states[0], *states)

    return call


def verify(m: Measurement, tested: Subject | None = None) -> None:
    """Raise AssertionError unless every output and gradient keeps the error budget.

    Args:
        m: whose modules run, torch's switch of precision standing as it says.
        tested: on what; by default the measurement's own subject.
    """
    tested = tested or subject(m)
    case = tested.case
    if m.group == "cells":
        sides = [_cell_function(case, tested.module(side)) for side in ("fastseq", "torch")]
    else:
        sides = [case.module(getattr(home, class_name(m))) for home in (nn, torch.nn)]
    what = f"{m.group} {case}"
    if m.precision in LOWERED:
        exact = case.to(torch.float64)
        truth = run_with_grads(exact.reference(), exact.inputs, exact.cotangents, names=case.names)
        found = run_with_grads(sides[0], case.inputs, case.cotangents, names=case.names)
        assert_lowered_close(found, truth, m.precision, what=what)
        return
    assert_matches(
        sides[0],
        case.reference(),
        sides[1],
        case.inputs,
        case.cotangents,
        names=case.names,
        what=what,
    )


def verify_results(name: str, results: object, tested: Subject, mode: str) -> None:
    """Raise AssertionError unless what a step of ``mode`` returned is right.

    A baseline set up wrongly would flatter us; its own rounding is not our concern.
    """
    exact = tested.case.to(torch.float64)
    leaves = [t.clone().requires_grad_(mode == "train") for t in exact.inputs.values()]
    truth = [exact.reference()(*leaves)[0]]
    if mode == "train":
        truth = torch.autograd.grad(truth[0], leaves, exact.cotangents[0])
    found = results if mode == "train" else [results]
    what = ("y",) if mode == "inf" else tuple(f"d{key}" for key in exact.inputs)
    for key, got, expected in zip(what, found, truth, strict=True):
        terms = max(got.numel(), tested.tokens)
        # A cell's tensors lack the step.
        assert_close_to_reference(got, expected.view_as(got), what=f"{name} {key}", terms=terms)
