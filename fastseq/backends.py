"""Which kernel runs a call, and why not another: one sentence, in explain() and in errors alike."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from contextvars import ContextVar

import torch
from torch import Tensor

from fastseq import _native

__all__ = ["Explanation", "lstm_obstacle", "use_backend"]

BACKENDS = ("auto", "cpu", "torch")
_forced: ContextVar[str] = ContextVar("fastseq_backend", default="auto")

_KERNEL_DTYPES = frozenset({torch.float32, torch.float64})
_FORCED_TORCH = "use_backend('torch') is in force"


@dataclasses.dataclass(frozen=True)
class Explanation:
    """What runs a call.

    Attributes:
        op: the operation, such as "lstm".
        backend: "cpu" (fastseq's kernels) or "torch" (PyTorch's own code).
        reason: one sentence.
    """

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"fastseq.{self.op}: {self.backend}: {self.reason}"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend of every call inside the block, in this thread or task.

    Functions compiled by torch.compile are not affected.

    Args:
        name: "auto" (a kernel where one serves, else PyTorch), "cpu" (fastseq's kernels or an
            error), "torch" (PyTorch's own code).

    Raises:
        ValueError: another name.
        RuntimeError: at a call that "cpu" can't serve; the text is that of :func:`fastseq.explain`.
    """
    if name not in BACKENDS:
        raise ValueError(f"fastseq.use_backend: expected one of {BACKENDS}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def lstm_obstacle(x: Tensor, params: Sequence[Tensor], proj_size: int = 0) -> str | None:
    """Why fastseq's LSTM kernel can't run on x [..., I] with these weights; None where it can.

    Raises:
        RuntimeError: it can't, and use_backend("cpu") is in force.
    """
    # A compiled graph is the same wherever it runs: no choice made around a call enters it.
    forced = "auto" if torch.compiler.is_compiling() else _forced.get()
    if forced == "torch":
        return _FORCED_TORCH
    obstacle = _lstm_obstacle(x, params, proj_size)
    if obstacle is not None and forced == "cpu":
        raise RuntimeError(
            f"fastseq.lstm: expected a call the cpu backend can run, got: {obstacle}"
        )
    return obstacle


def _lstm_obstacle(x: Tensor, params: Sequence[Tensor], proj_size: int) -> str | None:
    if not _native.loaded():
        return _native.why_not_loaded()
    if not x.is_cpu:
        return f"no kernel for {x.device.type} tensors yet"
    if x.dtype not in _KERNEL_DTYPES:
        return f"no kernel for {x.dtype} yet; float32 and float64 have one"
    if proj_size:
        return "no kernel for proj_size yet"
    # The op itself refuses weights that differ among themselves.
    if params[0].dtype is not x.dtype or not params[0].is_cpu:
        return "input and weights differ in dtype or device"
    if torch.compiler.is_compiling():
        return None
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on, and no kernel runs in its dtype yet"
    if torch._C._get_tracing_state() is not None:
        return "torch.jit.trace records torch's own operators"
    if torch.autograd.forward_ad._current_level >= 0:
        return "no forward-mode derivative yet"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "no rule for torch.func transforms yet"
    # Tensor subclasses and modes that only look, or make fakes, serve registered ops too.
    if x.layout is not torch.strided:
        return "not a dense tensor"
    return None


def lstm_explanation(x: Tensor, params: Sequence[Tensor], proj_size: int = 0) -> Explanation:
    """What :func:`lstm_obstacle` finds, in words."""
    obstacle = _FORCED_TORCH if _forced.get() == "torch" else None
    obstacle = obstacle or _lstm_obstacle(x, params, proj_size)
    if obstacle is not None:
        return Explanation("lstm", "torch", obstacle)
    return Explanation("lstm", "cpu", f"the {_native.isa()} kernel ({_native.isa_reason()})")
