"""Every test starts from the same torch settings and leaves none behind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

from fastseq import _native

# Tests run side by side; what each starts in turn must not want every core for itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if os.environ.get("TRITON_INTERPRET") == "1":
    # What then runs on CPU tensors is settled when the operators are registered, by the first test
    # that imports them.
    import tests.kernels.on_device  # noqa: F401


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    torch.manual_seed(0)
    random.seed(0)
    dtype = torch.get_default_dtype()
    # torch's older switch has a memory of its own; it sets these too, and set back leaves them at
    # "ieee".
    switches = (
        torch.backends.cuda.matmul,
        torch.backends.cudnn.rnn,
        torch.backends.mkldnn.matmul,
        torch.backends.mkldnn.rnn,
    )
    precisions = [switch.fp32_precision for switch in switches]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
    torch.set_default_dtype(dtype)
    torch.set_float32_matmul_precision("highest")
    for switch, precision in zip(switches, precisions, strict=True):
        switch.fp32_precision = precision


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request, same_start) -> Iterator[str]:
    """Where tensors are made, by torch's default device: tests that take this, or whose module does
    by a mark, run on the GPU as they do on the CPU. A CPU may have an instruction set after it.
    Triton's interpreter takes CPU tensors: see tests/kernels/on_device.py."""
    name, _, isa = request.param.partition(" ")
    before = _native.isa() if isa else None
    if isa:
        _native.set_isa(isa)
    if name != "cpu":
        torch.set_default_device(name)
    yield name
    torch.set_default_device(None)
    if isa:
        _native.set_isa(before)
