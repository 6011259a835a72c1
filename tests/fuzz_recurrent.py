"""Random recurrent calls against the float64 reference: outputs and every gradient.

``python -m tests.fuzz_recurrent --count 10000 --seed 0``; a failing case prints the line that
replays it alone.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor
from tqdm import tqdm

from fastseq import _native, functional, nn
from fastseq.ops.recurrent import CELLS
from fastseq.reference import rnn
from fastseq.testing import (
    LAYOUTS,
    RecurrentCase,
    assert_matches,
    edge_sizes,
    recurrent_case,
    with_layout,
)

MODULES = {
    "lstm": nn.LSTM,
    "gru": nn.GRU,
    "rnn_tanh": nn.RNN,
    "rnn_relu": nn.RNN,
    "peephole_lstm": nn.PeepholeLSTM,
    "layer_norm_lstm": nn.LayerNormLSTM,
}
TORCHS = {name: getattr(torch.nn, cls.__name__, None) for name, cls in MODULES.items()}
DTYPES = [torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]


def without_nonlinearity(fn: Callable[..., object]) -> Callable[..., object]:
    """``fn`` for a case of RNN, whose options name what the function's own name says already."""

    def call(*args: object, nonlinearity: str = "", **options: object) -> object:
        return fn(*args, **options)

    return call


def ours(case: RecurrentCase, **more: object) -> Callable[..., object]:
    """The function of fastseq that the case is about."""
    return case.functional(without_nonlinearity(getattr(functional, case.cell)), **more)


def yardstick(case: RecurrentCase, **more: object) -> Callable[..., object]:
    """torch's own layer in the dtype of the case; for what torch has no layer of the reference,
    ``more`` its options, with torch's own normalisation."""
    torchs = TORCHS[case.cell]
    beyond = {"lengths", "resets"} & case.keywords.keys()
    if torchs is None or beyond or 0 in case.inputs["x"].shape:
        return with_torchs_layer_norm(case.reference(**more))
    return case.module(torchs)


def with_torchs_layer_norm(fn: Callable[..., object]) -> Callable[..., object]:
    """A reference with ``layer_norm`` in place of the same written out: equal but for rounding, so
    that in float64 too it shows what torch's arithmetic errs."""

    def layer_norm(x: Tensor) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=rnn.LAYER_NORM_EPS)

    def call(*inputs: Tensor) -> object:
        with mock.patch.object(rnn, "_normalised", layer_norm):
            return fn(*inputs)

    return call


def seeded(fn: Callable[..., object], seed: int) -> Callable[..., object]:
    """``fn`` from the same place of torch's random stream at each call."""

    def call(*inputs: Tensor) -> object:
        torch.manual_seed(seed)
        return fn(*inputs)

    return call


def with_zoneout(
    case: RecurrentCase, pair: tuple[float, float], train: bool
) -> Callable[..., object]:
    """The reference, layer by layer, with zoneout: for h then c of each direction, a draw of one
    number an element in training, the probability itself in evaluation."""
    options = case.options
    kind, D = rnn.CELLS[case.cell], 2 if options["bidirectional"] else 1
    sizes = case.keywords.get("batch_sizes")

    def call(x: Tensor, *rest: Tensor) -> object:
        by_row = options["batch_first"] and sizes is None
        resets = case.keywords.get("resets")
        if by_row:
            x = x.transpose(0, 1)
            resets = resets if resets is None else resets.T
        values = dict(zip(list(case.inputs)[1:], rest, strict=True))
        states = [values.pop(n) for n in ("h0", "c0") if n in values]
        params = list(values.values())
        per_side = len(params) // (options["num_layers"] * D)
        finals = []
        for layer in range(options["num_layers"]):
            keeps = []
            widths = [int(options["hidden_size"])] * kind.states
            if options.get("proj_size"):
                widths[0] = int(options["proj_size"])
            for _ in range(D):
                for p, width in zip(pair, widths, strict=False):
                    keep = torch.full((*x.shape[:-1], width), p, dtype=case.inputs["x"].dtype)
                    keeps.append((keep.bernoulli_(p) if train else keep).to(x.dtype))
            sides = []
            for d in range(D):
                side = layer * D + d
                weights = params[side * per_side : (side + 1) * per_side]
                if not options["bias"]:
                    weights[2:2] = [None, None]
                y, *final = rnn.layer(
                    case.cell,
                    x,
                    [s[side] for s in states] or None,
                    weights,
                    reverse=d == 1,
                    batch_sizes=None if sizes is None else sizes.tolist(),
                    lengths=case.keywords.get("lengths"),
                    resets=resets,
                    zoneout=keeps[d * kind.states : (d + 1) * kind.states],
                )
                sides.append(y)
                finals.append(final)
            x = torch.cat(sides, -1)
            if train and options["dropout"] and layer + 1 < options["num_layers"]:
                x = torch.nn.functional.dropout(x, options["dropout"], training=True)
        x = x.transpose(0, 1) if by_row else x
        return x, *(torch.stack(s) for s in zip(*finals, strict=True))

    return call


@dataclass(frozen=True)
class Drawn:
    """One random call and where it runs."""

    case: RecurrentCase
    isa: str
    threads: int
    module: bool
    train: bool
    zoneout: tuple[float, float]
    layouts: dict[str, str]
    wrt: list[str] | None

    def __str__(self) -> str:
        said = f"{self.case} {self.case.inputs['x'].dtype} {self.isa} threads={self.threads}"
        said += " module" if self.module else ""
        said += f" train={self.train} zoneout={self.zoneout}"
        said += f" layouts={self.layouts}" if self.layouts else ""
        return said if self.wrt is None else f"{said} wrt={self.wrt}"


