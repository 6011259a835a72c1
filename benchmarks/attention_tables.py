"""The tables of kernels/README.md that need no GPU: python -m benchmarks.attention_tables NAME

errors: what rounding does, by emulation on the host, against float64.
floors: what calls should cost on an H200, by the counts of kernels/README.md.
host:   what a launch costs the host, by a CUDA driver that does nothing; needs triton and cc.
"""

from __future__ import annotations

import itertools
import math
import sys

import numpy as np
import torch
from torch import Tensor

from fastseq.reference import scores
from fastseq.testing import run_with_grads
from fastseq.testing_attention import SCORES, attention_case

__all__ = ["host", "main"]


def table(*rows: tuple[object, ...]) -> None:
    """As Markdown has it; the first row is the head."""
    for at, row in enumerate(rows):
        print("| " + " | ".join(map(str, row)) + " |")
        if at == 0:
            print("|" + "---|" * len(row))
    print(flush=True)


def off(found: Tensor, exact: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.double() - exact).norm() / exact.norm())


def scores_gradient(p: Tensor, d_p: Tensor, scale: float, means: int) -> Tensor:
    """As the kernels do it, the mean taken off so many times; 0: by differences."""
    if not means:
        return scale * p * ((d_p.unsqueeze(-1) - d_p.unsqueeze(-2)) * p.unsqueeze(-2)).sum(-1)
    for _ in range(means):
        d_p = d_p - (p * d_p).sum(-1, keepdim=True)
    return scale * p * d_p


def key_gradients(case, d_e: Tensor) -> tuple[Tensor, Tensor]:
    """Of query and keys, in the dtype of d_e."""
    query, keys, _, *v = (t.to(d_e.dtype) for t in case.inputs.values())
    if case.score == "dot":
        return d_e @ keys, d_e.mT @ query
    slopes = 1 - torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1)) ** 2
    terms = d_e.unsqueeze(-1) * slopes * v[0]
    return terms.sum(2), terms.sum(1)


def second_mean() -> None:
    rows = {"one mean": [], "two": [], "torch, float32": []}
    for score in ("dot", "additive"):
        case = attention_case(score, 4, 5, 70, 16, scale=12.0)
        case.inputs["values"] += 30.0

        def found(one, means):
            p = one.functional(scores)(*one.inputs.values())[1]
            d_p = one.cotangents[0] @ one.inputs["values"].mT + one.cotangents[1]
            return key_gradients(one, scores_gradient(p, d_p, 12.0, means))

        exact = found(case.to(torch.float64), 0)
        torchs = run_with_grads(case.functional(scores), case.inputs, case.cotangents)
        torchs = torchs["grad query"], torchs["grad keys"]
        for name, got in zip(rows, (found(case, 1), found(case, 2), torchs), strict=True):
            errors = (f"{off(g, e):.1e}" for g, e in zip(got, exact, strict=True))
            rows[name].append(", ".join(errors))
    table(("", "dot: dq, dk", "additive: dq, dk"), *((n, *said) for n, said in rows.items()))


