"""Find the fastest tiles for the GPU at hand: prints what belongs into attention/tuned.py.

python -m fastseq.kernels.tune [--seconds 240]

Sizes are typical ones; what wins is used for every batch and length. Time is bounded: candidates
that come after it is up are not tried.
"""

from __future__ import annotations

import argparse
import itertools
import pprint
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from ._launch import forget
from .attention import kernel
from .attention.tuned import TUNED, tiles

__all__ = ["CANDIDATES", "candidates", "search"]

# What is varied around a stage's default; every combination is tried.
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "additive_fwd": dict(
        SUB_Q=(2, 4, 8), BLOCK_S=(16, 32, 64), BLOCK_K=(32, 64), BLOCK_C=(32, 64), num_warps=(4, 8)
    ),
    "additive_bwd": dict(
        BLOCK_S=(4, 8, 16), BLOCK_K=(64, 128, 256), num_warps=(1, 2), maxnreg=(168, 208, 255)
    ),
    "dot_fwd": dict(
        BLOCK_Q=(16, 32, 64), BLOCK_S=(32, 64), BLOCK_K=(32, 64), BLOCK_C=(32, 64), num_warps=(4, 8)
    ),
    "scores_bwd": dict(BLOCK_Q=(16, 32), BLOCK_S=(32, 64), BLOCK_C=(32, 64), num_warps=(4, 8)),
}
# With one query a row these are 1, whatever is tried.
_ONE = {"BLOCK_Q": 1, "SUB_Q": 1}
_SIZES = {False: (64, 40, 40, 512, 512), True: (64, 1, 200, 512, 512)}


def candidates(stage: str, single: bool, exact: bool) -> Iterator[dict[str, int]]:
    """Tiles to try: the default first, then every combination of ``CANDIDATES``."""
    default = tiles(stage, single, exact)
    yield default
    choices = CANDIDATES[stage]
    for values in itertools.product(*choices.values()):
        tried = default | dict(zip(choices, values, strict=True))
        if single:
            tried |= {name: one for name, one in _ONE.items() if name in tried}
        if tried != default:
            yield tried


def search(
    tried: Iterator[dict[str, int]], measure: Callable[[dict[str, int]], float], until: float
) -> tuple[dict[str, int], float]:
    """The candidate with the least ``measure``, among those begun before the clock says ``until``.

    The first is measured whatever the time. One that cannot run counts as slow.
    """
    best, least = None, float("inf")
    for config in tried:
        if best is not None and time.monotonic() > until:
            break
        try:
            seconds = measure(config)
        except Exception as error:
            print(f"  {config}: {type(error).__name__}")
            continue
        if best is None or seconds < least:
            best, least = config, seconds
    if best is None:
        raise RuntimeError("fastseq.kernels.tune: no candidate runs")
    return best, least


def _call(stage: str, single: bool, dtype: torch.dtype) -> Callable[[], object]:
    B, Q, S, K, C = _SIZES[single]

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=dtype)

    score = "dot" if stage in ("dot_fwd", "scores_bwd") else "additive"
    tensors = [normal(B, Q, K), normal(B, S, K), normal(B, S, C)]
    tensors += [normal(K), None] if score == "additive" else []
    if stage.endswith("_fwd"):
        return lambda: kernel(stage)(*tensors, None, None, 1.0)
    weights = torch.softmax(normal(B, Q, S), -1)
    cotangents = normal(B, Q, C), normal(B, Q, S)
    return lambda: kernel(f"{score}_bwd")(*cotangents, *tensors, None, weights, 1.0, True, False)


def _seconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    samples = []
    for _ in range(15):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        samples.append(begin.elapsed_time(end) * 1e-3)
    return statistics.median(samples)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastseq.kernels.tune")
    parser.add_argument("--seconds", type=float, default=240, help="time to spend in all")
    arguments = parser.parse_args(argv)
    name = torch.cuda.get_device_name()
    found = TUNED.setdefault(name, {})
    work = list(itertools.product(CANDIDATES, (False, True), (torch.float32, torch.bfloat16)))
    start = time.monotonic()
    for done, (stage, single, dtype) in enumerate(work, 1):
        call, key = _call(stage, single, dtype), (stage, single, dtype == torch.float32)

        def measure(config, key=key, call=call):
            found[key] = config
            forget()
            return _seconds(call)

        until = start + arguments.seconds * done / len(work)
        best, least = search(candidates(*key), measure, until)
        found[key] = best
        print(f"{key}: {least * 1e6:.0f} us", flush=True)
    print(pprint.pformat({name: found}, width=100))


if __name__ == "__main__":
    main()
