"""Compile every kernel for GPUs that are not here, and hold each to a budget.

python -m fastseq.kernels.aot [--target sm_90]

Needs triton and no GPU: the compilers for NVIDIA and AMD, and the tool that reads registers and
spills out of a binary, come with it. What there is to compile is not listed but asked for: the
launchers run on calls of every kind, and what they would have Triton compile is noted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

from . import _lang, _launch
from .attention import kernel, launch
from .attention.tuned import TUNED

__all__ = [
    "BUDGETS",
    "TARGETS",
    "Resources",
    "Variant",
    "asked_for",
    "calls",
    "resources",
    "variants",
]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a launcher sets of a compiler's options.
_OPTIONS = ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion")


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


# By kernel: what the defaults take, and a little room. Nothing may spill.
BUDGETS = {
    "additive_fwd": Resources(16 << 10, 144, 0),
    "additive_bwd": Resources(512, 208, 0),
    "dot_fwd": Resources(24 << 10, 168, 0),
    "scores_bwd": Resources(48 << 10, 168, 0),
    "merge": Resources(4 << 10, 64, 0),
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way a kernel is compiled: as Triton is asked to, with dictionaries as tuples of pairs."""

    kernel: object
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], object], ...]
    attributes: tuple[tuple[tuple[int, ...], str], ...]
    options: tuple[tuple[str, object], ...]
    target: str

    @property
    def stage(self) -> str:
        return self.kernel.__name__.removesuffix("_kernel")

    @property
    def named(self) -> dict[str, object]:
        """Constants by name."""
        names = [name for name, _ in self.signature]
        return {names[index]: value for (index,), value in self.constants}

    def __str__(self) -> str:
        types = dict(self.signature)
        first = next(iter(types))
        said = [self.target, self.stage, types["weights" if self.stage == "merge" else first][1:]]
        said += [types["d_scores"][1:]] if self.stage == "scores_bwd" else []
        said += [f"{name}={value}" for name, value in self.named.items() if value is not False]
        return " ".join([*said, "aligned" if any("16" in a for _, a in self.attributes) else "any"])

    def compiled(self) -> CompiledKernel:
        """Its machine code.

        Raises:
            RuntimeError: it does not compile.
        """
        attributes = {index: json.loads(said) for index, said in self.attributes}
        source = ASTSource(self.kernel, dict(self.signature), dict(self.constants), attributes)
        try:
            return triton.compile(source, target=TARGETS[self.target], options=dict(self.options))
        except Exception as error:
            raise RuntimeError(f"fastseq.kernels.aot: {self}: {error}") from error


class _Asked:
    """A driver for a target that is not there, for launches that come no further than asking."""

    def __init__(self, target: str) -> None:
        # What Triton keeps of a device must not be another target's.
        self.get_current_device = lambda: target
        self.get_current_stream = lambda device: 0
        self.get_current_target = lambda: TARGETS[target]


@contextlib.contextmanager
def asked_for(target: str, name: str = "", processors: int = 132) -> Iterator[set[Variant]]:
    """Within it, launches do nothing but note in a set what they would have Triton compile.

    Args:
        target: of ``TARGETS``, taken for the GPU at hand.
        name, processors: of the device, as tiles and the splitting of a source ask for them.
    """
    found: set[Variant] = set()

    def note(*, fn, compile, **_) -> bool:
        data = json.loads(compile["specialization_data"])
        options = [(o, data["options"][o]) for o in _OPTIONS if data["options"].get(o) is not None]
        found.add(
            Variant(
                fn.jit_function,
                tuple(compile["signature"].items()),
                tuple(compile["constants"].items()),
                tuple((index, json.dumps(said)) for index, said in compile["configs"][0].items()),
                tuple(options),
                target,
            )
        )
        return True

    runtime = triton.knobs.runtime
    before = (_lang.BACKEND, launch._device, runtime.jit_cache_hook, driver._active)
    _lang.BACKEND, launch._device = TARGETS[target].backend, lambda index: (name, processors)
    runtime.jit_cache_hook = note
    driver.set_active(_Asked(target))
    _launch.forget()
    try:
        yield found
    finally:
        _lang.BACKEND, launch._device, runtime.jit_cache_hook, active = before
        driver.set_active(active)
        _launch.forget()


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PRECISIONS = ("highest", "high", "medium")
# K and C: wide and narrow, aligned and not.
WIDTHS = (128, 48, 65, 5)
QUERIES = (2, 1)
# So many positions that the source goes in parts: a kernel more than where it does not.
_SOURCE = 300


def calls() -> Iterator[Callable[[], object]]:
    """A call, forward and backward, of each kind that the launchers tell apart."""
    S = _SOURCE
    for score, dtype, width, Q in itertools.product(("additive", "dot"), DTYPES, WIDTHS, QUERIES):
        query, keys = torch.zeros(1, Q, width, dtype=dtype), torch.zeros(1, S, width, dtype=dtype)
        weights = torch.zeros(1, Q, S, dtype=dtype)
        inputs = [query, keys, keys, *([query[0, 0], None] if score == "additive" else [])]

        def call(score=score, inputs=inputs, weights=weights) -> None:
            kernel(f"{score}_fwd")(*inputs, None, None, 1.0)
            cotangents = inputs[0], None
            kernel(f"{score}_bwd")(*cotangents, *inputs, None, weights, 1.0, True, False)

        yield call


def variants(target: str, devices: Sequence[str] | None = None) -> list[Variant]:
    """Everything a launcher can ask of Triton on ``target``, in every dtype and precision: with the
    default tiles and those of each device that is one; or with those of ``devices``."""
    found: dict[Variant, None] = {}
    before = torch.get_float32_matmul_precision()
    try:
        if devices is None:
            devices = ["", *(name for name, tuned in TUNED.items() if tuned.target == target)]
        for name, precision in itertools.product(devices, PRECISIONS):
            torch.set_float32_matmul_precision(precision)
            with asked_for(target, name) as asked:
                for call in calls():
                    call()
            found |= dict.fromkeys(sorted(asked, key=str))
    finally:
        torch.set_float32_matmul_precision(before)
    return list(found)


def resources(code: CompiledKernel) -> Resources:
    """What machine code takes."""
    if "amdgcn" in code.asm:
        registers, spills = _amd_usage(code.asm["amdgcn"])
    else:
        registers, spills = _nvidia_usage(code.asm["cubin"])
    return Resources(code.metadata.shared, registers, spills)


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
    parser.add_argument("--target", choices=TARGETS, action="append", help="all by default")
    arguments = parser.parse_args(argv)
    failed = 0
    for variant in itertools.chain.from_iterable(map(variants, arguments.target or TARGETS)):
        try:
            found = resources(variant.compiled())
        except RuntimeError as error:
            failed += 1
            print(error)
            continue
        budget = BUDGETS[variant.stage]
        verdict = "ok" if found.within(budget) else f"above {budget}"
        failed += not found.within(budget)
        print(
            f"{variant}: {found.shared} B, {found.registers} regs, "
            f"{found.spills} spilled: {verdict}",
            flush=True,
        )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
