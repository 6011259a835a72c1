"""Tables of measurements to choose by, and what is chosen, for tests."""

from __future__ import annotations

import torch

import fastseq
from fastseq.ops import measured_cuda

# Multiprocessors, and bytes of shared memory that a block may have.
H200 = (132, 232448)


def row(torchs=2.0, **changed):
    """Of the table: torch's time is that of every dtype, ours those of `step`, or as given."""
    times = {"step": 1.0} if not changed.keys() & {*measured_cuda.WAYS} else {}
    kind = measured_cuda.Kind("lstm", "f32", 1, 1, False, False, "train")._asdict()
    theirs = torchs if isinstance(torchs, dict) else {n: torchs for n in ("f32", "bf16", "f16")}
    return kind | dict(T=50, B=64, I=512, H=512, P=0, torch=theirs) | times | changed


def plant(monkeypatch, *rows, decoder=()):
    """A table of one device."""
    table = {"a GPU": {"recurrent": list(rows), "decoder": list(decoder)}}
    monkeypatch.setattr(measured_cuda, "TABLE", table)


def said(layer, *shape, dtype=torch.float32, **options):
    module = layer(shape[-1], options.pop("H"), device="cuda", dtype=dtype, **options)
    return fastseq.explain(module, torch.empty(*shape, device="cuda", dtype=dtype))