def half_precision() -> None:
    """Factors of products in half dtypes, rounded as they are and left in float32."""
    rows = []
    for dtype in (torch.float16, torch.bfloat16):
        more, less = {"context": [], "dq": [], "dk": []}, {"context": [], "dq": [], "dk": []}
        for Q, S in itertools.product((6, 40, 200), (40, 300, 1000)):
            case = attention_case("dot", 3, Q, S, 64, 32, scale=1 / 8, dtype=dtype)
            exact, torchs = (
                run_with_grads(one.functional(scores), one.inputs, one.cotangents)
                for one in (case.to(torch.float64), case)
            )
            query, keys, values = (t.float() for t in case.inputs.values())
            g, h = (c.float() for c in case.cotangents)
            p = torch.softmax(query @ keys.mT / 8, -1)
            d_e = scores_gradient(p.to(dtype).float(), g @ values.mT + h, 1 / 8, 2)
            for names, factor, products in (
                (("context",), p, lambda p, v=values: (p @ v,)),
                (("dq", "dk"), d_e, lambda d_e, q=query, k=keys: (d_e @ k, d_e.mT @ q)),
            ):
                rounded, kept = (products(f) for f in (factor.to(dtype).float(), factor))
                for name, *both in zip(names, rounded, kept, strict=True):
                    full = {"context": "out0", "dq": "grad query", "dk": "grad keys"}[name]
                    mine, wide = (off(one.to(dtype), exact[full]) for one in both)
                    more[name].append(mine / wide)
                    less[name].append(mine / off(torchs[full], exact[full]))
        for name in more:
            said = (f"{min(r):.2f} to {max(r):.2f}" for r in (more[name], less[name]))
            rows.append((str(dtype)[6:], name, *said))
    table(("dtype", "", "over float32 factors", "over PyTorch's own"), *rows)


