"""Launches that are prepared once: what Triton's own launch looks up at every call is remembered.

Triton finds the compiled kernel anew each time, by a description of every argument. Here a call is
described by its input tensors alone, at least as finely as Triton does it; what follows from them
(tiles, grid, sizes, strides, buffers' shapes, the compiled kernel) is a *plan*, made once. A call
like the one before, as every step of a decoder's is, finds its plan by one comparison in C.
"""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable, Hashable, Sequence

import torch
import triton
from torch import Tensor
from torch._C._dynamo.guards import TensorGuards
from triton.runtime import driver

from . import float32_matmul_precision
from ._lang import on

__all__ = ["Kernel", "Launch", "addresses", "forget", "run_planned"]

# Arguments that may be anything, also where the rest is aligned: the sizes that change from call to
# call, and tensors whose rows have one of them.
UNALIGNED = frozenset(
    "B Q S parts span words stride_mb stride_mq mask lengths weights d_weights".split()
)
# Types of tensors that a call may do without; others have the type of its first.
_ABSENT = {
    "lengths": torch.int32,
    "mask": torch.uint8,
    "partial": torch.float32,
    "peaks": torch.float32,
}

# What kernels see them as.
_AS = {torch.bool: torch.uint8, torch.int64: torch.int32}

# More kinds of calls than a program makes; one whose shapes never repeat must not fill the memory.
MOST_PLANS = 4096
_plans: dict[Hashable, Callable] = {}
# By stage, the last call: alignment, precision, which inputs there are, a check of the rest, plan.
_latest: dict[str, tuple[list, str, Callable, Callable[..., bool], Callable]] = {}


def addresses(tensors: Sequence[Tensor | None]) -> list[int | None]:
    return [t if t is None else t.data_ptr() for t in tensors]


def run_planned(
    stage: str, make: Callable[[tuple], Callable], inputs: tuple[Tensor | None, ...], *rest: object
):
    """``plan(inputs, addresses(inputs), *rest)``, with the plan for calls of this kind.

    Args:
        stage: names what ``make`` plans.
        make: returns the plan for such inputs. It may depend on shapes, strides, dtypes, devices
            and alignment of the inputs and on the user's precision switch: Triton compiles by
            dtypes, by whether an address or a size is a multiple of 16, and by sizes that are 1.
        inputs: tensors, or None; of two at least, a tensor.
        rest: what no plan depends on.
    """
    # Half of what a launch costs the host is here: no function is called without need.
    where = [t if t is None else t.data_ptr() for t in inputs]
    # None where there is no tensor.
    alignment = [a and a & 15 for a in where]
    precision = float32_matmul_precision()
    latest = _latest.get(stage)
    if latest is not None and latest[0] == alignment and latest[1] == precision:
        _, _, present, same, plan = latest
        if same(*present(inputs)):
            return plan(inputs, where, *rest)
    plan = _found((stage, precision, *alignment), make, inputs)
    _latest[stage] = (alignment, precision, *_same_kind(inputs), plan)
    return plan(inputs, where, *rest)


def _found(key: tuple, make: Callable[[tuple], Callable], inputs: tuple) -> Callable:
    described = [(t.shape, t.stride(), t.dtype, t.device) for t in inputs if t is not None]
    key = (*key, *described)
    plan = _plans.get(key)
    if plan is None:
        plan = make(inputs)
        if len(_plans) >= MOST_PLANS:
            _plans.clear()
        _plans[key] = plan
    return plan


def _same_kind(inputs: tuple) -> tuple[Callable[[tuple], tuple], Callable[..., bool]]:
    """The tensors among inputs such as these, and whether they have these sizes, strides, dtypes
    and devices: what torch's compiler guards its graphs with."""
    at = [i for i, t in enumerate(inputs) if t is not None]
    present = operator.itemgetter(*at)
    guards = TensorGuards(*present(inputs), dynamic_dims_sizes=None, dynamic_dims_strides=None)
    return present, guards.check


def forget() -> None:
    """Drop every plan: tiles, or the device, have changed."""
    _plans.clear()
    _latest.clear()


