"""Programs from the package index, before and after ``fastseq.patched()``, otherwise as published.

``python -m benchmarks.clients`` needs the packages of benchmarks/clients.txt, which neither the
tests nor the other benchmarks do. Each program trains and uses a model in its own way on synthetic
data of a realistic shape. Before any time is reported, the model trained on fastseq's layers is run
on torch's layers and in float64 too, and must keep the error budget, gradients included.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import gc
import importlib.metadata
import logging
import os
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor, nn

import fastseq
from benchmarks.client_programs import CLIENTS, Client
from benchmarks.measure import busy, machine
from fastseq._files import atomic_write
from fastseq.testing import assert_results_close

RESULTS = Path(__file__).with_name("results") / "clients.csv"
SIDES = {"torch": contextlib.nullcontext, "fastseq": fastseq.patched}


def check(client: Client) -> None:
    """Hold the trained model's output and gradients on fastseq's layers to the error budget.

    As in :func:`fastseq.testing.assert_matches`, a result beyond it is judged again by the largest
    error that torch makes on that model and on eight others within 1 % of it.

    Raises:
        AssertionError: an error beyond the budget, or no layer of fastseq's in the model.
    """
    ours = copy.deepcopy(client.model).eval()
    theirs = copy.deepcopy(ours)
    assert fastseq.restore_modules(theirs), f"{client.package}: no layer was replaced"

    def results(model: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        model = copy.deepcopy(model).to(dtype)
        model.zero_grad()
        output = client.probe(model, dtype)
        cotangent = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
        output.backward(cotangent.to(dtype))
        gradients = {f"grad {name}": p.grad for name, p in model.named_parameters()}
        return {"output": output.detach()} | gradients

    actual, truth = results(ours, torch.float32), results(theirs, torch.float64)
    by_torch = results(theirs, torch.float32)
    try:
        assert_results_close(actual, truth, by_torch, what=client.package)
    except AssertionError:
        samples = []
        for seed in range(8):
            generator = torch.Generator().manual_seed(seed)
            near = copy.deepcopy(theirs)
            with torch.no_grad():
                for p in near.parameters():
                    p *= 0.99 + 0.02 * torch.rand(p.shape, generator=generator)
            exact, rounded = results(near, torch.float64), results(near, torch.float32)
            known = [name for name, value in exact.items() if value is not None]
            errors = dict.fromkeys(exact) | {n: rounded[n].double() - exact[n] for n in known}
            samples.append(errors)
        assert_results_close(actual, truth, by_torch, what=client.package, samples=samples)


def timed(call: Callable[[], object]) -> tuple[float, object]:
    gc.collect()
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(cls: type[Client], rounds: int) -> list[dict[str, object]]:
    """Both sides in turn, from the same seed each time; a row for training and one for use."""
    seconds: dict[tuple[str, str], list[float]] = {}
    scores = {}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(rounds + 1):
            for side in list(SIDES)[:: 1 if turn % 2 else -1]:
                for seed in (random.seed, np.random.seed, torch.manual_seed):
                    seed(0)
                client = cls(Path(folder))
                with SIDES[side]():
                    training, scores[side] = timed(client.train)
                using, _ = timed(client.use)
                if turn == 0:
                    # The first turn warms up, and checks.
                    if side == "fastseq":
                        check(client)
                    continue
                seconds.setdefault(("train", side), []).append(training)
                seconds.setdefault(("use", side), []).append(using)
    rows = []
    for phase in ("train", "use"):
        by_torch, by_fastseq = (median(seconds[phase, side]) for side in SIDES)
        rows.append(
            {
                "package": cls.package,
                "version": importlib.metadata.version(cls.package),
                "program": cls.program,
                "phase": phase,
                "torch_seconds": f"{by_torch:.3f}",
                "fastseq_seconds": f"{by_fastseq:.3f}",
                "ratio": f"{by_torch / by_fastseq:.2f}",
                "torch_result": f"{scores['torch']:.6g}" if phase == "train" else "",
                "fastseq_result": f"{scores['fastseq']:.6g}" if phase == "train" else "",
                "rounds": rounds,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packages", nargs="*", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    if reason := busy():
        print(f"warning: {reason}")
    rows = []
    if arguments.out.exists():
        with open(arguments.out, newline="") as file:
            kept = [row for row in csv.DictReader(file) if row["package"] in CLIENTS]
            rows = [row for row in kept if row["package"] not in arguments.packages]
    facts = {name: machine()[name] for name in ("cpu", "threads", "isa", "torch", "date")}
    for name in arguments.packages:
        with contextlib.ExitStack() as silence:
            nothing = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nothing))
            silence.enter_context(contextlib.redirect_stderr(nothing))
            found = measure(CLIENTS[name], arguments.rounds)
        rows += [row | facts for row in found]
        for row in found:
            print(" ".join(f"{key}={row[key]}" for key in list(row)[3:]), name, flush=True)
    arguments.out.parent.mkdir(exist_ok=True)
    with atomic_write(arguments.out) as temporary, open(temporary, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
