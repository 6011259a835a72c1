"""Launches that are prepared once: what Triton's own launch looks up at every call is remembered.

Triton finds the compiled kernel anew each time, by a description of every argument. Here a call is
described by its input tensors alone, at least as finely as Triton does it; what follows from them
(tiles, grid, sizes, strides, buffers' shapes, the compiled kernel) is a *plan*, made once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
import triton
from torch import Tensor
from triton.runtime import driver

from ._lang import on

__all__ = ["Launch", "described", "forget", "planned"]

# More kinds of calls than a program makes; one whose shapes never repeat must not fill the memory.
MOST_PLANS = 4096
_plans: dict[Hashable, Callable] = {}


def described(tensors: Sequence[Tensor | None]) -> tuple:
    """All a plan may depend on: shapes, strides, dtypes, devices and alignment of the inputs.

    Triton compiles by dtypes, by whether a pointer or a size is a multiple of 16, and by sizes
    that are 1; a plan holds for exactly these sizes.
    """
    return tuple(
        [
            t
            if t is None
            else (
                # Of a dense tensor strides follow, as far as they matter.
                t.shape if t.is_contiguous() else (t.shape, t.stride()),
                t.dtype,
                t.get_device(),
                t.data_ptr() & 15,
            )
            for t in tensors
        ]
    )


def planned(key: Hashable, make: Callable[[], Callable]) -> Callable:
    """The plan for calls of this description."""
    plan = _plans.get(key)
    if plan is None:
        plan = make()
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def forget() -> None:
    """Drop every plan: tiles, or the device, have changed."""
    _plans.clear()


def _watched() -> bool:
    """Whether someone, a profiler, is to be told of launches: Triton's own way does it."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


class Launch:
    """A kernel with everything settled but its pointers and its floating-point arguments.

    The first launch goes through Triton, which compiles; later ones call what it compiled.
    """

    def __init__(
        self,
        kernel,
        device: torch.device,
        programs: int,
        sizes: Sequence[int],
        strided: Sequence[Tensor | None] = (),
        **options: object,
    ) -> None:
        """Prepare a launch.

        Args:
            kernel: jitted; its arguments are tensors, floats, sizes, strides, constants.
            device: where.
            programs: how many.
            sizes, strided: the integers: sizes, and tensors whose two outer strides follow.
            options: constants and compiler options, by name.
        """
        strides = [stride for t in strided for stride in ((0, 0) if t is None else t.stride()[:2])]
        self._kernel, self._device, self._options = kernel, device, options
        self._grid, self._integers = (programs, 1, 1), (*sizes, *strides)
        constants = [options[name] for name in kernel.arg_names if name in options]
        self._rest = (*self._integers, *constants)
        self._index = device.index or 0
        self._compiled = None

    def __call__(self, tensors: Sequence[Tensor | None], *floats: float) -> None:
        """Run it on tensors that are described as those it was prepared for."""
        if self._compiled is None or _watched():
            self._by_triton(tensors, floats)
        elif self._current() == self._index:
            self._directly(tensors, floats)
        else:
            with on(self._device):
                self._directly(tensors, floats)

    def _by_triton(self, tensors, floats) -> None:
        with on(self._device):
            compiled = self._kernel[self._grid](*tensors, *floats, *self._integers, **self._options)
        if compiled is None:
            # The interpreter compiles nothing.
            return
        active = driver.active
        self._current, self._stream = active.get_current_device, active.get_current_stream
        # A copy: the kernel loads its function and its launcher when first asked to run.
        self._run, self._function = compiled.run, compiled.function
        self._packed, self._compiled = compiled.packed_metadata, compiled

    def _directly(self, tensors, floats) -> None:
        # Addresses rather than tensors: the driver need not be asked whose they are.
        self._run(
            *self._grid,
            self._stream(self._index),
            self._function,
            self._packed,
            None,
            None,
            None,
            *[None if t is None else t.data_ptr() for t in tensors],
            *floats,
            *self._rest,
        )
