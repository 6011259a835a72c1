"""``fastseq::forced_steps``: the coins of teacher forcing, as an operator that graphs can hold.

Source: Bengio, Vinyals, Jaitly and Shazeer 2015, "Scheduled Sampling for Sequence Prediction with
Recurrent Neural Networks".
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

__all__ = ["draw", "forced_steps"]


def draw(steps: int, ratio: float | Tensor) -> list[bool]:
    """Of each of ``steps`` steps of a decoder, whether it is fed the target's token.

    The first is. One number is drawn from Python's ``random`` after each step, also after the last,
    where it decides nothing.
    """
    drawn = [bool(random.random() < ratio) for _ in range(steps)]
    return [True, *drawn[:-1]] if drawn else []


# Drawn at every run: neither folded nor merged with its like, nor made again for the backward pass.
# The ratio is a tensor, as a graph would be compiled anew for every float.
_library = torch.library.Library("fastseq", "FRAGMENT")
_library.define(
    "forced_steps(SymInt steps, Tensor ratio) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,)
)
_library.impl(
    "forced_steps",
    lambda steps, ratio: torch.tensor(draw(steps, float(ratio)), dtype=torch.bool, device="cpu"),
    "CompositeExplicitAutograd",
)
torch.library.register_fake(
    "fastseq::forced_steps", lambda steps, ratio: torch.empty(steps, dtype=torch.bool, device="cpu")
)
forced_steps = torch.ops.fastseq.forced_steps.default
"""(steps, ratio [], float64) -> what :func:`draw` gives, bool [steps] on the CPU."""
