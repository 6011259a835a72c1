"""TF32: torch's switches for it on a GPU, and the yardstick for what ran under them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["TF32Products", "allow_tf32"]


@contextlib.contextmanager
def allow_tf32(allowed: bool) -> Iterator[None]:
    """Allow products and cuDNN's recurrent layers TF32 inside, or forbid it."""
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.rnn
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32" if allowed else "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision


# Products, and which argument is their first factor.
_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm: 0, _aten.bmm: 0, _aten.mv: 0, _aten.dot: 0,
    _aten.addmm: 1, _aten.baddbmm: 1, _aten.addmv: 1,
}  # fmt: skip
# Bits of a float32's fraction that TF32 does not have.
_LOST = 13


def cut(t: Tensor) -> Tensor:
    """A float32 less what TF32 does not hold."""
    return (t.view(torch.int32) >> _LOST << _LOST).view(torch.float32)


class TF32Products(TorchDispatchMode):
    """Inside, plain PyTorch in float32 errs as TF32 may make it: around the baseline of a budget
    for what ran where TF32 was allowed (``assert_matches(..., baseline_under=TF32Products)``).

    TF32 keeps 10 bits of a fraction, so that a factor of a product rounded to it errs by at most
    u = 2^-11 of itself, and by less than 2u where the bits are cut off; sums are float32. Devices
    do either: mma may be given rounded factors, wgmma cuts (PTX ISA, wgmma.mma_async). Here all
    factors are cut, forward and backward: as much as TF32 allows, and in the way that no sum
    averages out.

    Args:
        round_: what becomes of a factor.

    Raises:
        RuntimeError: on leaving, no product of float32 was met, so that nothing was changed.
    """

    def __init__(self, round_: Callable[[Tensor], Tensor] = cut) -> None:
        super().__init__()
        self.round_, self.met = round_, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        first = _PRODUCTS.get(func.overloadpacket)
        if first is not None and args[first].dtype == torch.float32:
            self.met += 1
            factors = map(self.round_, args[first : first + 2])
            args = (*args[:first], *factors, *args[first + 2 :])
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind, *rest):
        super().__exit__(kind, *rest)
        if kind is None and not self.met:
            raise RuntimeError("fastseq.testing: expected products of float32, met none")
