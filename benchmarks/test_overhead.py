"""The cost of one small call, ours and torch's: pytest benchmarks/test_overhead.py"""

from __future__ import annotations

import pytest
import torch

from fastseq import nn
from fastseq.testing import lstm_case


@pytest.mark.parametrize("cls", [nn.LSTM, torch.nn.LSTM], ids=["fastseq", "torch"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_forward_of_the_smallest_row(benchmark, cls, grad):
    case = lstm_case(5, 1, 16, 32, hx=False)
    module, x = case.build(cls), case.inputs["x"]
    with torch.set_grad_enabled(grad):
        y, _ = benchmark(module, x)
    assert y.shape == (5, 1, 32)
