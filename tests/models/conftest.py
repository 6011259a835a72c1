"""Pairs of reference and fast models with equal weights."""

from __future__ import annotations

import random
from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

from fastseq.testing import assert_close_to_reference

VOCAB, EMBEDDING, HIDDEN = 11, 5, 7


def _build(house: str, kind: str, sizes: tuple[int, int, int]) -> nn.Module:
    module = import_module(f"fastseq.{house}.{kind}")
    attention = (module.Attention(sizes[2]),) if hasattr(module, "Attention") else ()
    encoder = module.Encoder(*sizes)
    # Without dropout, so that calls can be compared with each other.
    return module.Seq2Seq(encoder, module.Decoder(*sizes, *attention)).eval()


@pytest.fixture
def make_pair() -> Callable[..., tuple[nn.Module, nn.Module]]:
    def make(
        kind: str,
        sizes: tuple[int, int, int] = (VOCAB, EMBEDDING, HIDDEN),
        dtype: torch.dtype = torch.float64,
    ) -> tuple[nn.Module, nn.Module]:
        """A reference and a fast model; weights wider than the default, so that tokens matter."""
        reference, fast = (
            _build(house, kind, sizes).to(dtype) for house in ("reference", "models")
        )
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.mul_(2.0)
        fast.load_state_dict(reference.state_dict())
        return reference, fast

    return make


# In float64 both sides are rounded alike, so sums stand for the budget. The gradients through a
# softmax cancel: over hundreds of draws of the sizes used here they needed up to 120 terms.
TERMS = 10_000


@pytest.fixture
def results() -> Callable[..., dict[str, Tensor | None]]:
    def run(
        model: nn.Module, cotangent: Tensor, *args: object, seed: int = 0
    ) -> dict[str, Tensor | None]:
        """Output and the gradients of all parameters."""
        random.seed(seed)
        model.zero_grad()
        output = model(*args)
        found = {"output": output.detach()}
        if output.requires_grad:
            output.backward(cotangent.to(output.dtype))
        return found | {f"grad {name}": p.grad for name, p in model.named_parameters()}

    return run


@pytest.fixture
def assert_same() -> Callable[[dict, dict], None]:
    def check(
        actual: dict[str, Tensor | None], expected: dict[str, Tensor | None], what: str = ""
    ) -> None:
        """Equal results in float64, but for rounding."""
        assert actual.keys() == expected.keys()
        for name, truth in expected.items():
            assert (actual[name] is None) == (truth is None), name
            if truth is not None:
                assert_close_to_reference(actual[name], truth, what=f"{what} {name}", terms=TERMS)

    return check