def draw(seed: int, index: int) -> Drawn:
    """The call of that number in the series of that seed; each can be drawn alone."""
    rng = random.Random(f"{seed} {index}")
    cell = rng.choice([*MODULES, "lstm", "gru"])
    states = rnn.CELLS[cell].states
    edges = [n for n in edge_sizes(8, 16) if n < 18]
    T, B = rng.choice([1, 1, 2, 3, 7, 20]), rng.choice([0, *edges, 25, 40])
    I, H = rng.choice([0, *edges, 40]), rng.choice([*edges, 31, 33, 48, 65])  # noqa: E741
    module = rng.random() < 0.3
    proj = states == 2 and H > 1 and rng.random() < 0.25 and not (module and TORCHS[cell] is None)
    mode = rng.choice(["padded", "padded", "lengths", "packed"]) if B else "padded"
    if module and I == 0:
        module = False
    lengths = None
    if mode == "lengths":
        lengths = "random"
    if mode == "packed":
        lengths = [rng.randint(1, T) for _ in range(B)]
    # Without a kernel the halves run in torch's arithmetic, which overflows.
    dtypes = DTYPES if cell in CELLS else DTYPES[:3]
    case = recurrent_case(
        cell,
        T,
        B,
        I,
        H,
        num_layers=rng.choice([1, 1, 2, 3]),
        bidirectional=rng.random() < 0.5,
        bias=rng.random() < 0.75,
        batch_first=rng.random() < 0.3,
        dropout=rng.choice([0.0, 0.0, 0.3]),
        hx=rng.random() < 0.6,
        proj_size=rng.randint(1, H - 1) if proj else 0,
        lengths=lengths,
        resets=rng.choice([None, None, 0.2]),
        dtype=rng.choice(dtypes),
        seed=rng.randrange(2**31),
        # Larger weights make some cells chaotic, and every rounding a large error.
        scale=rng.choice([1.0, 1.0, 0.5]),
    )
    if mode == "packed":
        case = case.packed()
    zoneout = (0.0, 0.0)
    if cell in ("lstm", "gru") and not module and rng.random() < 0.25:
        zoneout = (rng.choice([0.0, 0.1, 0.5]), rng.choice([0.0, 0.2]))
        zoneout = zoneout if cell == "lstm" else (zoneout[0],) * 2
    layouts = {
        name: rng.choice([name for name in LAYOUTS if name != "expanded"])
        for name, t in case.inputs.items()
        if t.numel() and rng.random() < 0.15
    }
    case = RecurrentCase(
        case.cell,
        case.options,
        {n: with_layout(t, layouts.get(n, "contiguous")) for n, t in case.inputs.items()},
        case.cotangents,
        case.keywords,
    )
    wrt = None
    if rng.random() < 0.2:
        wrt = rng.sample(list(case.inputs), rng.randint(1, len(case.inputs)))
    return Drawn(
        case,
        rng.choice(_native.available_isas()) if _native.loaded() else "none",
        rng.choice([1, 2, 3]),
        module,
        rng.random() < 0.5 and not module,
        zoneout,
        layouts,
        wrt,
    )


def check(drawn: Drawn) -> None:
    """Raise AssertionError, or whatever the call raises, where it is not what it should be."""
    case, train = drawn.case, drawn.train
    if drawn.module:
        found = case.module(MODULES[case.cell])
        # Modules are built in training mode.
        truth, by_torch = case.reference(train=True), yardstick(case, train=True)
    else:
        more = {"train": train}
        truth = case.reference(train=train)
        by_torch = yardstick(case, train=train)
        if case.options["dropout"] and not train:
            by_torch = with_torchs_layer_norm(case.reference())
        if any(drawn.zoneout):
            pair = drawn.zoneout
            more["zoneout"] = pair if case.cell == "lstm" else pair[0]
            truth = by_torch = with_zoneout(case, pair, train)
        found = ours(case, **more)
    if _native.loaded():
        before = _native.isa()
        _native.set_isa(drawn.isa)
    threads = torch.get_num_threads()
    torch.set_num_threads(drawn.threads)
    try:
        assert_matches(
            *(seeded(fn, 7) for fn in (found, truth, by_torch)),
            case.inputs,
            case.cotangents,
            wrt=drawn.wrt,
            names=case.names,
        )
    finally:
        torch.set_num_threads(threads)
        if _native.loaded():
            _native.set_isa(before)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000, help="number of calls")
    parser.add_argument("--seed", type=int, default=0, help="of the series")
    parser.add_argument("--start", type=int, default=0, help="number of the first call")
    parser.add_argument("--only", type=int, help="number of the one call to replay")
    parser.add_argument("--seconds", type=float, help="stop after this long")
    asked = parser.parse_args()
    indices = range(asked.start, asked.start + asked.count)
    if asked.only is not None:
        indices = range(asked.only, asked.only + 1)
    failures, begun, done = 0, time.monotonic(), 0
    for index in tqdm(indices, unit="call", dynamic_ncols=True):
        drawn = draw(asked.seed, index)
        try:
            check(drawn)
        except Exception as error:
            failures += 1
            replay = f"python -m tests.fuzz_recurrent --seed {asked.seed} --only {index}"
            tqdm.write(f"{replay}\n  {drawn}\n  {type(error).__name__}: {error}")
            if asked.only is not None:
                raise
        done += 1
        if asked.seconds and time.monotonic() - begun > asked.seconds:
            break
    print(f"{done} calls from {indices.start}, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