def fast_tanh() -> None:
    """An error of 2^-11 put into each tanh, in float64."""
    case = attention_case("additive", 4, 8, 40, 512, 128).to(torch.float64)
    query, keys, values, v = case.inputs.values()
    g, h = case.cotangents
    exact = torch.tanh(query.unsqueeze(2) + keys.unsqueeze(1))

    def results(t: Tensor) -> list[Tensor]:
        e = t @ v
        p = torch.softmax(e, -1)
        d_e = scores_gradient(p, g @ values.mT + h, 1.0, 1)
        terms = d_e.unsqueeze(-1) * (1 - t * t) * v
        return [e, p, p @ values, terms.sum(2), terms.sum(1), torch.einsum("bqs,bqsk->k", d_e, t)]

    drawn = torch.rand(exact.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    kinds = {
        "up to 2^-11, its own": drawn.double(),
        "2^-11, all outwards": 1.0,
        "2^-11, all raising the score": torch.sign(exact * v),
    }
    rows = []
    for name, moved in kinds.items():
        got = results(exact * (1 + moved * 2.0**-11))
        rows.append((name, *(f"{off(g, e):.1e}" for g, e in zip(got, results(exact), strict=True))))
    table(("each tanh off by", *"scores weights context dq dk dv".split()), *rows)


def tanh_itself() -> None:
    """That of kernels/_lang.py, in numpy; ex2 and rcp off by units in the last place."""

    def moved(x: np.ndarray, units: int) -> np.ndarray:
        for _ in range(abs(units)):
            x = np.nextafter(x, np.float32(math.copysign(math.inf, units)))
        return x

    def tanh(x: np.ndarray, ex2: int, rcp: int) -> np.ndarray:
        f = np.float32
        y = x * x
        near = x * y * ((f(-0.04779421) * y + f(0.13277629)) * y - f(0.33331882)) + x
        power = np.exp2((x * f(2.885390081777927)).astype(np.float64)).astype(f)
        r = moved(f(1) / (f(1) + moved(power, ex2)), rcp)
        return np.where(x < f(0.4), near, f(1) - f(2) * r)

    # Every sixteenth float32 in between, and as many evenly.
    low, high = (np.float32(x).view(np.uint32) for x in (0.001, 3.0))
    each = np.arange(low, high, 16, dtype=np.uint32).view(np.float32)
    even = np.linspace(0.001, 3.0, 1 << 21, dtype=np.float32)
    rows = []
    for name, call in {
        "exact ex2 and rcp": lambda x: tanh(x, 0, 0),
        "ex2 off by -2, rcp by 1": lambda x: tanh(x, -2, 1),
        "torch, on a CPU": lambda x: torch.tanh(torch.from_numpy(x)).numpy(),
    }.items():
        said = []
        for x, least in ((each, np.max), (even, lambda e: np.sqrt(np.mean(e * e)))):
            exact = np.tanh(x.astype(np.float64))
            errors = np.abs(call(x) - exact) / exact * 2.0**24
            said += [f"{least(errors):.1f}", f"{least(errors[x < np.float32(0.4)]):.2f}"]
        rows.append((name, *said))
    table(("units of 2^-24", "most, to 3", "to 0.4", "rms, to 3", "to 0.4"), *rows)


def errors() -> None:
    """All of them."""
    for part in (second_mean, half_precision, fast_tanh, tanh_itself):
        part()


# Of an H200: multiprocessors, Hz, and a clock and multiprocessor special functions, other
# instructions (a product and sum is one); bytes a second.
PROCESSORS, CLOCK, SPECIAL, OTHER, BYTES = 132, 1.75e9, 16, 128, 4.8e12
# Instructions of the additive score's inner loops, a term, on sm_90: forward, backward.
INSTRUCTIONS = (16, 20)


def floors() -> None:
    """By score; where it projects something first, H = E = K, by torch's products."""
    from benchmarks.bench_attention import SIZES, moved_bytes

    a_second = PROCESSORS * CLOCK
    rows = []
    for size, score in itertools.product(SIZES["cuda"], SCORES):
        B, Q, S, K, C = size
        tanh = score not in ("dot", "general")
        terms = B * Q * S * K if tanh else 0
        # Products of numbers: context or d_p and d_values; scores or both their gradients.
        fma = [B * Q * S * (C + (0 if tanh else K)) * passes for passes in (1, 2)]
        first = {"general": B * Q * K * K, "concat": B * (Q + S) * K * K}.get(score, 0)
        if score == "location":
            # 32 filters of 31 positions, and from them to K.
            first = B * S * 32 * (31 + K)
        said = []
        for passes, (products, each) in enumerate(zip(fma, INSTRUCTIONS, strict=True), 1):
            mode = ("inf", "train")[passes - 1]
            moved = moved_bytes(size, "float32", mode, 1.0)
            moved -= moved_bytes(size, "float32", "inf", 1.0) * (passes - 1)
            moved += 4 * B * S * K * (score == "location")
            found = (
                2 * terms / (SPECIAL * a_second),
                (each * terms + products + passes * first) / (OTHER * a_second),
                moved / BYTES,
            )
            said.append(", ".join(f"{seconds * 1e6:.1f}" for seconds in found))
        rows.append((", ".join(map(str, size[:4])), score, *said))
    table(("B, Q, S, K = C, float32", "score", "forward", "backward"), *rows)


def host() -> None:
    """In a process of its own, which finds the driver as the system's."""
    import os
    import subprocess
    import tempfile
    from pathlib import Path

    here = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "libcuda.so.1"
        source = here / "tests" / "kernels" / "stub_cuda.c"
        shared = ["-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
        subprocess.run(["cc", *shared, str(source), "-o", str(library)], check=True)
        (Path(folder) / "libcuda.so").symlink_to(library.name)
        found = {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder}
        found["TRITON_CACHE_DIR"] = f"{folder}/cache"
        told = (
            "from tests.kernels.launched_without_gpu import costs\n"
            "for name, us in costs().items(): print(name, f'{us:.1f}')"
        )
        done = subprocess.run(
            [sys.executable, "-c", told], cwd=here, env=os.environ | found, check=True,
            capture_output=True, text=True,
        )  # fmt: skip
    rows = [line.rsplit(" ", 1) for line in done.stdout.splitlines()]
    table(("", "us"), *rows)


PARTS = {"errors": errors, "floors": floors, "host": host}


def main(argv: list[str] | None = None) -> int:
    """Print a table, or all."""
    chosen = sys.argv[1:] if argv is None else argv
    if set(chosen) - PARTS.keys():
        print(f"attention_tables: expected some of {', '.join(PARTS)}, got {' '.join(chosen)}")
        return 2
    for name in chosen or PARTS:
        PARTS[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main())
