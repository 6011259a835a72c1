"""Seeded calls of the attention functions, for tests and benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["SCORES", "AttentionCase", "attention_case"]

SCORES = ("additive", "dot", "general", "concat", "location")


@dataclass(frozen=True)
class AttentionCase:
    """Arguments, tensors and cotangents of one call; build it with :func:`attention_case`.

    ``inputs`` holds the floating tensors under the names of the function's arguments, ``where``
    the rest of them.
    """

    score: str
    inputs: dict[str, Tensor]
    where: dict[str, object]
    cotangents: list[Tensor]
    names = ("context", "weights")

    def __str__(self) -> str:
        shapes = [f"{name}{list(t.shape)}" for name, t in self.inputs.items()]
        return f"{self.score} {' '.join(shapes)} {' '.join(self.where)}"

    @property
    def terms(self) -> int:
        """A bound on the length of the sums behind one element: all products of the call."""
        *rows, width = self.inputs["query"].shape
        S, C = self.inputs["values"].shape[1:]
        return max(1, math.prod(rows) * S * (width + C))

    def functional(self, module: object) -> Callable[..., object]:
        """A function of the inputs that calls the score's function in ``module``."""
        function = getattr(module, f"{self.score}_attention")

        def call(*tensors: Tensor) -> object:
            return function(**dict(zip(self.inputs, tensors, strict=True)), **self.where)

        return call

    def map(self, change: Callable[[Tensor], Tensor], *names: str) -> AttentionCase:
        """The same case with ``change`` applied to the named inputs (all, if none is named)."""
        chosen = names or tuple(self.inputs)
        changed = {n: change(t) if n in chosen else t for n, t in self.inputs.items()}
        return replace(self, inputs=changed)

    def to(self, target: torch.dtype | str) -> AttentionCase:
        """The same numbers in another dtype or on another device, cotangents too."""
        where = self.where
        if not isinstance(target, torch.dtype):
            where = {n: t.to(target) if isinstance(t, Tensor) else t for n, t in where.items()}
        moved = replace(self, where=where, cotangents=[c.to(target) for c in self.cotangents])
        return moved.map(lambda t: t.to(target))


def attention_case(
    score: str,
    B: int,
    Q: int | None,
    S: int,
    K: int,
    C: int = 5,
    *,
    H: int = 3,
    E: int = 4,
    extra: bool = False,
    bias: bool = False,
    g: bool = False,
    lengths: bool = False,
    mask: str | None = None,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> AttentionCase:
    """Draw one call: normal tensors, and places to attend to; on torch's default device, the
    numbers those of a CPU.

    Args:
        score: one of ``SCORES``.
        B, Q, S, K, C: rows, queries a row (None: a query without that dimension), source length,
            width of the score, width of the values.
        H, E: query and key width where the score projects them.
        extra, bias, g: whether the optional terms of the additive scores are there.
        lengths: whether lengths are given, drawn from 0..S; the first row's is 0.
        mask: None, "source" ([B, S]) or "query" ([B, Q, S]); a third of it is False, and all of
            the last row.
        scale: as in the function.
        dtype: drawn in float32 and converted, so that all dtypes see equal numbers.
        seed: of a private generator.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, spread: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device="cpu") * spread).to(dtype)

    queries = () if Q is None else (Q,)
    width, key_width = (H, E) if score in ("general", "concat") else (K, K)
    inputs = {
        "query": normal(B, *queries, width),
        "keys": normal(B, S, key_width),
        "values": normal(B, S, C),
    }
    if score == "general":
        inputs["weight"] = normal(H, E)
    if score == "concat":
        inputs["weight"] = normal(K, H + E)
    if score not in ("dot", "general"):
        # Scores of the order of 1, whatever K is.
        inputs["v"] = normal(K, spread=2.0 / math.sqrt(max(1, K)))
        if bias:
            inputs["bias"] = normal(K)
        if g:
            inputs["g"] = normal()
    if score in ("additive", "concat") and extra:
        inputs["extra"] = normal(B, S, K)
    if score == "location":
        inputs["previous"] = normal(B, 2, S).abs() if extra else normal(B, S).abs()
        inputs["filters"] = normal(3, 2 if extra else 1, 5)
        inputs["weight"] = normal(K, 3)
    where: dict[str, object] = {"scale": scale} if scale != 1.0 else {}
    if lengths:
        drawn = torch.randint(0, S + 1, (B,), generator=generator, device="cpu")
        drawn[:1] = 0
        where["lengths"] = drawn
    if mask is not None:
        rows = (B, *queries, S) if mask == "query" else (B, S)
        where["mask"] = torch.rand(rows, generator=generator, device="cpu") < 2 / 3
        where["mask"][-1:] = False
    cotangents = [normal(B, *queries, C), normal(B, *queries, S)]
    case = AttentionCase(score, inputs, where, cotangents)
    return case.to(str(torch.get_default_device()))
