"""The fused linear layer and cross entropy against torch's two: time and the peak of memory.

python -m benchmarks.bench_loss [--device cuda] [--rows 1,3] [--quick] [--output FOLDER]

Forward and backward, gradients of hidden, weight and bias. Memory is what a step takes at its
peak beyond what it started with: gradients it returns included, its inputs not.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.command import Row, command, milliseconds
from fastseq import functional
from fastseq.reference.loss import linear_cross_entropy as oracle
from fastseq.testing import assert_matches

COLUMNS = (
    "V H N dtype options status fastseq_ms torch_ms ratio fastseq_mib torch_mib memory_part"
).split()
# V, H, N rows: the encoder-decoders of the targets, Multi30k's model, a large vocabulary.
SIZES = [
    (10, 64, 320),
    (1000, 512, 960),
    (8000, 1024, 1280),
    (8000, 1792, 1280),
    (32000, 512, 1024),
]
# Rows the answer is checked on: several chunks of every size.
CHECKED = 1024
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIONS = {
    "": {},
    "padding, smoothing": {"ignore_index": 0, "label_smoothing": 0.1},
}


def plain(hidden: Tensor, weight: Tensor, bias: Tensor, target: Tensor, **options) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight, bias), target, **options)


def inputs(V: int, H: int, N: int, dtype: torch.dtype, device: str) -> tuple[dict, Tensor]:
    """Named tensors that get gradients, and a target of which a third is id 0."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    named = {"hidden": normal(N, H), "weight": normal(V, H) / H**0.5, "bias": normal(V) / 10}
    target = torch.randint(1, V, (N,), generator=generator)
    target[torch.rand(N, generator=generator) < 1 / 3] = 0
    return named, target.to(device)


def step(call: Callable, named: dict[str, Tensor], target: Tensor, options: dict) -> Callable:
    leaves = [t.clone().requires_grad_() for t in named.values()]
    return lambda: torch.autograd.grad(call(*leaves, target, **options), leaves)


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most bytes that lived at once while ``call`` ran, beyond those that did before."""
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda e: e.start_ns())
    return max(itertools.accumulate(e.nbytes() for e in events), default=0)


def verify(named: dict[str, Tensor], target: Tensor, options: dict) -> None:
    """Loss and gradients against float64, torch's own two operators being the yardstick."""

    def on_target(call: Callable) -> Callable:
        return lambda *tensors: call(*tensors, target, **options)

    ours, torchs = on_target(functional.linear_cross_entropy), on_target(plain)
    cotangent = [torch.ones_like(named["bias"][0])]
    assert_matches(ours, on_target(oracle), torchs, named, cotangent)


def rows(size: tuple[int, int, int], device: str, quick: bool) -> Iterator[Row]:
    V, H, N = size
    for dtype, said in itertools.product(["float32"] if quick else DTYPES, OPTIONS):

        def measure(seconds: float, dtype=dtype, options=OPTIONS[said]) -> dict[str, object]:
            named, target = inputs(V, H, N, DTYPES[dtype], device)
            sides = {"fastseq": functional.linear_cross_entropy, "torch": plain}
            some = {**named, "hidden": named["hidden"][:CHECKED]}
            verify(some, target[:CHECKED], options)
            calls = {name: step(call, named, target, options) for name, call in sides.items()}
            times = milliseconds(calls, device, seconds)
            held = {name: peak_bytes(call, device) / 2**20 for name, call in calls.items()}
            found = {f"{name}_ms": f"{ms:.4g}" for name, ms in times.items()}
            found |= {f"{name}_mib": f"{mib:.4g}" for name, mib in held.items()}
            found["ratio"] = f"{times['torch'] / times['fastseq']:.2f}"
            return found | {"memory_part": f"{held['fastseq'] / held['torch']:.2f}"}

        yield Row({"V": V, "H": H, "N": N, "dtype": dtype, "options": said}, measure)


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; 0 if every answer was right, 1 if one was wrong, 2 for bad arguments."""
    sizes = dict.fromkeys(("cpu", "cuda"), SIZES)
    return command("loss", __doc__.splitlines()[0], sizes, COLUMNS, rows, argv)


if __name__ == "__main__":
    sys.exit(main())
