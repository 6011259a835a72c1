"""Compile every kernel for GPUs that are not here, and hold each to a budget.

python -m fastseq.kernels.aot [--quick] [--target sm_90]

Needs triton and no GPU: the compilers for NVIDIA and AMD, and the tool that reads registers and
spills out of a binary, come with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from ._lang import PRECISION, compiler_options
from .attention.additive_bwd import additive_bwd_kernel
from .attention.additive_fwd import additive_fwd_kernel
from .attention.dot_fwd import dot_fwd_kernel
from .attention.softmax import merge_kernel, scores_bwd_kernel
from .attention.tuned import tiles

__all__ = ["BUDGETS", "TARGETS", "Resources", "Variant", "compile_variant", "compiled", "variants"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

KERNELS = {
    "additive_fwd": additive_fwd_kernel,
    "additive_bwd": additive_bwd_kernel,
    "dot_fwd": dot_fwd_kernel,
    "scores_bwd": scores_bwd_kernel,
    "merge": merge_kernel,
}
_TYPES = {"f32": "*fp32", "f16": "*fp16", "bf16": "*bf16"}
# Tensors of a fixed type, whatever the call's.
_FIXED = {
    "mask": "*u8",
    "lengths": "*i64",
    "scores": "*fp32",
    "partial": "*fp32",
    "peaks": "*fp32",
    "d_p": "*fp32",
    "d_query": "*fp32",
    "d_v": "*fp32",
}
_STRIDED = re.compile(r"stride_[qkve][bqs]$|^[KC]$")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes: bytes of shared memory a program, registers a thread, bytes or
    registers spilled."""

    shared: int
    registers: int
    spills: int

    def within(self, budget: Resources) -> bool:
        return all(
            mine <= most
            for mine, most in zip(
                dataclasses.astuple(self), dataclasses.astuple(budget), strict=True
            )
        )


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way a kernel is compiled: ``absent`` names tensors that are None, ``narrow`` means widths
    that are small and odd, ``whole`` that a source is not split."""

    stage: str
    dtype: str
    single: bool = False
    absent: tuple[str, ...] = ()
    whole: bool = True
    precision: str = "highest"
    tanh: str = "rcp"
    narrow: bool = False

    def __str__(self) -> str:
        said = [self.stage, self.dtype, "one query" if self.single else "queries"]
        said += [f"no {name}" for name in self.absent]
        said += [] if self.whole else ["parts"]
        said += [] if self.precision == "highest" else [self.precision]
        said += [] if self.tanh == "rcp" else [f"{self.tanh} tanh"]
        return " ".join(said + ["narrow"] * self.narrow)

    def config(self, backend: str) -> dict[str, object]:
        """Constants and options, as the launcher would choose them for "cuda" or "hip"."""
        if self.stage == "merge":
            return tiles("merge", False, True) | {"LANES": 8}
        narrow = {"BLOCK_K": 32, "BLOCK_C": 32} if self.narrow else {}
        exact = self.dtype == "f32" and self.precision == "highest"
        chosen = tiles(self.stage, self.single, exact)
        return {name: narrow.get(name, value) for name, value in chosen.items()} | {
            "WHOLE": self.whole,
            "PRECISION": PRECISION[backend][self.precision],
            "UPCAST": False,
            # The other forms are instructions of NVIDIA's.
            "TANH": self.tanh if backend == "cuda" else "exact",
        }


# By stage: what the defaults take, and a little room. Nothing may spill.
BUDGETS = {
    "additive_fwd": Resources(16 << 10, 144, 0),
    "additive_bwd": Resources(512, 208, 0),
    "dot_fwd": Resources(24 << 10, 168, 0),
    "scores_bwd": Resources(48 << 10, 168, 0),
    "merge": Resources(4 << 10, 64, 0),
}


def variants(quick: bool = False) -> Iterator[Variant]:
    """Every combination a launcher can ask for, or enough to meet each option of each kernel."""
    if quick:
        yield Variant("additive_fwd", "f32", absent=("partial", "peaks"))
        yield Variant("additive_fwd", "bf16", True, ("extra", "mask", "lengths"), whole=False)
        yield Variant("additive_bwd", "f32")
        yield Variant("dot_fwd", "bf16", absent=("mask", "partial", "peaks"))
        yield Variant("dot_fwd", "f32", True, ("partial", "peaks"))
        yield Variant("scores_bwd", "f32", absent=("d_weights",))
        yield Variant("merge", "f32")
        yield Variant("additive_fwd", "f16", narrow=True, whole=False)
        return
    whole = {True: ("partial", "peaks"), False: ()}
    for dtype, single in itertools.product(_TYPES, (False, True)):
        precisions = tuple(PRECISION["cuda"]) if dtype == "f32" else ("highest",)
        for stage, precision, together in itertools.product(
            ("additive_fwd", "dot_fwd"), precisions, (True, False)
        ):
            options = (
                ("extra", "mask", "lengths") if stage == "additive_fwd" else ("mask", "lengths")
            )
            for absent in _subsets(options):
                fast = stage == "additive_fwd" and precision == "medium"
                tanh = "fast" if fast else "rcp"
                yield Variant(
                    stage, dtype, single, absent + whole[together], together, precision, tanh
                )
        for absent in _subsets(("extra", "lengths")):
            for tanh in ("rcp", "fast"):
                yield Variant("additive_bwd", dtype, single, absent, tanh=tanh)
        for precision, lost in itertools.product(precisions, ((), ("d_context",), ("d_weights",))):
            for absent in (lost, (*lost, "lengths")):
                yield Variant("scores_bwd", dtype, single, absent, precision=precision)
        for stage in ("additive_fwd", "dot_fwd", "additive_bwd", "scores_bwd"):
            yield Variant(stage, dtype, single, narrow=True, whole=False)
    for dtype, absent in itertools.product(_TYPES, ((), ("lengths",))):
        yield Variant("merge", dtype, absent=absent)


def _subsets(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    for size in range(len(names) + 1):
        yield from itertools.combinations(names, size)


def _source(variant: Variant, backend: str) -> tuple[ASTSource, dict[str, int]]:
    kernel = KERNELS[variant.stage]
    config = variant.config(backend)
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in variant.absent:
            signature[name], constants[name] = "constexpr", None
        elif name.isupper() and name in config:
            signature[name], constants[name] = "constexpr", config[name]
        elif name == "scale":
            signature[name] = "fp32"
        elif name in ("B", "Q", "S", "K", "C", "parts", "span") or name.startswith("stride"):
            signature[name] = "i32"
            # As a call with widths that are multiples of 16 is specialised.
            if _STRIDED.match(name) and not variant.narrow:
                attributes[index,] = [["tt.divisibility", 16]]
        else:
            signature[name] = _FIXED.get(name, _TYPES[variant.dtype])
            attributes[index,] = [["tt.divisibility", 16]]
    if variant.stage == "additive_bwd":
        signature["d_scores"] = "*fp32"
    options = {name: value for name, value in config.items() if name.islower()}
    return ASTSource(kernel, signature, constants, attributes), options


def compiled(variant: Variant, target: str) -> CompiledKernel:
    """``variant`` for a target of ``TARGETS``.

    Raises:
        RuntimeError: it does not compile.
    """
    backend = TARGETS[target].backend
    source, options = _source(variant, backend)
    try:
        options = compiler_options(options, backend)
        return triton.compile(source, target=TARGETS[target], options=options)
    except Exception as error:
        raise RuntimeError(f"fastseq.kernels.aot: {variant} for {target}: {error}") from error


def compile_variant(variant: Variant, target: str) -> Resources:
    """What :func:`compiled` of a variant takes."""
    kernel = compiled(variant, target)
    if "amdgcn" in kernel.asm:
        registers, spills = _amd_usage(kernel.asm["amdgcn"])
    else:
        registers, spills = _nvidia_usage(kernel.asm["cubin"])
    return Resources(kernel.metadata.shared, registers, spills)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    said = done.stdout + done.stderr
    registers = int(re.search(r"REG:(\d+)", said)[1])
    # What does not fit registers lives in the stack frame, in local memory.
    return registers, int(re.search(r"STACK:(\d+)", said)[1])


def _amd_usage(assembly: str) -> tuple[int, int]:
    def field(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    return field("vgpr_count"), field("vgpr_spill_count") + field("sgpr_spill_count")


def main(argv: list[str] | None = None) -> int:
    """Compile, print what each variant takes; 1 where one fails or exceeds its budget."""
    parser = argparse.ArgumentParser(
        prog="python -m fastseq.kernels.aot", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a few variants of each kernel")
    parser.add_argument("--target", choices=TARGETS, action="append", help="all by default")
    arguments = parser.parse_args(argv)
    failed = 0
    for variant, target in itertools.product(
        variants(arguments.quick), arguments.target or TARGETS
    ):
        budget = BUDGETS[variant.stage]
        try:
            found = compile_variant(variant, target)
        except RuntimeError as error:
            failed += 1
            print(error)
            continue
        verdict = "ok" if found.within(budget) else f"above {budget}"
        failed += not found.within(budget)
        print(
            f"{target} {variant}: {found.shared} B, {found.registers} regs, "
            f"{found.spills} spilled: {verdict}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
