"""Every test starts from the same torch settings and leaves none behind."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch

# Tests run side by side; what each starts in turn must not want every core for itself.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def same_start() -> Iterator[None]:
    torch.manual_seed(0)
    random.seed(0)
    dtype = torch.get_default_dtype()
    # torch's older switch sets these, and set back leaves them at "ieee".
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
    for switch, precision in zip(switches, precisions, strict=True):
        switch.fp32_precision = precision
