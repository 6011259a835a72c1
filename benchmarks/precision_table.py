"""The table of docs/numbers.md: python -m benchmarks.precision_table [CELL,T,B,I,H ...]

The errors of recurrent layers under each of torch's precisions, against float64: by AMX where there
is one, else by its emulation, so nothing is timed.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.measure import matmul_precision
from fastseq import _native, nn
from fastseq.testing import recurrent_case, run_with_grads

__all__ = ["errors", "main"]

PRECISIONS = ("highest", "high", "medium")
MODULES = {"lstm": nn.LSTM, "gru": nn.GRU, "rnn_tanh": nn.RNN}
ROWS = (
    "lstm,50,64,512,512",
    "lstm,50,32,256,256",
    "lstm,100,128,128,128",
    "gru,50,32,256,256",
    "rnn_tanh,50,32,256,256",
)


def errors(row: str) -> list[float]:
    """The largest relative error, in the Frobenius norm, of any output and of any gradient under
    each precision in turn."""
    cell, *sizes = row.split(",")
    case = recurrent_case(cell, *map(int, sizes))
    exact = case.to(torch.float64)
    truth = run_with_grads(exact.reference(), exact.inputs, exact.cotangents, names=case.names)
    layer, found = case.module(MODULES[cell]), []
    for precision in PRECISIONS:
        with matmul_precision(precision):
            got = run_with_grads(layer, case.inputs, case.cotangents, names=case.names)
        off = {n: float((got[n].double() - t).norm() / t.norm()) for n, t in truth.items()}
        found.append(max(off[name] for name in case.names))
        found.append(max(e for name, e in off.items() if name not in case.names))
    return found


def main(rows: list[str]) -> int:
    """Print the table."""
    if not _native.loaded() or _native.isa() != "avx512":
        print("precision_table: expected a machine with AVX-512 and the native library")
        return 2
    if _native.tiles() == "off":
        _native.set_tiles("emulated")
    print(f"By: {_native.tiles()}\n")
    head = " | ".join(f"{precision}: outputs | gradients" for precision in PRECISIONS)
    print(f"| cell, T, B, I, H | {head} |")
    print("|---" * (1 + 2 * len(PRECISIONS)) + "|")
    for row in rows or ROWS:
        print(f"| {row.replace(',', ', ')} | " + " | ".join(f"{e:.1e}" for e in errors(row)), "|")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
