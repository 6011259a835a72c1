"""Where tests run the Triton attention kernels: on a GPU, or by Triton's interpreter.

Under TRITON_INTERPRET=1, in a process of its own, what would run on a GPU runs on CPU tensors. The
interpreter shows no race and no bank conflict, and multiplies bfloat16 tiles in float32.
"""

from __future__ import annotations

import contextlib
import os
import sys

import numpy as np
import pytest
import triton.language as tl
from fastseq.kernels import _lang, _launch, attention
from fastseq.kernels.attention import launch

from fastseq.ops import attention_plain

__all__ = ["DEVICE", "INTERPRETED", "ONCE", "instructions_off_by", "no_call", "processors"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"


def _interpreted(stage):
    plain, first = getattr(attention_plain, stage), 0 if stage.endswith("fwd") else 2

    def call(*arguments):
        obstacle = attention.obstacle(*arguments[first : first + 3])
        return (plain if obstacle else attention.kernel(stage))(*arguments)

    return call


def _patch_once_a_launch():
    """Triton's interpreter patches its language anew at each call of a device function, which takes
    half of all time; once a launch and module does."""
    from triton.runtime import interpreter

    patch, execute = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done = set()

    def once(function):
        module = id(function.__globals__)
        if module not in done:
            done.add(module)
            return patch(function)

    def launch(*arguments, **options):
        done.clear()
        return execute(*arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launch


# Units in the last place that results of ex2 and rcp are off by, in the interpreter.
_off = {"ex2": 0, "rcp": 0}


@contextlib.contextmanager
def instructions_off_by(ex2: int, rcp: int):
    """Let the interpreter's special-function instructions be wrong by so many units in the last
    place. On a GPU they are what they are: nothing is done."""
    _off.update(ex2=ex2, rcp=rcp)
    yield
    _off.update(ex2=0, rcp=0)


def _moved(name, values):
    towards = values.dtype.type(np.copysign(np.inf, _off[name]))
    moved = values
    for _ in range(abs(_off[name])):
        moved = np.nextafter(moved, towards)
    # Zero, one and infinity come out as they are.
    return np.where((values == 0) | (values == 1) | np.isinf(values), values, moved)


def _have_instructions():
    """exp2 and NVIDIA's special-function instructions: ex2 and rcp correctly rounded but for what
    they are to be off by, tanh off by as much as it may be."""
    from triton.runtime import interpreter

    def create_exp2(arg):
        exact = np.exp2(arg.data.astype(np.float64))
        return interpreter.TensorHandle(_moved("ex2", exact.astype(arg.data.dtype)), arg.dtype)

    def inline_asm_elementwise(asm, constraints, args, dtype, **_):
        (x,) = args
        if asm.startswith("rcp.approx.ftz.f32"):
            found = _moved("rcp", 1 / x.handle.data)
        else:
            assert asm.startswith("tanh.approx.f32"), asm
            found = np.tanh(x.handle.data.astype(np.float64)) * (1 + 2.0**-11)
        return tl.tensor(interpreter.TensorHandle(found.astype(np.float32), dtype), x.type)

    interpreter.interpreter_builder.create_exp2 = create_exp2
    tl.inline_asm_elementwise = inline_asm_elementwise


if INTERPRETED:
    assert _lang.INTERPRET and "fastseq.ops.attention" not in sys.modules
    _patch_once_a_launch()
    _have_instructions()
    attention.why_not_available = lambda: None
    # Before the operators are registered.
    for _stage in attention.STAGES:
        setattr(attention_plain, _stage, _interpreted(_stage))


@pytest.fixture(params=[0, 64], ids=["whole", "parts"], autouse=True)
def processors(request, monkeypatch):
    """Multiprocessors there seem to be: with many, a source is split into parts. (The interpreter
    then runs what NVIDIA's compiler would be given, else what AMD's.) And no call of an operator is
    left to plain PyTorch."""
    name, _ = launch._device(-1 if INTERPRETED else 0)
    monkeypatch.setattr(launch, "_device", lambda index: (name, request.param))
    monkeypatch.setattr(launch, "_LEAST_CLOCKS", 1)
    if INTERPRETED and request.param:
        monkeypatch.setattr(_lang, "BACKEND", "cuda")
    ask, answers = attention.obstacle, []

    def obstacle(*tensors):
        answers.append(ask(*tensors))
        return answers[-1]

    monkeypatch.setattr(attention, "obstacle", obstacle)
    # Plans know how many there were.
    _launch.forget()
    yield request.param
    _launch.forget()
    assert not any(answers), answers
    assert answers or hasattr(request.function, "calls_no_operator")


def no_call(test):
    """A test that calls none of the operators."""
    test.calls_no_operator = True
    return test


# Where parts make no difference.
ONCE = pytest.mark.parametrize("processors", [pytest.param(64, id="parts")], indirect=True)