def _watched() -> bool:
    """Whether someone, a profiler, is to be told of launches: Triton's own way does it."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


class Kernel:
    """A function of Triton's, jitted twice: ``kernel[False]`` for any tensors, ``kernel[True]`` for
    those whose addresses, widths and strides are all multiples of 16.

    Left to itself, Triton would compile anew for each combination of them.
    """

    def __init__(self, function: Callable) -> None:
        kinds = {
            name: str(p.annotation) for name, p in inspect.signature(function).parameters.items()
        }
        names = [name for name, kind in kinds.items() if "constexpr" not in kind]
        self._jitted = [
            triton.jit(function, do_not_specialize=free, do_not_specialize_on_alignment=free)
            for free in (names, sorted(UNALIGNED.intersection(names)))
        ]

    def __getitem__(self, aligned: bool):
        return self._jitted[aligned]


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
            kernel: of a :class:`Kernel`; its arguments are tensors, floats, sizes, strides,
                constants.
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
        self._launch = None

    def __call__(
        self,
        inputs: Sequence[Tensor | None],
        where: Sequence[int | None],
        buffers: Sequence[Tensor | None],
        *floats: float,
    ) -> None:
        """Run it on tensors of the kind it was prepared for: ``inputs``, which lie at
        the addresses ``where``, then ``buffers``."""
        if self._launch is None or _watched():
            self._by_triton((*inputs, *buffers), floats)
        elif self._current() == self._index:
            # Addresses rather than tensors: the driver need not be asked whose they are.
            more = [t if t is None else t.data_ptr() for t in buffers]
            self._launch(self._stream(self._index), (*where, *more, *floats, *self._rest))
        else:
            with on(self._device):
                self(inputs, where, buffers, *floats)

    def _by_triton(self, tensors, floats) -> None:
        tensors = self._present(tensors)
        with on(self._device):
            compiled = self._kernel[self._grid](*tensors, *floats, *self._integers, **self._options)
        if compiled is None:
            # The interpreter compiles nothing.
            return
        active = driver.active
        self._current, self._stream = active.get_current_device, active.get_current_stream
        self._launch = _launcher(compiled, self._grid, (*tensors, *floats, *self._rest))

    def _present(self, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Tensors that are None as empty ones, whose address is null; a mask as bytes, lengths as
        words."""
        first = next(t for t in tensors if t is not None)
        found = []
        for name, t in zip(self._kernel.arg_names, tensors, strict=False):
            if t is None:
                t = first.new_empty(0, dtype=_ABSENT.get(name, first.dtype))
            found.append(t.view(_AS[t.dtype]) if t.dtype in _AS else t)
        return found


def _launcher(compiled, grid: tuple, arguments: tuple) -> Callable[[object, tuple], object]:
    """How to launch ``compiled`` on a stream with arguments like these.

    Triton's launcher of a kernel finds out in Python what is the same each time, then calls one in
    C, with the kernel's arguments last, one by one or as one tuple: versions and backends differ.
    It is listened to once, and what it said is said again. Where it says neither, or has to find
    memory for each launch, it is called itself.
    """
    run = compiled.run
    rest = (compiled.function, compiled.packed_metadata, None, None, None)
    scratch = (getattr(run, f"{kind}_scratch_size", 0) for kind in ("global", "profile"))
    said, stream = [], object()
    if hasattr(run, "launch") and not any(scratch):
        listened = copy.copy(run)
        listened.launch = lambda *told: said.append(told)
        listened(*grid, stream, *rest, *arguments)
    for told in said:
        launch, at = run.launch, next(i for i, one in enumerate(told) if one is stream)
        front, last = told[:at], told[-1]
        if isinstance(last, tuple) and _same(last, arguments):
            back = told[at + 1 : -1]
            return lambda stream, arguments: launch(*front, stream, *back, arguments)
        if _same(told[-len(arguments) :], arguments):
            back = told[at + 1 : -len(arguments)]
            return lambda stream, arguments: launch(*front, stream, *back, *arguments)
    return lambda stream, arguments: run(*grid, stream, *rest, *arguments)


def _same(told: tuple, arguments: tuple) -> bool:
    return len(told) == len(arguments) and all(map(operator.is_, told, arguments))
