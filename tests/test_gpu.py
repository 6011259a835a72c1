"""On CUDA tensors: PyTorch's own code until kernels were measured, the same answers after it."""

from __future__ import annotations

import pytest
import torch

import fastseq
from fastseq import nn
from fastseq.models import attention
from fastseq.ops import measured_cuda
from fastseq.reference import attention as reference
from fastseq.testing import allow_tf32, assert_close_to_reference

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_lstm_as_it_runs_by_default(bidirectional):
    torch.manual_seed(0)
    ours = nn.LSTM(5, 17, 2, bidirectional=bidirectional).cuda()
    theirs = torch.nn.LSTM(5, 17, 2, bidirectional=bidirectional).cuda()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(7, 3, 5, device="cuda")
    with allow_tf32(False):
        exact = theirs.double()(x.double())[0]
        found = ours(x)[0]
        baseline = theirs.float()(x)[0]
    if torch.cuda.get_device_name() not in measured_cuda.TABLE:
        assert fastseq.explain(ours, x).backend == "torch"
    assert_close_to_reference(found.cpu(), exact.cpu(), baseline.cpu(), what="output")


def test_attention_model_on_the_gpu():
    torch.manual_seed(0)

    def build(modules):
        decoder = modules.Decoder(11, 8, 16, modules.Attention(16))
        return modules.Seq2Seq(modules.Encoder(11, 8, 16), decoder).cuda().double()

    fast, oracle = build(attention), build(reference)
    fast.load_state_dict(oracle.state_dict())
    source, target = torch.randint(1, 11, (2, 4, 6), device="cuda")
    found, exact = fast(source, target, 1.0), oracle(source, target, 1.0)
    assert_close_to_reference(found.cpu(), exact.cpu(), what="outputs")
