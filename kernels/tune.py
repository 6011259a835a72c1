"""Find the fastest tiles for the GPU at hand and write them to attention/tuned.json.

python -m fastseq.kernels.tune [--seconds 240] [--output FILE]

Sizes are typical ones; what wins is used for every batch and length. Time is bounded: candidates
that come after it is up are not tried. A candidate has to keep the budgets of aot.py, and one that
wins keeps them in every dtype and precision, as `make test` asks of it; and to give the default's
results.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from fastseq._files import atomic_write

from . import _lang, aot
from .attention import kernel
from .attention.tuned import PATH, TUNED, Tuned, tiles, written

__all__ = ["CANDIDATES", "candidates", "search", "too_much", "too_much_elsewhere"]

# What is varied around a stage's default; every combination is tried.
CANDIDATES: dict[str, dict[str, tuple[int, ...]]] = {
    "additive_fwd": dict(
        SUB_Q=(2, 4, 8), BLOCK_S=(16, 32, 64), BLOCK_K=(32, 64), BLOCK_C=(32, 64), num_warps=(4, 8)
    ),
    "additive_bwd": dict(
        BLOCK_S=(4, 8, 16), BLOCK_K=(64, 128, 256), num_warps=(1, 2), maxnreg=(128, 168, 208)
    ),
    "dot_fwd": dict(
        BLOCK_Q=(16, 32, 64), BLOCK_S=(32, 64), BLOCK_K=(32, 64), BLOCK_C=(32, 64), num_warps=(4, 8)
    ),
    "scores_bwd": dict(BLOCK_Q=(16, 32), BLOCK_S=(32, 64), BLOCK_C=(32, 64), num_warps=(4, 8)),
}
# With one query a row these are 1, whatever is tried.
_ONE = {"BLOCK_Q": 1, "SUB_Q": 1}
_SIZES = {False: (64, 40, 40, 512, 512), True: (64, 1, 200, 512, 512)}


def candidates(stage: str, single: bool, exact: bool) -> list[dict[str, int]]:
    """Tiles to try: the default, then every combination of ``CANDIDATES`` that asks for no more
    registers than the budget has, those that change least of the default first."""
    default = tiles(stage, single, exact, circumstances=[_lang.BACKEND])
    choices, found = CANDIDATES[stage], [default]
    for values in itertools.product(*choices.values()):
        tried = default | dict(zip(choices, values, strict=True))
        if single:
            tried |= {name: one for name, one in _ONE.items() if name in tried}
        if tried not in found and tried.get("maxnreg", 0) <= aot.BUDGETS[stage].registers:
            found.append(tried)
    return sorted(found, key=lambda tried: len(tried.items() - default.items()))


def too_much(stage: str, call: Callable[[], object], target: str, device: str = "") -> str | None:
    """What ``call`` would have compiled of a stage that is above its budget, in words.

    Args:
        target: of aot.TARGETS.
        device: whose tiles count.
    """
    with aot.asked_for(target, device) as asked:
        call()
    return _above(stage, asked)


def too_much_elsewhere(stage: str, config: dict[str, int], target: str, device: str) -> str | None:
    """The same of any call that ``config`` serves, in whichever dtype and precision, once it is
    among the tiles of ``device``: what ``make test`` will ask of a winner."""
    wanted = _lang.compiler_options(config).items()
    served = aot.variants(target, [device])
    return _above(stage, [v for v in served if wanted <= {**v.named, **dict(v.options)}.items()])


def _above(stage: str, asked: Iterable[aot.Variant]) -> str | None:
    for variant in asked:
        if variant.stage == stage:
            takes = aot.resources(variant.compiled())
            if not takes.within(aot.BUDGETS[stage]):
                return f"{variant}: {takes} is above the budget"
    return None


def search(
    tried: Iterable[dict[str, int]],
    measure: Callable[[dict[str, int]], float],
    until: float,
    against: Callable[[dict[str, int]], str | None] = lambda config: None,
) -> tuple[dict[str, int] | None, float]:
    """The candidate with the least ``measure``, among those begun before the clock says ``until``;
    None if none of them runs.

    The first is measured whatever the time. against: what speaks against one that is the best so
    far.
    """
    best, least = None, float("inf")
    for at, config in enumerate(tried):
        if at and time.monotonic() > until:
            break
        try:
            seconds = measure(config)
        except Exception as error:
            print(f"  {config}: {type(error).__name__}: {str(error)[:200]}")
            continue
        if best is None or seconds < least:
            reason = against(config)
            if reason is None:
                best, least = config, seconds
            else:
                print(f"  {config}: {reason}")
    return best, least


def _call(stage: str, single: bool, dtype: torch.dtype) -> Callable[[], tuple]:
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


def _target() -> str:
    """Of aot.TARGETS the one that is nearest to the GPU at hand, and no newer."""
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability()
    known = [int(target[3:]) for target in aot.TARGETS if target.startswith("sm_")]
    return f"sm_{max(number for number in known if number <= 10 * major + minor)}"


def _agree(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """To half the digits of their dtype: tiles change the order of sums, no more."""
    return all(
        (one.double() - other.double()).norm() <= torch.finfo(one.dtype).eps ** 0.5 * other.norm()
        for one, other in zip(found, expected, strict=True)
        if one.numel()
    )


def timed(
    stage: str, call: Callable[[], tuple], key: tuple, device: str
) -> Callable[[dict[str, int]], float]:
    """A function: how long ``call`` takes with the tiles it is given, which are put among those
    that won on ``device``.

    Raises (the function returned):
        ValueError: the tiles are above the budget, or their results are not the first tiles'.
    """
    (target, won), expected = TUNED[device], []

    def measure(config: dict[str, int]) -> float:
        won[key] = config
        above = too_much(stage, call, target, device)
        if above:
            raise ValueError(above)
        expected[1:] = [call()]
        if not _agree(expected[-1], expected[0]):
            raise ValueError("another result than the default's")
        return _seconds(call)

    return measure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m fastseq.kernels.tune")
    parser.add_argument("--seconds", type=float, default=240, help="time to spend in all")
    parser.add_argument("--output", type=Path, default=PATH, help="for what wins (%(default)s)")
    arguments = parser.parse_args(argv)
    device = torch.cuda.get_device_name()
    target, won = TUNED.setdefault(device, Tuned(_target(), {}))
    work = list(itertools.product(CANDIDATES, (False, True), (torch.float32, torch.bfloat16)))
    start = time.monotonic()
    for done, (stage, single, dtype) in enumerate(work, 1):
        key = stage, single, dtype == torch.float32
        measure = timed(stage, _call(stage, single, dtype), key, device)
        until = start + arguments.seconds * done / len(work)
        default, *others = candidates(*key)

        def against(config: dict[str, int], stage=stage, default=default) -> str | None:
            # That the default is within the budgets is for `make test` to say, once.
            if config == default:
                return None
            return too_much_elsewhere(stage, config, target, device)

        best, least = search([default, *others], measure, until, against)
        if best is None:
            # Measuring left the last one there.
            won.pop(key, None)
            print(f"{key}: no candidate runs: the default stays", flush=True)
        else:
            won[key] = best
            print(f"{key}: {least * 1e6:.0f} us: {best}", flush=True)
        # What is known so far, should the machine's time be up before the end.
        with atomic_write(arguments.output) as temporary:
            temporary.write_text(written(TUNED))


if __name__ == "__main__":
    main()
