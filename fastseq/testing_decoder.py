"""Random decoders with attention, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from fastseq.reference.rnn import CELLS

__all__ = ["DecoderCase", "decoder_case"]


@dataclass(frozen=True)
class DecoderCase:
    """A call of :func:`fastseq.functional.attention_decoder` with everything it needs.

    Attributes:
        inputs: tensors that have gradients, by name: x or embedding, h0, c0, keys, values,
            query_weight, v, combine_weight, combine_bias, feed, then the layers' params.
        options: what else the function takes.
        cotangents: one for features, each final state and the weights.
        names: of those outputs.
    """

    inputs: dict[str, Tensor]
    options: dict
    cotangents: list[Tensor]
    names: tuple[str, ...]
    said: str

    def __str__(self) -> str:
        return self.said

    @property
    def terms(self) -> int:
        """A bound on the length of the sums behind one element, over all steps."""
        widths = sum(t.shape[-1] for t in self.inputs.values())
        return max(1, self.cotangents[0].shape[0] * self.cotangents[0].shape[1] * widths)

    def to(self, dtype: torch.dtype) -> DecoderCase:
        """The same numbers in another dtype."""
        return replace(
            self,
            inputs={name: t.to(dtype) for name, t in self.inputs.items()},
            cotangents=[t.to(dtype) for t in self.cotangents],
        )

    def function(self, module: ModuleType, **more) -> Callable:
        """``module.attention_decoder`` as a function of ``inputs`` in order: features, states and
        weights. ``module`` is fastseq.functional or fastseq.reference.decoder."""

        def call(*tensors: Tensor):
            features, states, weights, _ = self.run(module, tensors, **more)
            return features, *states, weights

        return call

    def run(self, module: ModuleType, tensors=None, **more):
        """All that ``module.attention_decoder`` returns."""
        tensors = self.inputs.values() if tensors is None else tensors
        by_name = dict(zip(self.inputs, tensors, strict=True))
        options = dict(self.options) | more
        hx = tuple(by_name.pop(name) for name in ("h0", "c0") if name in by_name)
        x = by_name.pop("x", None)
        # The output layer follows the dtype of the call; it has no gradient.
        if options.get("output") is not None:
            options["output"] = tuple(t.to(hx[0].dtype) for t in options["output"])
        if "combine_weight" in by_name:
            options["combine"] = (by_name.pop("combine_weight"), by_name.pop("combine_bias", None))
        for name in ("query_weight", "v", "feed", "embedding"):
            options[name] = by_name.pop(name, None)
        keys, values = by_name.pop("keys"), by_name.pop("values")
        given = options.pop("tokens") if x is None else x
        options.pop("tokens", None)
        return module.attention_decoder(given, hx, keys, values, list(by_name.values()), **options)


def decoder_case(
    cell: str = "lstm",
    T: int = 4,
    B: int = 3,
    S: int = 5,
    E: int = 3,
    H: int = 6,
    K: int | None = 7,
    C: int = 4,
    *,
    A: int = 5,
    L: int = 1,
    V: int = 7,
    score: str = "additive",
    after: bool = False,
    feeds: bool = False,
    residual: bool = False,
    bias: bool = True,
    masked: bool = False,
    forced: tuple[bool, ...] | None = None,
    tokens: bool = False,
    scale: float = 0.7,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> DecoderCase:
    """Draw a decoder; ``K`` None: no query weight.

    Weights are drawn as torch's layers draw theirs, within 1/sqrt(H), inputs from a normal
    distribution. A masked case has a source that is attended nowhere, where there are two.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def weight(*shape: int) -> Tensor:
        bound = max(H, 1) ** -0.5
        return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1) * bound

    kind = CELLS[cell]
    width = H if K is None else K
    beside = C if not after else A if feeds else 0
    inputs = {"embedding": normal(V, E)} if tokens or forced else {"x": normal(B, T, E)}
    inputs |= {name: normal(L, B, H) for name in ("h0", "c0")[: kind.states]}
    inputs |= {"keys": normal(B, S, width), "values": normal(B, S, C)}
    if K is not None:
        inputs["query_weight"] = weight(K, H)
    if score == "additive":
        inputs["v"] = weight(width) * 3
    if after:
        inputs["combine_weight"] = weight(A, C + H)
        if bias:
            inputs["combine_bias"] = weight(A)
        if feeds:
            inputs["feed"] = normal(B, A)
    for i in range(L):
        inputs[f"weight_ih_l{i}"] = weight(kind.gates * H, H if i else E + beside)
        inputs[f"weight_hh_l{i}"] = weight(kind.gates * H, H)
        if bias:
            inputs[f"bias_ih_l{i}"] = weight(kind.gates * H)
            inputs[f"bias_hh_l{i}"] = weight(kind.gates * H)
    options = {
        "cell": cell, "has_biases": bias, "input_feeding": feeds, "residual": residual,
        "scale": scale, "mask": None, "tokens": None,
    }  # fmt: skip
    features = A if after else H + C
    if masked:
        options["mask"] = torch.rand(B, S, generator=generator) > 0.4
        options["mask"][1:2] = False
    if tokens or forced:
        options["tokens"] = torch.randint(V, (B, T), generator=generator)
    if forced:
        options["forced"] = forced
        options["output"] = (normal(V, features), normal(V))
    shapes = [(B, T, features), *[(L, B, H)] * kind.states, (B, T, S)]
    said = ", ".join(
        f"{name}={value}"
        for name, value in locals().items()
        if name in decoder_case.__annotations__ and name not in ("dtype", "return")
    )
    case = DecoderCase(
        inputs=inputs,
        options=options,
        cotangents=[normal(*shape) for shape in shapes],
        names=("features", "h_n", "c_n")[: 1 + kind.states] + ("weights",),
        said=f"decoder({said})",
    )
    return case.to(dtype)
