"""What torch.jit.script gets, which compiles Python's text and knows no kernels.

A module's ``__prepare_scriptable__`` is torch's hook for this. Where it returns another module,
torch.jit.script puts that in the place of the first in whatever model holds it.
"""

from __future__ import annotations

import torch

__all__ = ["refusal", "torchs_twin"]


def torchs_twin(module: torch.nn.Module) -> torch.nn.Module:
    """Torch's own module with the same parameters, for a subclass of it."""
    cls = next(base for base in type(module).__mro__ if base.__module__.startswith("torch.nn."))
    twin = cls.__new__(cls)
    vars(twin).update(vars(module))
    return twin


def refusal(module: torch.nn.Module) -> NotImplementedError:
    """What to use instead, where torch has no such module."""
    return NotImplementedError(
        f"fastseq.nn.{type(module).__name__}: torch.jit.script can't express it; use "
        "torch.jit.trace, torch.export or torch.compile"
    )
