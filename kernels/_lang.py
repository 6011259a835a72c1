"""What several kernels share: device functions, and how launchers prepare a call."""

from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from . import float32_matmul_precision

__all__ = [
    "BACKEND",
    "INTERPRET",
    "PRECISION",
    "attended",
    "blocks",
    "compiler_options",
    "given",
    "offset",
    "on",
    "power_of_two",
    "precision",
    "tanh",
    "until",
    "upcast",
    "which_tanh",
]

# Triton's own test of the variable; its interpreter runs kernels on CPU tensors, with numpy.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# torch's float32 matmul precision -> Triton's for the products of float32 tiles.
PRECISION = {
    "cuda": {"highest": "ieee", "high": "tf32x3", "medium": "tf32"},
    "hip": {"highest": "ieee", "high": "bf16x3", "medium": "bf16x3"},
    # Of AMD's the one that has TF32: for others Triton refuses to compile it.
    "gfx942": {"highest": "ieee", "high": "bf16x3", "medium": "tf32"},
}
# What compiles a kernel; "" for nothing, under the interpreter.
BACKEND = "" if INTERPRET else "hip" if torch.version.hip else "cuda"


@triton.jit
def offset(i, stride):
    """i * stride in 64 bits: a tensor may have more than 2^31 elements."""
    return tl.cast(i, tl.int64) * stride


@triton.jit
def given(p):
    """Whether there is a tensor at ``p``: one that a call does without is a null pointer, as a
    constant None would double the number of kernels."""
    return tl.cast(p, tl.int64) != 0


@triton.jit
def until(lengths, words, i_b, end):
    """Where row i_b stops: at its length, if it has one, or at ``end``.

    A length is ``words`` words of 32 bits, the low one first: so lengths of int32 and of int64 are
    one type, and neither is converted first.
    """
    there = given(lengths)
    p_length = lengths + offset(i_b, words)
    low = tl.load(p_length, mask=there, other=end)
    high = tl.load(p_length + 1, mask=there & (words == 2), other=low >> 31)
    length = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
    return tl.minimum(length, end).to(tl.int32)


@triton.jit
def tanh(x, TANH: tl.constexpr):
    """tanh of float32; TANH: "exact" (to 4 units in the last place), "rcp" or "fast".

    Far from zero sign(x) (1 - 2 / (1 + e^2|x|)), which near zero loses all digits: there it is
    x + x^3 P(x^2), P fitted on |x| < 0.4 to a relative error of 1.2e-7. "rcp" is the same with
    NVIDIA's reciprocal for the division, which guards against a range that 1 + e^2|x| never has:
    two special-function instructions and 13 others. "fast" is one instruction, within 2^-11.
    """
    if TANH == "fast":
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    y = x * x
    p = (-0.04779421 * y + 0.13277629) * y - 0.33331882
    near = x * y * p + x
    d = 1.0 + tl.exp2(tl.abs(x) * 2.885390081777927)
    if TANH == "rcp":
        r = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [d], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        r = 1.0 / d
    far = (1.0 - 2.0 * r).to(tl.int32, bitcast=True)
    sign = x.to(tl.int32, bitcast=True) & -2147483648
    return tl.where(tl.abs(x) < 0.4, near, (far | sign).to(tl.float32, bitcast=True))


@triton.jit
def attended(mask, o_mask, length, o_s, rows):
    """Which of the positions o_s [S] a block of rows [Q, 1] may look at: [Q, S].

    mask: bytes, or null; o_mask: its offsets [Q, S]; length: positions that count.
    """
    here = rows & (o_s < length)[None, :]
    asked = here & (o_s < tl.where(given(mask), length, 0))[None, :]
    return here & (tl.load(mask + o_mask, mask=asked, other=1) != 0)


def upcast(dtype: torch.dtype) -> bool:
    """Whether tiles of ``dtype`` are multiplied in float32: the interpreter has no bfloat16."""
    return INTERPRET and dtype == torch.bfloat16


def precision() -> str:
    """The user's own switch of float32 products in Triton's words."""
    if not BACKEND:
        return "ieee"
    chip = driver.active.get_current_target().arch if BACKEND == "hip" else BACKEND
    return PRECISION.get(chip, PRECISION[BACKEND])[float32_matmul_precision()]


def which_tanh() -> str:
    """The form of :func:`tanh`: "fast" only where matmul precision "medium" asks for speed.

    Its relative error is below 2^-11, that of the bfloat16 products of the same switch 2^-9.
    """
    if BACKEND != "cuda":
        return "exact"
    return "fast" if float32_matmul_precision() == "medium" else "rcp"


def blocks(n: int, block: int) -> int:
    """How many blocks hold ``n``: triton.cdiv, which costs the host a microsecond and more."""
    return -(-n // block)


def compiler_options(config: dict[str, int]) -> dict[str, int]:
    """``config`` as the compiler for NVIDIA or AMD, or the interpreter, takes it."""
    if BACKEND != "cuda":
        # NVIDIA's assembler would rather spill than lose a program a multiprocessor; AMD's has no
        # such option.
        config = {name: value for name, value in config.items() if name != "maxnreg"}
    # A product followed by a sum is rounded once: Triton's own default has changed.
    return config | {"enable_fp_fusion": True} if BACKEND else config


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Make ``device`` current: a launch goes to the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def power_of_two(n: int, least: int, most: int) -> int:
    """The smallest power of two that holds ``n``, between two others."""
    return max(least, min(most, triton.next_power_of_2(n)))
