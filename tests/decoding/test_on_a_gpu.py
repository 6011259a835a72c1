"""Decoding and the fused loss on a GPU: the tokens of the CPU, and the budget of the loss."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

from fastseq import decoding, functional
from fastseq.models import attention as fast_house
from fastseq.ops import linear_cross_entropy as ops
from fastseq.reference.loss import linear_cross_entropy as reference
from fastseq.testing import assert_matches

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

WAYS = {
    "greedy": lambda *given: decoding.greedy(*given, max_length=12),
    "beam": lambda *given: decoding.beam_search(*given, max_length=12, width=4, n_best=2).tokens,
    # Numbers drawn on the CPU, for both.
    "sample": lambda *given: decoding.sample(
        *given, max_length=12, generator=torch.Generator().manual_seed(0)
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_tokens_are_the_cpu_s(way):
    torch.manual_seed(0)
    decoder = fast_house.Decoder(5000, 6, 8, fast_house.Attention(8))
    model = fast_house.Seq2Seq(fast_house.Encoder(5000, 6, 8), decoder).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0)
    src, lengths = torch.randint(5000, (6, 7)), torch.tensor([7, 3, 1, 7, 5, 2])
    expected = WAYS[way](model, src, lengths)
    found = WAYS[way](copy.deepcopy(model).cuda(), src.cuda(), lengths.cuda())
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_keeps_its_budget(dtype, reduction, monkeypatch):
    monkeypatch.setattr(ops, "CHUNK_BYTES", 1 << 14)
    generator = torch.Generator().manual_seed(0)
    shapes = {"hidden": (70, 24), "weight": (300, 24), "bias": (300,)}
    inputs = {
        name: torch.randn(shape, generator=generator).to("cuda", dtype)
        for name, shape in shapes.items()
    }
    target = torch.randint(300, (70,), generator=generator).cuda()
    target[::3] = 7

    def ours(*tensors):
        return functional.linear_cross_entropy(
            *tensors, target, None, 7, label_smoothing=0.1, reduction=reduction
        )

    def exact(*tensors):
        return reference(*tensors, target, None, 7, 0.1, reduction)

    def torchs(*tensors):
        options = {"ignore_index": 7, "label_smoothing": 0.1, "reduction": reduction}
        return F.cross_entropy(F.linear(*tensors), target, **options)

    shape = (70,) if reduction == "none" else ()
    cotangent = torch.randn(shape, generator=generator).to("cuda", dtype)
    assert_matches(ours, exact, torchs, inputs, [cotangent])
